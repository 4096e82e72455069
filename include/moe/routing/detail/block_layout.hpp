// The middle of build_table as one block does it: from the pairs of each group to segments. Private to
// build_table.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/routing/detail/block_sums.hpp>
#include <moe/routing/detail/group_counters.hpp>
#include <moe/routing/detail/table_job.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// A thread's part of table_counts.
struct layout_sums {
  std::uint32_t kept = 0, beyond = 0, dropped = 0, hidden = 0, uncomputed = 0;
  std::uint32_t capacity = 0, rows = 0;  ///< The same in every thread.
};

/// The share of `pairs` pairs that the replica-th of n replicas takes. Division is slow.
MOE_HOST_DEVICE constexpr std::uint32_t share_of(std::uint32_t pairs, std::uint32_t replica,
                                                 std::uint32_t n) noexcept {
  return n == 1 ? pairs : (pairs - replica + n - 1) / n;
}

/// The segment of a group's replica-th replica.
MOE_HOST_DEVICE inline std::uint32_t segment_of(table_job const& job, std::uint32_t e,
                                                std::uint32_t s, std::uint32_t replica) noexcept {
  auto const p =
      static_cast<std::uint32_t>(job.map.replica(static_cast<int>(e), static_cast<int>(replica)));
  return p * job.sources + s;
}

/// job.used = 0. Gives whether the map has a replica for each visible computed expert, and none for two.
/// Ends with sync(). `used` counts the names of a physical expert by integer atomics: which comes
/// first makes no difference.
template <int Threads, thread_block B>
MOE_HOST_DEVICE inline bool prepare_segments(B& b, scan_room& room, table_job const& job) {
  auto const thread = static_cast<std::uint32_t>(b.thread());
  auto const clear = [&] {
    for (std::uint32_t q = thread; q < job.segments; q += Threads) job.used[q] = 0;
    b.sync();
  };
  clear();
  if (job.map.physical_begin == nullptr) return true;
  std::uint32_t const P = job.segments / job.sources;
  bool sound = job.map.physical_begin[0] == 0;
  for (std::uint32_t e = thread; e < job.E; e += Threads) {
    int const id = static_cast<int>(e);
    std::int32_t const i0 = job.map.physical_begin[e], i1 = job.map.physical_begin[e + 1];
    if (i0 < 0 || i0 > i1 || i1 > static_cast<std::int32_t>(P) ||
        (i0 == i1 && job.map.is_visible(id) && job.map.kind_of(id) == expert_kind::computed)) {
      sound = false;
      continue;
    }
    for (std::int32_t i = i0; i < i1; ++i) {
      auto const p = static_cast<std::uint32_t>(job.map.physical[i]);
      sound = p < P && b.atomic_add(job.used + p, 1) == 0 && sound;
    }
  }
  std::uint32_t const broken = highest_of_block<Threads>(b, room, sound ? 0u : 1u);
  clear();
  return broken == 0;
}

/// Writes wanted, and what of it goes to no row.
template <int Threads, thread_block B>
MOE_HOST_DEVICE inline void write_wanted(B& b, table_job const& job, std::uint32_t const* total,
                                         bool refused, layout_sums& sums) {
  for (auto e = static_cast<std::uint32_t>(b.thread()); e < job.E; e += Threads) {
    std::uint32_t wanted = 0;
    for (std::uint32_t s = 0; s < job.sources && !refused; ++s)
      wanted += total[e * job.sources + s];
    bool const visible = job.map.is_visible(static_cast<int>(e));
    if (!visible) sums.hidden += wanted;
    if (visible && job.map.kind_of(static_cast<int>(e)) != expert_kind::computed)
      sums.uncomputed += wanted;
    job.wanted[e] = visible ? static_cast<std::int32_t>(wanted) : 0;
  }
}

/// The capacity, given what each group wants.
template <bool Mapped, int Threads, thread_block B>
MOE_HOST_DEVICE inline std::uint32_t capacity_of_block(B& b, scan_room& room, table_job const& job,
                                                       std::uint32_t const* total, bool refused) {
  if (refused) return 0;
  if (!job.capacity.by_load) return job.capacity.rows;
  std::uint32_t most = 0;
  for (auto g = static_cast<std::uint32_t>(b.thread()); g < job.groups; g += Threads) {
    std::uint32_t const n = job.replicas(static_cast<int>(job.expert_of(g)));
    std::uint32_t const load = n == 0 ? 0u : Mapped ? share_of(total[g], 0, n) : total[g];
    most = load > most ? load : most;
  }
  return job.capacity.of(highest_of_block<Threads>(b, room, most));
}

/// For maps with replicas: job.used = what each segment is to take; and for overflow by priority, what
/// later launches read of the groups. Ends with sync().
template <int Threads, thread_block B>
MOE_HOST_DEVICE inline void deal_out_groups(B& b, scan_room& room, table_job const& job,
                                            std::uint32_t const* total, bool refused,
                                            layout_sums& sums) {
  std::uint32_t keys = 0;
  int turn = 0;
  for (std::uint32_t g0 = 0; g0 < job.groups; g0 += Threads) {
    std::uint32_t const g = g0 + static_cast<std::uint32_t>(b.thread());
    std::uint32_t load = 0, keep = 0, n = 0;
    if (g < job.groups && !refused) {
      std::uint32_t const e = job.expert_of(g), s = g - e * job.sources;
      n = job.replicas(static_cast<int>(e));
      load = total[g];
      std::uint64_t const most = std::uint64_t{n} * sums.capacity;
      keep = load < most ? load : static_cast<std::uint32_t>(most);
      for (std::uint32_t r = 0; r < n; ++r)
        job.used[segment_of(job, e, s, r)] = static_cast<std::int32_t>(share_of(keep, r, n));
      if (n > 0) sums.dropped += load - keep;
    }
    if (job.keys == nullptr) continue;
    bool const full = n > 0 && keep < load;
    block_sum const sum = scan_block<Threads>(b, room, turn++, full ? load : 0u);
    if (g < job.groups) {
      job.load[g] = load;
      job.keep[g] = keep;
      job.keys_of[g] = full ? keys + sum.before : table_job::not_full;
    }
    keys += sum.all;
  }
  b.sync();
}

/// Sets the rows [row0, row1) of each lane to -1.
template <thread_block B>
MOE_HOST_DEVICE inline void pad_rows(B& b, std::int32_t* pair_of, std::uint32_t row0,
                                     std::uint32_t row1) {
  std::uint32_t unfinished = b.ballot(all_lanes, row0 < row1);
  for (int lane = 0; unfinished != 0; ++lane, unfinished >>= 1) {
    if ((unfinished & 1u) == 0) continue;
    std::uint32_t const first = b.shuffle(all_lanes, row0, lane);
    std::uint32_t const last = b.shuffle(all_lanes, row1, lane);
    for (std::uint32_t r = first + static_cast<std::uint32_t>(b.thread() % warp_size); r < last;
         r += warp_size)
      pair_of[r] = -1;
  }
}

/// Gives each segment its rows, and pads them.
///
/// Mapped: of job.used, which one block alone has made. Else of total, in every block of the launch,
/// which share the padding; start becomes the row of the block's next pair of a group, total the
/// end of the group. Block 0 writes the table.
template <bool Mapped, int Threads, thread_block B>
MOE_HOST_DEVICE inline void lay_out_segments(B& b, scan_room& room, table_job const& job,
                                             counter_view const& view, bool refused,
                                             layout_sums& sums) {
  bool const writes = b.block() == 0;
  bool const padded = job.rows == layout::padded;
  std::uint32_t const align = job.rows == layout::aligned ? job.align : 1;
  int const warp = b.thread() / warp_size;
  std::uint32_t row = 0;
  int turn = 0;
  for (std::uint32_t q0 = 0; q0 < job.segments; q0 += Threads) {
    std::uint32_t const q = q0 + static_cast<std::uint32_t>(b.thread());
    std::uint32_t want = 0;
    if constexpr (Mapped) {
      if (q < job.segments) want = static_cast<std::uint32_t>(job.used[q]);
    } else if (q < job.groups && !refused) {
      std::uint32_t const load = view.total[q];
      if (job.replicas(static_cast<int>(job.expert_of(q))) != 0) {
        want = load < sums.capacity ? load : sums.capacity;
        sums.dropped += load - want;
      }
    }
    std::uint32_t rows = padded && want < sums.capacity ? sums.capacity : want;
    if (align > 1) {
      rows = (rows + align - 1) / align * align;
      rows = rows < most_rows ? rows : most_rows;
    }
    block_sum const sum = scan_block<Threads>(b, room, turn++, q < job.segments ? rows : 0u);
    std::uint32_t first = add_rows(row, sum.before), next = add_rows(first, rows);
    first = first < job.max_rows ? first : job.max_rows;
    next = next < job.max_rows ? next : job.max_rows;
    std::uint32_t const fit = want < job.max_rows - first ? want : job.max_rows - first;
    if (q < job.segments) {
      sums.kept += fit;
      sums.beyond += want - fit;
      if (writes) {
        job.begin[q] = static_cast<std::int32_t>(first);
        job.used[q] = static_cast<std::int32_t>(fit);
      }
      if (!Mapped && q < job.groups) {
        view.start[q] += first;
        view.total[q] = first + fit;
      }
    }
    if (job.rows != layout::packed &&
        (static_cast<int>(q0 / warp_size) + warp) % b.blocks() == b.block())
      pad_rows(b, job.pair_of, q < job.segments ? first + fit : 0u, q < job.segments ? next : 0u);
    row = add_rows(row, sum.all);
  }
  sums.rows = row < job.max_rows ? row : job.max_rows;
  if (writes && b.thread() == 0) job.begin[job.segments] = static_cast<std::int32_t>(sums.rows);
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
