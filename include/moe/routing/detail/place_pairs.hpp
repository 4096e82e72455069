// The last passes of build_table: each pair gets its row. Private to build_table.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/execution.hpp>
#include <moe/routing/detail/table_build.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Turns counts into what each chunk's first pair of each group gets: numbers that go on from start.
template <class V>
void start_chunks(table_build<V>& b) {
  std::uint32_t* const start = b.start;
  for (int j = 0; j < b.steps; ++j)
    for (int c = 0; c < b.chunks; ++c) {
      std::uint32_t* const n = b.next(c, j);
      for (std::int64_t g = 0; g < b.groups; ++g) {
        std::uint32_t const here = n[g];
        n[g] = start[g];
        start[g] += here;
      }
    }
}

/// The other direction: pair_of from row_of, -1 at rows without a pair. A pass of its own: a store to
/// pair_of[row] next to ++row of the same group stalls the counting.
template <class V>
void list_pairs(table_build<V> const& b) {
  routing_table const& table = b.table;
  b.for_each_chunk([&](std::int64_t c) {
    std::int64_t const segments = table.segments();
    // Packed segments have no padding between them.
    std::int64_t const last = b.rules.rows == layout::packed ? 0 : segments * (c + 1) / b.chunks;
    for (std::int64_t q = segments * c / b.chunks; q < last; ++q)
      std::fill(table.pair_of + table.begin[q] + table.used[q], table.pair_of + table.begin[q + 1],
                -1);
    std::int64_t const end = table.begin[segments], left = table.max_rows - end;
    std::fill(table.pair_of + end + left * c / b.chunks,
              table.pair_of + end + left * (c + 1) / b.chunks, -1);

    std::int64_t const end_pair = table.first_pair(b.walk.first_token(c + 1));
    std::int32_t nowhere_else = 0;
    std::int32_t const* const row_of = table.row_of;
    std::int32_t* const pair_of = table.pair_of;
    for (std::int64_t i = table.first_pair(b.walk.first_token(c)); i < end_pair; ++i)
      *(row_of[i] >= 0 ? pair_of + row_of[i] : &nowhere_else) = static_cast<std::int32_t>(i);
  });
}

/// Counters run over rows.
template <class V>
void place_chunk_in_order(table_build<V> const& b, std::int64_t c) {
  std::int32_t* const row_of = b.table.row_of;
  chunk_counts ignored{};
  b.walk_counters(
      c, ignored,
      [=, end = b.end, otherwise = b.without_row](std::uint32_t& counter, std::int64_t g,
                                                  std::int64_t i) {
        std::uint32_t const row = counter++;
        row_of[i] = row < end[g] ? static_cast<std::int32_t>(row) : otherwise[g];
      },
      [=](std::int64_t i0, std::int64_t i1) { std::fill(row_of + i0, row_of + i1, dropped_row); });
}

/// For experts of at most one replica, in one pass: counters run over rows themselves. They may exceed
/// 2^31, never 2^32.
template <class V>
void place_in_order(table_build<V>& b) {
  routing_table const& table = b.table;
  if (b.in_place)
    for (std::int64_t g = 0; g < b.groups; ++g) {
      b.start[g] = static_cast<std::uint32_t>(table.begin[g]);
      b.end[g] = b.start[g] + static_cast<std::uint32_t>(table.used[g]);
    }
  else
    for (std::int64_t g = 0; g < b.groups; ++g) {
      std::int64_t const q = b.replicas[g] > 0 ? b.segment(g, 0) : 0;
      b.start[g] = static_cast<std::uint32_t>(b.replicas[g] > 0 ? table.begin[q] : 0);
      b.end[g] = b.start[g] + static_cast<std::uint32_t>(b.replicas[g] > 0 ? table.used[q] : 0);
    }
  start_chunks(b);
  b.for_each_chunk([&](std::int64_t c) { place_chunk_in_order(b, c); });
}

/// row_of[i] = rank of pair i in its group, for settle; see(g, i, t, j, e, rank) for each.
template <class V, class See>
void rank_pairs(table_build<V>& b, See const& see) {
  std::fill_n(b.start, b.groups, 0u);
  start_chunks(b);
  b.for_each_chunk([&](std::int64_t c) {
    chunk_counts ignored{};
    b.walk.walk(
        c, ignored,
        [&](std::int64_t g, std::int64_t i, std::int64_t t, int j, int e) {
          std::uint32_t const rank = b.next(c, j)[g]++;
          b.table.row_of[i] = static_cast<std::int32_t>(rank);
          see(g, i, t, j, e, rank);
        },
        [](std::int64_t, std::int64_t) {});
  });
}

/// From the ranks in row_of to rows, slot_of(g, rank) being the slot among the pairs that g keeps, or
/// -1; slots go to g's replicas in turn.
template <class V, class SlotOf>
void settle(table_build<V> const& b, SlotOf const& slot_of) {
  routing_table const& table = b.table;
  auto const row_of = [&](std::int64_t g, std::int64_t slot) {
    std::int64_t const n = b.replicas[g];
    int const replica = n == 1 ? 0 : static_cast<int>(slot % n);
    if (n != 1) slot /= n;
    std::int64_t const q = b.segment(g, replica);
    return slot < table.used[q] ? table.begin[q] + static_cast<std::int32_t>(slot) : dropped_row;
  };
  b.for_each_chunk([&](std::int64_t c) {
    chunk_counts ignored{};
    b.walk.walk(
        c, ignored,
        [&](std::int64_t g, std::int64_t i, std::int64_t, int, int) {
          std::int64_t const slot = slot_of(g, static_cast<std::uint32_t>(table.row_of[i]));
          table.row_of[i] = slot < 0 ? b.without_row[g] : row_of(g, slot);
        },
        [&](std::int64_t i0, std::int64_t i1) {
          std::fill(table.row_of + i0, table.row_of + i1, dropped_row);
        });
  });
}

/// The slot by rank alone: a group keeps its first pairs.
template <class V>
auto first_slots(table_build<V> const& b) {
  return [keep = b.keep](std::int64_t g, std::uint32_t rank) {
    return rank < keep[g] ? static_cast<std::int64_t>(rank) : -1;
  };
}

/// Rows by position: a group keeps the first pairs in rank order.
template <class V>
void place_pairs(table_build<V>& b) {
  if (b.one_replica) return place_in_order(b);
  rank_pairs(b, [](std::int64_t, std::int64_t, std::int64_t, int, int, std::uint32_t) {});
  settle(b, first_slots(b));
}

/// Rows by priority(i, t, j, e): a full group keeps the pairs of highest priority.
template <class V, class Priority>
void place_pairs_by(table_build<V>& b, Priority const& priority) {
  if (b.table.counts->dropped == 0) return place_pairs(b);
  constexpr std::uint32_t not_full = 0xffffffffu;
  std::uint32_t* const keys_of = b.end;  // [groups] where its keys start, or not_full
  std::uint32_t full_pairs = 0;
  for (std::int64_t g = 0; g < b.groups; ++g) {
    bool const full = b.replicas[g] > 0 && b.keep[g] < b.load[g];
    keys_of[g] = full ? full_pairs : not_full;
    if (full) full_pairs += b.load[g];
  }
  auto* const keys = b.template take<std::uint64_t>(b.in.pairs());  // [full_pairs]
  auto* const slots = b.template take<std::int32_t>(b.in.pairs());  // [full_pairs]
  rank_pairs(b,
             [&](std::int64_t g, std::int64_t i, std::int64_t t, int j, int e, std::uint32_t rank) {
               if (keys_of[g] != not_full)
                 keys[keys_of[g] + rank] = priority_key(priority(i, t, j, e), rank);
             });
  auto const select = [&](std::int64_t g, int) {
    if (keys_of[g] != not_full)
      select_slots(keys + keys_of[g], b.load[g], b.keep[g], slots + keys_of[g]);
  };
  // Where one chunk holds all tokens, waking other threads costs more than the work.
  (b.chunks == 1 ? cpu{} : b.exec).each(b.groups, select);
  settle(b, [&, first = first_slots(b)](std::int64_t g, std::uint32_t rank) {
    return keys_of[g] != not_full ? std::int64_t{slots[keys_of[g] + rank]} : first(g, rank);
  });
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
