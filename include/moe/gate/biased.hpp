// Biases: on the keys by which experts are selected, and on the logits themselves.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/gate/row_copies.hpp>
#include <moe/gate/select.hpp>

namespace moe::inline MOE_ABI {

/// Select by s[e] + bias[e]; the weights come from the scores s, which are not changed.
///
/// (s + b) - b is not s: of s = 1e-8 and b = 12 it leaves 0 in float. A gate keeps its scores and lets
/// Select destroy a copy, so that no weight is made that way.
/// Source: DeepSeek-V3's e_score_correction_bias; LongCat.
template <class Select>
struct biased {
  static constexpr int max_k = Select::max_k;
  static constexpr int copies = row_copies<Select>;

  [[no_unique_address]] Select select{};
  /// [E] of numbers, or -inf for an expert that is not to be selected; null: no bias. The caller's.
  float const* bias = nullptr;

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    if (bias != nullptr) keys.transform([added = bias](int e, V s) { return s + V(added[e]); });
    select(keys, chosen, t);
  }
};

/// Score(logits + bias): a router whose projection has a bias. Selection, weights and losses see it.
/// Source: gpt-oss (a linear layer with a bias as the router).
template <class Score>
struct logit_bias {
  static constexpr int copies = row_copies<Score>;

  [[no_unique_address]] Score score{};
  float const* bias = nullptr;  ///< [E] of finite numbers; null: none. The caller's.

  template <score_row R>
    requires score_policy<Score, R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const& t) const {
    using V = typename R::value_type;
    if (bias != nullptr) row.transform([added = bias](int e, V l) { return l + V(added[e]); });
    score(row, t);
  }

  template <score_row R>
    requires score_policy<Score, R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const& t) const {
    score.backward(scores, grad, t);
  }
};

/// The gradient of a bias on the logits: dbias[e] = the sum of dlogits(t, e) over tokens.
///
/// @param dlogits  [T,E] in, from route_backward.
/// @param dbias    [E] out: assigned, or added to.
/// @throws precondition_error unless dbias is [E] and ld >= E.
/// @note  Bitwise the same for any number of threads. Allocates nothing.
/// @cost  Reads T E numbers.
template <class D, class V>
void logit_bias_backward(cpu const& exec, matrix_view<D> dlogits, update how, vector_view<V> dbias,
                         call_site site = call_site::here()) {
  expects(dbias.size() == dlogits.cols() && dlogits.ld() >= dlogits.cols(),
          "logit_bias_backward: dlogits is [T,E], ld >= E, dbias [E]", site,
          {{"E", dlogits.cols()}, {"ld", dlogits.ld()}, {"size", dbias.size()}});
  exec.split(dlogits.cols(), 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t e = first; e < last; ++e) {
      double sum = how == update::add ? static_cast<double>(dbias[e]) : 0;
      for (std::int64_t t = 0; t < dlogits.rows(); ++t) sum += static_cast<double>(dlogits(t, e));
      dbias[e] = static_cast<V>(sum);
    }
  });
}

static_assert(select_policy<biased<top_k<8>>, array_row<float>>);

}  // namespace moe::inline MOE_ABI
