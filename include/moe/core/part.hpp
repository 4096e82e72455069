// Equal parts of a number of things, as nearly as that is possible.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// Things [first, last).
struct part_range {
  std::int64_t first = 0;
  std::int64_t last = 0;

  constexpr std::int64_t size() const noexcept { return last - first; }
  friend constexpr bool operator==(part_range const&, part_range const&) = default;
};

/// Part `index` of n things in `parts` consecutive parts, whose sizes differ by one at most.
/// @pre  n >= 0, 0 <= index < parts, n * parts fits into 64 bits.
constexpr part_range part_of(std::int64_t n, std::int64_t index, std::int64_t parts) noexcept {
  return {n * index / parts, n * (index + 1) / parts};
}

}  // namespace moe::inline MOE_ABI
