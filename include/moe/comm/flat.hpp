// The flat strategy: every rank sends to every other.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// R (R - 1) messages, no copies but of what a rank keeps: the best for large messages.
struct flat {
  constexpr int hops() const noexcept { return 1; }
  constexpr int holder(topology const&, int, int, int destination) const noexcept {
    return destination;
  }
};
static_assert(exchange_path<flat>);

}  // namespace moe::inline MOE_ABI
