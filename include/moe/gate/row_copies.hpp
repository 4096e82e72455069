// How many copies of its row a policy makes in one call.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// Row copies that a policy makes in one call: P::copies, or 0 where it declares none.
template <class P>
inline constexpr int row_copies = [] {
  if constexpr (requires { P::copies; })
    return static_cast<int>(P::copies);
  else
    return 0;
}();

}  // namespace moe::inline MOE_ABI
