// Zeroing the padding of a table's rows, in some blocks of a kernel that writes the others.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/chunk.hpp>
#include <moe/dispatch/detail/slices.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// The first `blocks` blocks of a launch look for padding; whether there is any, only the device knows.
struct padding {
  static constexpr int rows_of_unit = 8;

  std::int32_t const* pair_of;
  table_counts const* counts;
  std::int64_t max_rows;
  slices cut;
  int blocks;

  /// @param processors  Of the device: each has 2 blocks at most to do this, which fill it when there is
  ///                    much padding, and cost little when there is none. A guess, never timed.
  template <class S>
  padding(routing_table const& table, matrix_view<S> rows, int vector, int threads, int processors)
      : pair_of(table.pair_of),
        counts(table.counts),
        max_rows(table.max_rows),
        cut(slice(table.max_rows / rows_of_unit, rows.cols(), vector * warp_size,
                  16 * std::int64_t(processors))) {
    std::int64_t const units = (max_rows + rows_of_unit - 1) / rows_of_unit * cut.of_row;
    std::int64_t const wanted = blocks_for(units, threads / warp_size);
    blocks = static_cast<int>(wanted < 2 * processors ? wanted : 2 * processors);
  }

  /// @tparam Vector  Elements of a store.
  template <int Vector, thread_block B, class S>
  MOE_HOST_DEVICE void clear(B& b, matrix_view<S> rows, bool streaming) const {
    std::int64_t const used = counts->rows < max_rows ? counts->rows : max_rows;
    if (used == counts->kept) return;
    int const lane = b.thread() % warp_size;
    int const warps = b.threads() / warp_size;
    std::int64_t const units = (used + rows_of_unit - 1) / rows_of_unit * cut.of_row;
    for (std::int64_t u = std::int64_t(b.block()) * warps + b.thread() / warp_size; u < units;
         u += std::int64_t(blocks) * warps) {
      auto const [unit_row, first, last] = cut.of(static_cast<std::uint32_t>(u), rows.cols());
      std::int64_t const row = unit_row * rows_of_unit;
      bool const mine = lane < rows_of_unit && row + lane < used && pair_of[row + lane] < 0;
      std::uint32_t const empty = b.ballot(all_lanes, mine);
      for (int i = 0; i < rows_of_unit; ++i) {
        if ((empty >> i & 1u) == 0) continue;
        for (std::int64_t c = first + lane * Vector; c < last; c += warp_size * Vector)
          store(rows.row(row + i) + c, chunk<S, Vector>{}, streaming);
      }
    }
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
