// Select policies: which experts a token goes to.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/score_row.hpp>

namespace moe::inline MOE_ABI {

/// The k highest keys, best first, ties to the lower id; k <= MaxK at run time.
template <int MaxK>
class top_k {
 public:
  static constexpr int max_k = MaxK;

  constexpr top_k() noexcept = default;
  /// @throws precondition_error unless 1 <= k <= MaxK.
  explicit constexpr top_k(int k, call_site site = call_site::here()) : k_(k) {
    expects(k >= 1 && k <= MaxK, "top_k: 1 <= k <= MaxK", site, {{"k", k}, {"MaxK", MaxK}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept { return k_; }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<MaxK, typename R::value_type>& chosen,
                                            token const&) const {
    chosen.k = k_;
    for (int j = 0; j < k_; ++j) chosen.expert[j] = keys.pop_max(0, keys.size()).expert;
  }

 private:
  int k_ = MaxK;
};

static_assert(select_policy<top_k<2>, array_row<float>>);
static_assert(select_policy<top_k<max_choices>, array_row<double>>);

}  // namespace moe::inline MOE_ABI
