// Noise whose width the router learns: noisy top-k gating.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/random.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/expects_on_host.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/row_copies.hpp>
#include <moe/gate/score.hpp>

namespace moe::inline MOE_ABI {

/// Score(logits + noise * (softplus(width) + least)), unless told otherwise in training only.
///
/// `width` is a second row of logits for each token, x W_noise, made by a projection of its own
/// (compute_logits with other weights), which `learned_noise_backward` gives its gradient:
///
///     using noisy_top_k = gate<learned_noise<identity>, top_k<K>, softmax_of_selected>;
///
/// Source: Shazeer et al., "Outrageously large neural networks", 2017, equation 4; FastMoE has
/// least = 0.01.
/// @tparam S  Type of the widths.
template <class Score, class S = float, class Noise = normal_noise<>>
struct learned_noise {
  static constexpr int copies = row_copies<Score>;

  matrix_view<S const>
      width{};  ///< [T,E], rows as those of the logits; absent: no noise. The caller's.
  float least = 0;
  random_when when = random_when::in_training;
  [[no_unique_address]] Score score{};
  Noise noise{};

  /// @throws precondition_error on the CPU unless width has the token's row and E columns.
  template <score_row R>
    requires score_policy<Score, R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const& t) const {
    using V = typename R::value_type;
    if (!width.absent() && is_random(when, t)) {
      detail::expects_on_host(width.cols() == row.size() && t.row < width.rows(),
                              "learned_noise: width is [T,E]", "E", row.size());
      S const* const own = width.row(t.row);
      drawing_token draws(t);
      row.transform([&](int e, V l) {
        if (!is_candidate(l)) return l;
        return l + V(noise(draws, e)) * (softplus(static_cast<V>(own[e])) + V(least));
      });
    }
    score(row, t);
  }

  /// Of the logits; that of the widths is learned_noise_backward's.
  template <score_row R>
    requires score_policy<Score, R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const& t) const {
    score.backward(scores, grad, t);
  }
};

/// The gradient of the widths: dwidth = dlogits * noise * sigmoid(width), the noise being drawn again; 0
/// where there was none.
///
/// @param score    The policy that the gate had.
/// @param dlogits  [T,E], from route_backward.
/// @param tokens   As `route` was given them.
/// @param dwidth   [T,E] out; may be dlogits itself only if nothing else needs it.
/// @throws precondition_error unless the three have the same shape.
/// @note  Does not depend on threads. Allocates nothing.
template <class Score, class S, class Noise, class D, class V>
void learned_noise_backward(cpu const& exec, learned_noise<Score, S, Noise> const& score,
                            matrix_view<D> dlogits, batch const& tokens, matrix_view<V> dwidth,
                            call_site site = call_site::here()) {
  std::int64_t const T = dlogits.rows(), E = dlogits.cols();
  expects((score.width.absent() || (score.width.rows() == T && score.width.cols() == E)) &&
              dwidth.rows() == T && dwidth.cols() == E,
          "learned_noise_backward: width, dlogits and dwidth are [T,E]", site,
          {{"T", T}, {"E", E}, {"dwidth.rows", dwidth.rows()}, {"dwidth.cols", dwidth.cols()}});
  exec.split(T, 32, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      token const id = tokens.at(t);
      bool const drawn = !score.width.absent() && is_random(score.when, id);
      drawing_token draws(id);
      for (std::int64_t e = 0; e < E; ++e) {
        if (!drawn || dlogits(t, e) == 0) {  // 0 times the noise of a logit of -inf, too
          dwidth(t, e) = V(0);
          continue;
        }
        auto const w = static_cast<V>(score.width(t, e));
        V const slope = V(1) / (V(1) + moe::exp(-w));
        dwidth(t, e) = static_cast<V>(dlogits(t, e)) *
                       static_cast<V>(score.noise(draws, static_cast<int>(e))) * slope;
      }
    }
  });
}

static_assert(score_policy<learned_noise<identity>, array_row<float>>);

}  // namespace moe::inline MOE_ABI
