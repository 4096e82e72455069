// Select only what is good enough: a threshold before any other selection.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/gate/row_copies.hpp>
#include <moe/gate/select.hpp>

namespace moe::inline MOE_ABI {

/// Select among the experts whose keys are above a threshold; the others' keys become -inf.
///
/// With one expert it decides for each token alone whether it goes there: what Mixture-of-Depths needs to
/// decode, where later tokens are not known. `gate<identity, above<>, as_scored>` on the router's own
/// output r; or on the output of a predictor, whose ids `replayed` then gives to a gate on r.
/// Source: Raposo et al., "Mixture-of-depths", 2024, section 3.5.
template <class Select = top_k<1>>
struct above {
  static constexpr int max_k = Select::max_k;
  static constexpr int copies = row_copies<Select>;

  [[no_unique_address]] Select select{};
  float threshold = 0;

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    keys.transform(
        [least = static_cast<V>(threshold)](int, V s) { return s > least ? s : no_score<V>; });
    select(keys, chosen, t);
  }
};

static_assert(select_policy<above<>, array_row<float>>);

}  // namespace moe::inline MOE_ABI
