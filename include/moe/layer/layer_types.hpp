// The small values that layers take and give: extents, loss weights, results, parameters.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// The bounds of a layer, fixed when it is made.
struct layer_shape {
  std::int64_t T = 0;   ///< Most tokens of a call.
  std::int64_t M = 0;   ///< Model width.
  std::int64_t H = 0;   ///< Hidden width of one expert.
  int E = 0;            ///< Experts.
  bool bias = false;    ///< Whether the projections of the experts have biases.
  bool z_loss = false;  ///< Whether forward computes the z-loss (T E exponentials in double).
};

/// The auxiliary losses of one forward, not multiplied by any coefficient.
struct layer_losses {
  double balance = 0;  ///< The preset's load-balancing loss.
  double z = 0;        ///< Mean squared logsumexp of the router's logits; 0 unless asked for.
};

/// What the losses are multiplied with in the total: d(total) / d(loss).
struct loss_weights {
  double balance = 0;
  double z = 0;
};

/// The parameters of a moe_layer, or their gradients, as views on the caller's memory.
/// @tparam Parameters  `Experts::parameters<V>` of the layer's experts.
template <class V, class Parameters = ffn_weights<V>>
struct layer_weights {
  matrix_view<V> router;  ///< [M,E]
  Parameters experts;

  template <class U, class Constant>
    requires(std::is_same_v<U, V const> && !std::is_const_v<V> &&
             std::is_convertible_v<Parameters, Constant>)
  constexpr operator layer_weights<U, Constant>() const noexcept {
    return {router, experts};
  }
};

/// Calls f(name, value, gradient) for every parameter, as vector_views of contiguous elements: the
/// router's rows, then what for_each_parameter gives of the experts (of those of a user if it is
/// declared beside his type of parameters).
/// @throws precondition_error unless both have the same parts and shapes.
template <class V, class Parameters, class F>
void for_each_parameter(layer_weights<V, Parameters> const& values,
                        layer_weights<V, Parameters> const& gradients, F&& f,
                        call_site site = call_site::here()) {
  matrix_view<V> const &v = values.router, &g = gradients.router;
  expects(v.rows() == g.rows() && v.cols() == g.cols(),
          "for_each_parameter: values and gradients have the same router", site,
          {{"rows", v.rows()},
           {"cols", v.cols()},
           {"gradient rows", g.rows()},
           {"gradient cols", g.cols()}});
  detail::visit_part("router", stacked_view<V>(v), stacked_view<V>(g), f);
  for_each_parameter(values.experts, gradients.experts, f, site);
}

/// Nothing is called between the stages of a layer.
///
/// A hook object of a user has any of these functions; those it has are called, on the calling thread,
/// with what the stage has just made:
///   logits(matrix_view<V>)                             [T,E]; may be changed, as a constant for the
///                                                      gradient;
///   loss_sums(vector_view<double>)                     what the auxiliary losses are made of: the
///                                                      load_balance_sums(E), and the z_loss_sums if
///                                                      layer_shape::z_loss; may be changed, see
///                                                      `global_losses`;
///   routed(basic_routing<V> const&, routing_table const&, vector_view<V const> weights);
///   rows_in(matrix_view<V const>), rows_out(...)       [N,M]: before and after the experts, which
///                                                      must be row_experts;
///   output(matrix_view<V const>)                       [T,M].
struct no_hooks {};

}  // namespace moe::inline MOE_ABI
