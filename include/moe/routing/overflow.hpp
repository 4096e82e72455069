// Which pairs an expert keeps when more want it than it may take: priorities and their selection.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

/// What an overflow rule of a user sees of a pair.
template <class V>
struct routed_pair {
  moe::token token;  ///< Its id, seed, step; row = t.
  int choice = 0;    ///< j, from 0.
  int expert = 0;    ///< Logical.
  V weight = 0;
  V score = 0;  ///< The routing's score, or its weight where no scores are kept.
};

namespace detail {

/// Sorts first by priority, NaN as -inf, then by falling rank: the greatest keys are to be kept.
/// Different ranks make different keys, so that every way of selecting gives the same pairs.
MOE_HOST_DEVICE constexpr std::uint64_t priority_key(float priority, std::uint32_t rank) noexcept {
  std::uint32_t const bits = ordered_bits(priority);
  constexpr std::uint32_t least = 0x007fffff;  // ordered_bits(-inf)
  return static_cast<std::uint64_t>(bits < least ? least : bits) << 32 | ~rank;
}
MOE_HOST_DEVICE constexpr std::uint32_t rank_of(std::uint64_t key) noexcept {
  return ~static_cast<std::uint32_t>(key);
}

/// slots[rank] = the number of pairs kept before it, or -1 if `rank` is not among the `keep`
/// greatest keys. Reorders the keys. O(n) on average.
inline void select_slots(std::uint64_t* keys, std::int64_t n, std::int64_t keep,
                         std::int32_t* slots) noexcept {
  std::nth_element(keys, keys + keep, keys + n,
                   [](std::uint64_t a, std::uint64_t b) { return a > b; });
  for (std::int64_t i = 0; i < n; ++i) slots[rank_of(keys[i])] = i < keep ? 0 : -1;
  std::int32_t next = 0;
  for (std::int64_t i = 0; i < n; ++i)
    if (slots[i] == 0) slots[i] = next++;
}

/// Stable counting sort of n (key << 32 | index) words by their upper half, lowest key first.
/// @param words  [n] in and out. @param other  [n] room.
inline void sort_by_upper_half(std::uint64_t* words, std::uint64_t* other,
                               std::int64_t n) noexcept {
  constexpr int digits = 4, values = 256;
  std::uint32_t count[digits][values] = {};
  for (std::int64_t i = 0; i < n; ++i)
    for (int d = 0; d < digits; ++d) ++count[d][words[i] >> (32 + 8 * d) & 255];
  // An even number of digits leaves the result where the input was.
  for (int d = 0; d < digits; ++d) {
    std::uint32_t next = 0;
    for (std::uint32_t& c : count[d]) {
      std::uint32_t const here = c;
      c = next;
      next += here;
    }
    for (std::int64_t i = 0; i < n; ++i)
      other[count[d][words[i] >> (32 + 8 * d) & 255]++] = words[i];
    std::swap(words, other);
  }
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
