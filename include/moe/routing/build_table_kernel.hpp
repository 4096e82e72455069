// The body of the kernel that builds a routing table: counts pairs, lays out segments, places pairs.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/detail/block_layout.hpp>
#include <moe/routing/detail/group_counters.hpp>
#include <moe/routing/detail/table_job.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// Stands for the priority of `build_table_kernel` where segment g is group g and experts keep their
/// first pairs.
struct in_place {};

/// The passes of build_table, one block for each chunk of pairs: those that job.phases names. Private to
/// build_table.cuh, but for its name.
///
/// A warp numbers the pairs of its part of a tile, group by group (match_any); the block adds up what
/// the warps before it have; and each block what the chunks before it have. So a pair's number is the
/// count of those before it, as in the loop of one thread, whatever runs when. If a block has all
/// pairs in one tile, they are read once and stay in registers.
/// @tparam MaxGroups  Groups whose counters shared memory has room for; 0: they lie in scratch.
/// @tparam Priority   in_place: each block lays out all segments. Else float(i, t, j, e), for full
///                    groups of job.keys; segments are laid out by one block, in the table itself, as
///                    the map says.
template <int MaxGroups, int Threads, class Priority>
struct build_table_kernel {
  static constexpr int threads = Threads;
  static constexpr bool mapped = !std::is_same_v<Priority, in_place>;
  static constexpr int items = detail::items_of<Threads>;
  static constexpr std::uint32_t tile = detail::tile_of<Threads>;

  struct shared {
    [[no_unique_address]] detail::counter_room<MaxGroups, Threads> counters;
    detail::scan_room scan;
    std::uint32_t met[detail::met_columns][Threads / warp_size];
  };

  [[no_unique_address]] Priority priority{};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, detail::table_job job) const {
    using namespace detail;
    counter_view const view = s.counters.view(
        job.groups, job.counters + static_cast<std::size_t>(b.block()) * job.counter_bytes);
    group_counters<B, Threads> counters(b, view, job.groups);
    bool const counts = (job.phases & phase_count) != 0,
               lays_out = (job.phases & phase_lay_out) != 0,
               places = (job.phases & phase_place) != 0;
    b.wait_for_previous();
    b.let_next_start();

    chunk_walk<B> walk(b, job, counters);
    if (counts) {
      count(b, s, job, view, counters, walk);
      if (!lays_out) {
        auto* const own = job.counted + std::int64_t{job.stride} * b.block();
        for (auto x = static_cast<std::uint32_t>(b.thread()); x < job.stride; x += Threads)
          own[x] = static_cast<std::int32_t>(view.total[x]);
        return;
      }
    } else if (lays_out || places) {
      sum_chunks<Threads>(b, view, job.counted, job.counted_chunks,
                          static_cast<std::uint32_t>(b.block()) * job.counted_of_block, job.stride,
                          job.groups);
    }

    bool refused = false;
    layout_sums sums;
    if (lays_out) {
      refused = job.token_begin != nullptr && view.total[job.groups + met_unsound] != 0;
      if constexpr (mapped) {
        bool const sound =
            job.map.physical_begin == nullptr || is_sound_map<Threads>(b, s.scan, job);
        refused = refused || !sound;
        if (b.thread() == 0) *job.refused = refused ? 1 : 0;
      }
      sums.capacity = capacity_of_block<mapped, Threads>(b, s.scan, job, view.total, refused);
      if (b.block() == 0) write_wanted<Threads>(b, job, view.total, refused, sums);
      if constexpr (mapped) {
        if (job.map.physical_begin == nullptr) {  // is_sound_map has done so
          for (auto q = static_cast<std::uint32_t>(b.thread()); q < job.segments; q += Threads)
            job.used[q] = 0;
          b.sync();
        }
        deal_out_groups<Threads>(b, s.scan, job, view.total, refused, sums);
      }
      lay_out_segments<mapped, Threads>(b, s.scan, job, view, refused, sums);
    } else {
      refused = *job.refused != 0;
      sums.rows = static_cast<std::uint32_t>(job.begin[job.segments]);
    }
    if (places) place(b, job, view, counters, walk, refused, sums.rows, counts);
    if (lays_out && b.block() == 0) write_counts(b, s, job, view, refused, sums);
  }

 private:
  /// The tiles of a block's chunk, one after the other.
  template <class B>
  struct chunk_walk {
    B& b;
    detail::table_job const& job;
    detail::group_counters<B, Threads> const& counters;

    MOE_HOST_DEVICE chunk_walk(B& block, detail::table_job const& of,
                               detail::group_counters<B, Threads> const& by)
        : b(block), job(of), counters(by) {
      begin();
      load();
    }

    std::uint32_t at = 0, last = 0, tile_last = 0;
    int rounds = 0;
    detail::pair_tile<items> pairs;
    std::uint32_t rank[items];

    MOE_HOST_DEVICE std::uint32_t chunk_first() const {
      auto const x = std::uint64_t{job.chunk} * static_cast<std::uint32_t>(b.block());
      return x < job.positions ? static_cast<std::uint32_t>(x) : job.positions;
    }
    /// Goes to the first tile.
    MOE_HOST_DEVICE void begin() {
      at = chunk_first();
      last = job.chunk < job.positions - at ? at + job.chunk : job.positions;
    }
    MOE_HOST_DEVICE bool one_tile() const { return last - chunk_first() <= tile; }
    MOE_HOST_DEVICE void load() {
      std::uint32_t const n = last - at < tile ? last - at : tile;
      rounds = counters.rounds(n);
      detail::load_pairs<items>(job, at + counters.first(rounds), at + n, rounds, pairs);
    }
    /// Whether there is another tile; if so, goes there.
    MOE_HOST_DEVICE bool next() {
      if (last - at <= tile) return false;
      at += tile;
      return true;
    }
  };

  /// total = the pairs of the block's chunk by group, and by met_column; start = 0. Ends with sync().
  template <class B>
  MOE_HOST_DEVICE static void count(B& b, shared& s, detail::table_job const& job,
                                    detail::counter_view const& view,
                                    detail::group_counters<B, Threads>& counters,
                                    chunk_walk<B>& walk) {
    using namespace detail;
    std::uint32_t met[met_columns] = {};
    for (bool first = true;; first = false) {
      counters.clear();
      counters.rank(walk.pairs.group, walk.rounds, walk.rank);
      add_met(b, walk.pairs.group, met);
      if (counters.lane() == 0) {
        MOE_UNROLL
        for (int v = 0; v < met_columns; ++v) s.met[v][counters.warp()] = met[v];
      }
      b.sync();
      counters.scan([&](std::uint32_t g, std::uint32_t, std::uint32_t n) {
        view.total[g] = first ? n : view.total[g] + n;
        if (first) view.start[g] = 0;
      });
      // The last threads have the least to do in scan.
      int const v = Threads - 1 - b.thread();
      if (v < met_columns) {
        std::uint32_t sum = 0;
        for (int w = 0; w < Threads / warp_size; ++w) sum += s.met[v][w];
        view.total[job.groups + static_cast<std::uint32_t>(v)] = sum;
      }
      b.sync();
      if (!walk.next()) return;
      walk.load();
    }
  }

  /// Adds what the warp's pairs without a group are counted as. Often there are none.
  template <class B>
  MOE_HOST_DEVICE static void add_met(B& b, std::int32_t const (&group)[items],
                                      std::uint32_t (&met)[detail::met_columns]) {
    using namespace detail;
    MOE_UNROLL
    for (int k = 0; k < items; ++k) {
      std::int32_t const fate = group[k];
      if (b.ballot(all_lanes, fate < dead && fate != no_pair) == 0) continue;
      auto const lanes_with = [&](bool holds) {
        return static_cast<std::uint32_t>(count_lanes(b.ballot(all_lanes, holds)));
      };
      met[met_missing] += lanes_with(fate == dead_missing);
      met[met_out_of_range] += lanes_with(fate == dead_out_of_range);
      met[met_masked] += lanes_with(fate == dead_masked || fate == no_pair_masked);
      met[met_invalid] += lanes_with(fate == dead_invalid);
      met[met_unsound] += lanes_with(fate == no_pair_unsound);
    }
  }

  /// row_of and pair_of of the block's chunk, and padding after the last row. `counted`: the counting
  /// of a single tile is there still.
  template <class B>
  MOE_HOST_DEVICE void place(B& b, detail::table_job const& job, detail::counter_view const& view,
                             detail::group_counters<B, Threads>& counters, chunk_walk<B>& walk,
                             bool refused, std::uint32_t rows, bool counted) const {
    using namespace detail;
    std::uint32_t const stride = static_cast<std::uint32_t>(b.blocks()) * Threads;
    std::uint32_t r = rows + static_cast<std::uint32_t>(b.block() * Threads + b.thread());
    for (; r < job.max_rows; r += stride) job.pair_of[r] = -1;
    if (refused) {
      std::uint32_t const end = job.pairs() < walk.last ? job.pairs() : walk.last;
      for (std::uint32_t i = walk.chunk_first() + static_cast<std::uint32_t>(b.thread()); i < end;
           i += Threads)
        job.row_of[i] = dropped_row;
      return;
    }
    if (counted && walk.one_tile()) {
      place_tile(job, view, counters, walk);
      return;
    }
    if (counted) {
      walk.begin();
      walk.load();
    }
    for (bool first = true;; first = false) {
      counters.clear();
      counters.rank(walk.pairs.group, walk.rounds, walk.rank);
      b.sync();
      counters.scan([&](std::uint32_t g, std::uint32_t tile_before, std::uint32_t) {
        if (!first) view.start[g] += tile_before;
      });
      b.sync();
      place_tile(job, view, counters, walk);
      if (!walk.next()) return;
      walk.load();
    }
  }

  template <class B>
  MOE_HOST_DEVICE void place_tile(detail::table_job const& job, detail::counter_view const& view,
                                  detail::group_counters<B, Threads> const& counters,
                                  chunk_walk<B> const& walk) const {
    using namespace detail;
    MOE_UNROLL
    for (int k = 0; k < items; ++k) {
      if (k >= walk.rounds || walk.pairs.group[k] <= no_pair) continue;
      std::uint32_t const i = walk.pairs.pair[k];
      std::int32_t row = dropped_row;
      if (walk.pairs.group[k] >= 0) {
        auto const g = static_cast<std::uint32_t>(walk.pairs.group[k]);
        std::uint32_t const rank = view.start[g] + counters.before(g) + walk.rank[k];
        if constexpr (mapped) {
          auto const x =
              walk.at + counters.first(walk.rounds) + static_cast<std::uint32_t>(k * warp_size);
          row = row_of_rank(job, g, rank, i, x);
        } else {
          row = rank < view.total[g] ? static_cast<std::int32_t>(rank)
                                     : job.without_row(static_cast<int>(job.expert_of(g)));
        }
        if (row >= 0 && !waits_for_slot(job, g)) job.pair_of[row] = static_cast<std::int32_t>(i);
      }
      job.row_of[i] = row;
    }
  }

  /// Whether the pairs of a group get their rows by priority, later.
  MOE_HOST_DEVICE static bool waits_for_slot(detail::table_job const& job, std::uint32_t g) {
    return mapped && job.keys != nullptr && job.keys_of[g] != detail::table_job::not_full;
  }

  /// The row of a pair; or its rank, its key being written, if the group is full.
  MOE_HOST_DEVICE std::int32_t row_of_rank(detail::table_job const& job, std::uint32_t g,
                                           std::uint32_t rank, std::uint32_t i,
                                           std::uint32_t x) const {
    using namespace detail;
    if (!waits_for_slot(job, g)) return row_of_slot(job, g, rank);
    token_choice const c = at_position(job, x);
    float const p = priority(i, c.t, static_cast<int>(c.j), static_cast<int>(job.expert_of(g)));
    job.keys[job.keys_of[g] + rank] = static_cast<std::uint32_t>(priority_key(p, 0) >> 32);
    return static_cast<std::int32_t>(rank);
  }

  template <class B>
  MOE_HOST_DEVICE static void write_counts(B& b, shared& s, detail::table_job const& job,
                                           detail::counter_view const& view, bool refused,
                                           detail::layout_sums const& sums) {
    using namespace detail;
    int const lane = b.thread() % warp_size, warp = b.thread() / warp_size;
    std::uint32_t const part[met_columns] = {sums.kept, sums.beyond, sums.dropped, sums.hidden,
                                             sums.uncomputed};
    MOE_UNROLL
    for (int v = 0; v < met_columns; ++v) {
      std::uint32_t const n = sum_warp(b, part[v]);
      if (lane == 0) s.met[v][warp] = n;
    }
    b.sync();
    if (warp != 0) return;
    std::uint32_t n = 0;
    if (lane < met_columns)
      for (int w = 0; w < Threads / warp_size; ++w) n += s.met[lane][w];
    std::int64_t sum[met_columns];
    MOE_UNROLL
    for (int v = 0; v < met_columns; ++v) sum[v] = b.shuffle(all_lanes, n, v);
    if (lane != 0) return;
    table_counts counts{};
    if (refused) {
      counts.refused = job.pairs();
    } else {
      std::uint32_t const* const met = view.total + job.groups;
      counts.rows = sums.rows;
      counts.capacity = sums.capacity;
      counts.kept = sum[0];
      counts.beyond_max_rows = sum[1];
      counts.dropped = sum[2];
      counts.hidden = sum[3];
      counts.uncomputed = sum[4];
      counts.missing = met[met_missing];
      counts.out_of_range = met[met_out_of_range];
      counts.masked_tokens = met[met_masked];
      counts.invalid_tokens = met[met_invalid];
    }
    *job.counts = counts;
  }
};

}  // namespace moe::inline MOE_ABI
