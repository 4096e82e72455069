// Top-p selection: as many experts as it takes to reach a share of the scores.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

/// The fewest experts of highest keys whose keys add up to p of the sum of all, but k at most; the other
/// choices are -1. At least one expert, if there is a candidate.
///
/// @pre  Keys are not negative: probabilities, or scores of `sigmoid`, `sqrt_softplus`.
/// Source: Huang et al., "Harder tasks need more experts", 2024.
/// Example: p = 0.7, k = 3, keys {0.5, 0.125, 0.25, 0.125} give {0, 2, -1}; p = 0.5 gives {0, -1, -1}.
template <int MaxK>
class top_p {
 public:
  static constexpr int max_k = MaxK;

  constexpr top_p() noexcept = default;
  /// @param p  The share. @param k  The most experts of a token.
  /// @throws precondition_error unless 0 < p <= 1 and 1 <= k <= MaxK.
  explicit constexpr top_p(float p, int k = MaxK, call_site site = call_site::here())
      : p_(p), k_(k) {
    expects(p > 0 && p <= 1 && k >= 1 && k <= MaxK, "top_p: 0 < p <= 1, 1 <= k <= MaxK", site,
            {{"p", p}, {"k", k}, {"MaxK", MaxK}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept { return k_; }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<MaxK, typename R::value_type>& chosen,
                                            token const&) const {
    using V = typename R::value_type;
    V const enough = V(p_) * keys.sum([](int, V s) { return where(is_candidate(s), s, V(0)); });
    V reached = 0;
    chosen.k = k_;
    chosen.each([&](int j) {
      bool const wanted = j == 0 || reached < enough;
      // Popped in any case: lanes go the same way.
      auto const best = keys.pop_max(0, keys.size());
      chosen.expert[j] = wanted ? best.expert : -1;
      reached += where(is_candidate(best.key), best.key, V(0));
    });
  }

 private:
  float p_ = 1;
  int k_ = MaxK;
};

static_assert(select_policy<top_p<4>, array_row<float>>);

}  // namespace moe::inline MOE_ABI
