// The body of the kernel that builds a routing table: counts pairs, lays out segments, places pairs.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/detail/block_layout.hpp>
#include <moe/routing/detail/block_sums.hpp>
#include <moe/routing/detail/group_counters.hpp>
#include <moe/routing/detail/table_job.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Instead of a priority: segment g is group g, and experts keep their first pairs.
struct first_come {};

}  // namespace detail

/// The passes of build_table, one block for each chunk of pairs: those that job.phases names. Private to
/// build_table.cuh, but for its name.
///
/// A warp numbers the pairs of its part of a tile, group by group (match_any); the block adds up what
/// the warps before it have; and each block what the chunks before it have. So a pair's number is the
/// count of those before it, as in the loop of one thread, whatever runs when. If a block has all
/// pairs in one tile, they are read once and stay in registers.
/// @tparam MaxGroups  Groups whose counters shared memory has room for; 0: they lie in scratch.
/// @tparam Priority   first_come: each block lays out all segments. Else float(i, t, j, e), for full
///                    groups of job.keys; segments are laid out by one block, in the table itself, as
///                    the map says.
template <int MaxGroups, int Threads, class Priority>
struct build_table_kernel {
  static constexpr int threads = Threads, resident_blocks = 1;
  static constexpr bool mapped = !std::is_same_v<Priority, detail::first_come>;
  static constexpr int items = detail::items_of<Threads>;
  static constexpr std::uint32_t tile = detail::tile_of<Threads>;

  struct shared {
    [[no_unique_address]] detail::counter_room<MaxGroups, Threads> counters;
    detail::scan_room scan;
    std::uint32_t met[detail::met_columns][Threads / warp_size];
  };

  Priority priority{};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, detail::table_job job) const {
    using namespace detail;
    counter_view const view = s.counters.view(
        job.groups, job.counters + static_cast<std::size_t>(b.block()) * job.counter_bytes);
    group_counters<B, Threads> counters(b, view, job.groups);
    if (counters.lane() < met_columns) s.met[counters.lane()][counters.warp()] = 0;
    b.wait_for_previous();
    b.let_next_start();

    bool counting = (job.phases & phase_count) != 0, laid_out = false;
    bool numbered = false;  // the tile is in registers, its pairs' numbers and counters are there
    chunk_walk walk(job, b.block());
    pair_tile<items> pairs;
    std::uint32_t rank[items];
    // Each step stands here once: a GPU fetches instructions about as slowly as it counts few pairs.
    for (;;) {
      if (!numbered) {
        walk.rounds = counters.rounds(walk.tile_last() - walk.at);
        walk.x = walk.at + counters.first(walk.rounds);
        load_pairs<items>(job, walk.x, walk.tile_last(), walk.rounds, pairs);
      }
      if (!counting && !laid_out) {
        if (!lay_out(b, s, job, view, walk)) return;
        laid_out = true;
      }
      if (!numbered) {
        bool const first = walk.at == walk.first;
        counters.clear();
        counters.rank(pairs.group, walk.rounds, rank);
        if (counting) add_met(b, s, pairs.group);
        b.sync();
        counters.scan([&](std::uint32_t g, std::uint32_t tile_before, std::uint32_t n) {
          if (counting) {
            view.total[g] = first ? n : view.total[g] + n;
            view.start[g] = 0;
          } else if (!first) {
            view.start[g] += tile_before;
          }
        });
        if (counting) sum_met(b, s, view.total + job.groups);
        b.sync();
      }
      if (counting) {
        if (walk.next()) continue;
        if ((job.phases & phase_lay_out) == 0) return write_chunk(b, job, view);
        counting = false;
        numbered = walk.at == walk.first;
        walk.at = walk.first;
        continue;
      }
      place_tile(job, view, counters, walk, pairs, rank);
      numbered = false;
      if (!walk.next()) return;
    }
  }

 private:
  /// The tiles of a block's chunk, one after the other.
  struct chunk_walk {
    std::uint32_t first, last, at;  ///< Positions; `at` is the first of the tile.
    int rounds = 0;                 ///< Of each warp in the tile.
    std::uint32_t x = 0;            ///< This lane's first position.

    MOE_HOST_DEVICE chunk_walk(detail::table_job const& job, int block) {
      std::uint64_t const begin = std::uint64_t{job.chunk} * static_cast<std::uint32_t>(block);
      first = begin < job.positions ? static_cast<std::uint32_t>(begin) : job.positions;
      last = job.chunk < job.positions - first ? first + job.chunk : job.positions;
      at = first;
    }
    MOE_HOST_DEVICE std::uint32_t tile_last() const { return last - at < tile ? last : at + tile; }
    /// Whether there is another tile; if so, goes there.
    MOE_HOST_DEVICE bool next() {
      if (last - at <= tile) return false;
      at += tile;
      return true;
    }
  };

  /// Adds to s.met what the warp's pairs without a group are counted as. Often there are none.
  template <class B>
  MOE_HOST_DEVICE static void add_met(B& b, shared& s, std::int32_t const (&group)[items]) {
    using namespace detail;
    static_assert(items * warp_size < 256);
    std::uint32_t counts = 0;  // of the first four, a byte each
    bool unsound = false;
    MOE_UNROLL
    for (int k = 0; k < items; ++k) {
      int const fate = group[k] == no_pair_masked ? int{dead_masked} : group[k];
      if (fate <= dead_missing && fate >= dead_invalid) counts += 1u << 8 * (dead_missing - fate);
      unsound = unsound || fate == no_pair_unsound;
    }
    if (b.ballot(all_lanes, counts != 0 || unsound) == 0) return;
    counts = sum_warp(b, counts);
    bool const any_unsound = b.ballot(all_lanes, unsound) != 0;
    if (b.thread() % warp_size != 0) return;
    int const warp = b.thread() / warp_size;
    MOE_UNROLL
    for (int v = 0; v < met_unsound; ++v) s.met[v][warp] += counts >> 8 * v & 255u;
    if (any_unsound) s.met[met_unsound][warp] = 1;
  }

  /// The last threads, which have the least to do in scan.
  template <class B>
  MOE_HOST_DEVICE static void sum_met(B& b, shared& s, std::uint32_t* columns) {
    int const v = Threads - 1 - b.thread();
    if (v >= detail::met_columns) return;
    std::uint32_t sum = 0;
    for (int w = 0; w < Threads / warp_size; ++w) sum += s.met[v][w];
    columns[v] = sum;
  }

  template <class B>
  MOE_HOST_DEVICE static void write_chunk(B& b, detail::table_job const& job,
                                          detail::counter_view const& view) {
    std::int32_t* const own = job.counted + std::int64_t{job.columns} * b.block();
    for (auto x = static_cast<std::uint32_t>(b.thread()); x < job.columns; x += Threads)
      own[x] = static_cast<std::int32_t>(view.total[x]);
  }

  /// What stands between counting and placing: sums of chunks, segments, counts of the table, padding
  /// after the last row. Gives whether there are pairs to be placed.
  template <class B>
  MOE_HOST_DEVICE static bool lay_out(B& b, shared& s, detail::table_job const& job,
                                      detail::counter_view const& view, chunk_walk const& walk) {
    using namespace detail;
    if ((job.phases & phase_count) == 0)
      sum_chunks<Threads>(b, view, job.counted, job.counted_chunks,
                          static_cast<std::uint32_t>(b.block()) * job.counted_of_block, job.columns,
                          job.groups);
    bool refused = false;
    layout_sums sums;
    if ((job.phases & phase_lay_out) != 0) {
      refused = job.token_begin != nullptr && view.total[job.groups + met_unsound] != 0;
      if constexpr (mapped) {
        bool const sound = prepare_segments<Threads>(b, s.scan, job);
        refused = refused || !sound;
        if (b.thread() == 0) *job.refused = refused ? 1 : 0;
      }
      sums.capacity = capacity_of_block<mapped, Threads>(b, s.scan, job, view.total, refused);
      if (b.block() == 0) write_wanted<Threads>(b, job, view.total, refused, sums);
      if constexpr (mapped) deal_out_groups<Threads>(b, s.scan, job, view.total, refused, sums);
      lay_out_segments<mapped, Threads>(b, s.scan, job, view, refused, sums);
      // Its sync() is what a block that has all pairs needs before it places them; the others number
      // theirs first, which has some.
      if (b.block() == 0) write_counts(b, s, job, view.total + job.groups, refused, sums);
      if (mapped && (job.phases & phase_place) == 0) return false;
    } else {
      refused = *job.refused != 0;
      sums.rows = static_cast<std::uint32_t>(job.begin[job.segments]);
    }
    auto const thread = static_cast<std::uint32_t>(b.thread());
    auto const blocks = static_cast<std::uint32_t>(b.blocks());
    std::uint32_t r = sums.rows + static_cast<std::uint32_t>(b.block()) * Threads + thread;
    for (; r < job.max_rows; r += blocks * Threads) job.pair_of[r] = -1;
    if (!refused) return true;
    std::uint32_t const end = job.pairs() < walk.last ? job.pairs() : walk.last;
    for (std::uint32_t i = walk.first + thread; i < end; i += Threads) job.row_of[i] = dropped_row;
    return false;
  }

  template <class B>
  MOE_HOST_DEVICE void place_tile(detail::table_job const& job, detail::counter_view const& view,
                                  detail::group_counters<B, Threads> const& counters,
                                  chunk_walk const& walk, detail::pair_tile<items> const& pairs,
                                  std::uint32_t const (&rank)[items]) const {
    using namespace detail;
    MOE_UNROLL
    for (int k = 0; k < items; ++k) {
      if (k >= walk.rounds || pairs.group[k] <= no_pair) continue;
      std::uint32_t const i = pairs.pair[k];
      std::int32_t row = dropped_row;
      if (pairs.group[k] >= 0) {
        auto const g = static_cast<std::uint32_t>(pairs.group[k]);
        std::uint32_t const number = view.start[g] + counters.before(g) + rank[k];
        if constexpr (mapped)
          row = row_of_rank(job, g, number, i, walk.x + static_cast<std::uint32_t>(k * warp_size));
        else
          row = number < view.total[g] ? static_cast<std::int32_t>(number)
                                       : job.without_row(static_cast<int>(job.expert_of(g)));
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

  /// @param met  [met_columns] of all pairs.
  template <class B>
  MOE_HOST_DEVICE static void write_counts(B& b, shared& s, detail::table_job const& job,
                                           std::uint32_t const* met, bool refused,
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
