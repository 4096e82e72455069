// The middle of build_table: from loads and the capacity to segments. Private to build_table.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/routing/detail/table_build.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// keep; table.used, for now as if there were no max_rows; counts.dropped.
template <class V>
void keep_pairs(table_build<V>& b) {
  routing_table const& table = b.table;
  auto const C = static_cast<std::uint64_t>(table.counts->capacity);
  std::uint32_t const* const load = b.load;
  std::uint32_t* const keep = b.keep;
  std::uint32_t lost = 0;  // of all pairs, which are fewer than 2^31
  for (std::int64_t g = 0; g < b.groups; ++g) {
    auto const most = static_cast<std::uint64_t>(b.replicas[g]) * C;
    keep[g] = static_cast<std::uint32_t>(std::min<std::uint64_t>(load[g], most));
    lost += load[g] - keep[g];
  }
  table.counts->dropped =
      static_cast<std::int64_t>(lost) - table.counts->hidden - table.counts->uncomputed;

  if (b.in_place) {
    std::copy_n(keep, b.groups, table.used);
    std::fill(table.used + b.groups, table.used + table.segments(), 0);
    return;
  }
  std::fill_n(table.used, table.segments(), 0);
  for (std::int64_t g = 0; g < b.groups; ++g)
    for (int r = 0; r < b.replicas[g]; ++r)
      table.used[b.segment(g, r)] = static_cast<std::int32_t>(b.share(keep[g], r, b.replicas[g]));
}

/// Gives each segment its rows: begin and used; counts.
template <class V>
void lay_out_rows(table_build<V>& b) {
  keep_pairs(b);
  routing_table const& table = b.table;
  table_counts& counts = *table.counts;
  std::int64_t const segments = table.segments(), max_rows = table.max_rows;
  std::int64_t const padded = b.rules.rows == layout::padded ? counts.capacity : 0;
  std::int64_t const align = b.rules.rows == layout::aligned ? b.rules.align : 1;
  std::int64_t row = 0, kept = 0, wanted = 0;
  for (std::int64_t q = 0; q < segments; ++q) {
    std::int64_t const first = std::min(row, max_rows);
    std::int64_t const want = table.used[q];
    std::int64_t const fit = std::min(want, max_rows - first);
    table.begin[q] = static_cast<std::int32_t>(first);
    table.used[q] = static_cast<std::int32_t>(fit);
    kept += fit;
    wanted += want;
    std::int64_t const rows = std::max(want, padded);
    row += align == 1 ? rows : (rows + align - 1) / align * align;
  }
  counts.kept = kept;
  counts.beyond_max_rows = wanted - kept;
  counts.rows = std::min(row, max_rows);
  table.begin[segments] = static_cast<std::int32_t>(counts.rows);
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
