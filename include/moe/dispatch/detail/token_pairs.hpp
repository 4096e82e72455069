// What the kernels of dispatch and combine read of a routing table: the pairs of a token.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// The pairs of token t are [first, first + count), count <= K <= 16. Whatever the arrays contain, no
/// pair is beyond `limit`.
struct token_pairs {
  token_pairs(routing_table const& table, std::int64_t most) noexcept
      : row_of(table.row_of),
        token_begin(table.token_begin),
        T(table.T),
        limit(most),
        max_rows(table.max_rows),
        K(table.K) {}

  std::int32_t const* row_of;
  std::int32_t const* token_begin;  ///< Null = K pairs each.
  std::int64_t T;
  std::int64_t limit;  ///< Pairs that all arrays of pairs have room for.
  std::int64_t max_rows;
  int K;

  struct range {
    std::int64_t first;
    int count;
  };

  MOE_HOST_DEVICE range of(std::int64_t t) const noexcept {
    if (token_begin == nullptr) return {t * K, K};
    auto const within = [](std::int64_t low, std::int64_t x, std::int64_t high) {
      return x < low ? low : x > high ? high : x;
    };
    std::int64_t const first = within(0, token_begin[t], limit);
    std::int64_t const room = limit - first < K ? limit - first : K;
    return {first, static_cast<int>(within(0, token_begin[t + 1] - first, room))};
  }
};

/// One pair of a token, in the lane of that number; a lane beyond the last pair has no row.
template <class A>
struct lane_pair {
  token_pairs::range all;
  std::int32_t row = dropped_row;  ///< Below max_rows, whatever the table contains.
  A weight = 1;

  /// @param weights  One for each pair, or null = 1.
  MOE_HOST_DEVICE lane_pair(int lane, token_pairs const& pairs, std::int64_t t, A const* weights)
      : all(pairs.of(t)) {
    if (lane >= all.count) return;
    std::int32_t const r = pairs.row_of[all.first + lane];
    if (r < pairs.max_rows) row = r;
    if (weights != nullptr) weight = weights[all.first + lane];
  }

  /// What the pair adds to its token: a row, or the token itself if it is at a copy expert and there
  /// are tokens; null if nothing.
  template <class S>
  MOE_HOST_DEVICE S const* addend(matrix_view<S const> rows, matrix_view<S const> tokens,
                                  std::int64_t t) const noexcept {
    if (row >= 0) return rows.row(row);
    bool const copy = row == no_row(expert_kind::copy) && !tokens.absent();
    return copy ? tokens.row(t) : nullptr;
  }
};

/// The pointer that a lane gives.
template <thread_block B, class T>
MOE_HOST_DEVICE T* shuffle_pointer(B& b, T* mine, int lane) {
  auto const bits = static_cast<std::uint64_t>(reinterpret_cast<std::uintptr_t>(mine));
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(b.shuffle(all_lanes, bits, lane)));
}

/// The number of the lowest bit of a mask that is not 0.
MOE_HOST_DEVICE inline int lowest_lane(std::uint32_t lanes) noexcept {
  return count_lanes((lanes & (~lanes + 1u)) - 1u);
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
