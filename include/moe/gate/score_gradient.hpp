// The gradients of losses with respect to a gate's scores.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Gradient of losses with respect to the scores themselves, past the weights. All parts optional.
template <class V>
struct score_gradient {
  vector_view<V const> expert{};  ///< [E]: that of every live token's score of an expert.
  /// Whether `expert` reaches masked tokens, too (DeepSpeed's loss averages over them).
  bool reaches_masked = false;
  matrix_view<V const> token{};  ///< [T,E]: added to it, token by token, masked ones included.
};

}  // namespace moe::inline MOE_ABI
