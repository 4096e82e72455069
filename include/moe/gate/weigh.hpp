// Weigh policies: how much each chosen expert counts.
// SPDX-License-Identifier: MIT
#pragma once

#include <limits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>

namespace moe::inline MOE_ABI {

/// w[j] = s[expert[j]]: the score as it is (Switch, DeepSpeed top-1, OLMoE).
struct as_scored {
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    using V = typename R::value_type;
    for (int j = 0; j < chosen.k; ++j)
      chosen.weight[j] = chosen.expert[j] < 0 ? V(0) : scores.at(chosen.expert[j]);
  }

  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const&,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    for (int j = 0; j < chosen.k; ++j)
      if (chosen.expert[j] >= 0) dscores.add(chosen.expert[j], dchosen.weight[j]);
  }
};

}  // namespace moe::inline MOE_ABI
