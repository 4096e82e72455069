// How the warps of a block number the pairs of each group, in order and without atomics. Private to
// build_table.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/routing/detail/table_job.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Pairs that a thread has in registers at a time. More would hide more latency of large problems and
/// cost small ones more instructions: a guess, never timed. Two in the small blocks of the emulator.
template <int Threads>
inline constexpr int items_of = Threads >= 128 ? 4 : 2;

/// Pairs that a block has in registers at a time. Their number within a group fits 16 bits.
template <int Threads>
inline constexpr std::uint32_t tile_of = static_cast<std::uint32_t>(Threads * items_of<Threads>);

/// Counters of two groups: read together, written apart.
struct alignas(4) two_counts {
  std::uint16_t of[2];
};

/// Of four columns: a load of 16 bytes.
struct alignas(16) four_counts {
  std::uint32_t of[4];
};

/// Where the counters of a block lie.
struct counter_view {
  two_counts* counter;   ///< [warps + 1][words]: of each warp, and what all have counted.
  four_counts* partial;  ///< In place of counter, while chunks are summed up.
  std::uint32_t* start;  ///< [groups] where the next pair of the block goes.
  std::uint32_t* total;  ///< [columns_of(groups)] pairs in all; later where the group ends.
  std::uint32_t words;   ///< Of a row of counter.
};

/// Columns of the counts of a chunk: its groups, met_column, and what makes it a multiple of four.
MOE_HOST_DEVICE constexpr std::uint32_t columns_of(std::uint32_t groups) noexcept {
  return (groups + met_columns + 3) / 4 * 4;
}

/// Loads of sum_chunks: of four columns each, by as many threads as there are, chunk by chunk.
MOE_HOST_DEVICE constexpr std::uint32_t parts_of(std::uint32_t columns, int threads) noexcept {
  std::uint32_t const fours = columns / 4, most = static_cast<std::uint32_t>(threads) / fours;
  return most > 1 ? most : 1;
}

/// Shared memory for counters of up to MaxGroups groups; of 0: they lie in scratch.
template <int MaxGroups, int Threads>
struct counter_room {
  static_assert(tile_of<Threads> <= 0xffff && MaxGroups % 2 == 0);
  static constexpr int columns = static_cast<int>(columns_of(MaxGroups));

  union {
    two_counts counter[(Threads / warp_size + 1) * (MaxGroups / 2)];
    four_counts partial[2 * (Threads > columns / 4 ? Threads : columns / 4)];
  };
  std::uint32_t start[MaxGroups];
  std::uint32_t total[columns];

  MOE_HOST_DEVICE counter_view view(std::uint32_t groups, std::byte*) noexcept {
    return {counter, partial, start, total, (groups + 1) / 2};
  }
};

template <int Threads>
struct counter_room<0, Threads> {
  /// @param own  [counter_bytes(groups, Threads)]
  MOE_HOST_DEVICE counter_view view(std::uint32_t groups, std::byte* own) const noexcept {
    std::uint32_t const words = (groups + 1) / 2;
    auto* const partial = reinterpret_cast<four_counts*>(own);
    auto* const total =
        reinterpret_cast<std::uint32_t*>(partial + columns_of(groups) / 2 + 2 * Threads);
    std::uint32_t* const start = total + columns_of(groups);
    return {reinterpret_cast<two_counts*>(start + groups), partial, start, total, words};
  }
};

/// Bytes of a block's counters in scratch, a multiple of a cache line.
constexpr std::size_t counter_bytes(std::int64_t groups, int threads) noexcept {
  std::int64_t const columns = columns_of(static_cast<std::uint32_t>(groups));
  std::int64_t const words =
      2 * columns + 8 * threads + columns + groups + (threads / warp_size + 1) * ((groups + 1) / 2);
  return static_cast<std::size_t>((4 * words + 63) / 64 * 64);
}

/// A thread's part in numbering.
template <thread_block B, int Threads>
class group_counters {
 public:
  static constexpr int items = items_of<Threads>;
  static constexpr int warps = Threads / warp_size;

  MOE_HOST_DEVICE group_counters(B& b, counter_view const& view, std::uint32_t groups)
      : b_(&b),
        view_(view),
        groups_(groups),
        lane_(b.thread() % warp_size),
        warp_(b.thread() / warp_size) {}

  MOE_HOST_DEVICE int lane() const { return lane_; }
  MOE_HOST_DEVICE int warp() const { return warp_; }

  /// Rounds of a warp for the n pairs of a tile, and the first of this lane's pairs.
  MOE_HOST_DEVICE static int rounds(std::uint32_t n) {
    return static_cast<int>((n + Threads - 1) / Threads);
  }
  MOE_HOST_DEVICE std::uint32_t first(int rounds) const {
    return static_cast<std::uint32_t>(warp_ * rounds * warp_size + lane_);
  }

  /// Sets the warp's own counters to zero: no other warp may be reading them.
  MOE_HOST_DEVICE void clear() {
    b_->sync_warp(all_lanes);
    two_counts* const own = view_.counter + row_of(warp_);
    for (std::uint32_t w = static_cast<std::uint32_t>(lane_); w < view_.words; w += warp_size)
      own[w] = {};
    b_->sync_warp(all_lanes);
  }

  /// rank[k] = pairs of the same group that the warp met before this one, since clear.
  MOE_HOST_DEVICE void rank(std::int32_t const (&group)[items], int rounds,
                            std::uint32_t (&rank)[items]) {
    two_counts* const own = view_.counter + row_of(warp_);
    MOE_UNROLL
    for (int k = 0; k < items; ++k)
      if (k < rounds) {
        std::uint32_t const peers = b_->match_any(all_lanes, group[k]);
        int const before = count_lanes(peers & lanes_below(lane_));
        auto const g = static_cast<std::uint32_t>(group[k]);
        bool const counts = group[k] >= 0;
        std::uint32_t const met = counts ? own[g / 2].of[g % 2] : 0u;
        rank[k] = met + static_cast<std::uint32_t>(before);
        b_->sync_warp(all_lanes);
        if (counts && before == 0)
          own[g / 2].of[g % 2] =
              static_cast<std::uint16_t>(met + static_cast<std::uint32_t>(count_lanes(peers)));
        b_->sync_warp(all_lanes);
      }
  }

  /// From what each warp counted to what those before it did. Calls each(g, n) with the counts of the
  /// tile before and of this one, in the same thread for a group each time.
  /// @pre  sync() after rank; sync() before `before`.
  template <class Each>
  MOE_HOST_DEVICE void scan(Each const& each) {
    for (auto w = static_cast<std::uint32_t>(b_->thread()); w < view_.words; w += Threads) {
      two_counts* const column = view_.counter + w;
      std::uint32_t sum = 0;  // of both, side by side
      constexpr int together = warps < 8 ? warps : 8;
      for (int i0 = 0; i0 < warps; i0 += together) {
        std::uint32_t n[together];
        MOE_UNROLL
        for (int i = 0; i < together; ++i)
          n[i] = __builtin_bit_cast(std::uint32_t, column[row_of(i0 + i)]);
        MOE_UNROLL
        for (int i = 0; i < together; ++i) {
          column[row_of(i0 + i)] = __builtin_bit_cast(two_counts, sum);
          sum += n[i];
        }
      }
      auto const all = __builtin_bit_cast(two_counts, sum);
      two_counts const last = column[row_of(warps)];
      column[row_of(warps)] = all;
      each(2 * w, last.of[0], all.of[0]);
      if (2 * w + 1 < groups_) each(2 * w + 1, last.of[1], all.of[1]);
    }
  }

  /// What the warps before this one counted in the tile.
  MOE_HOST_DEVICE std::uint32_t before(std::uint32_t g) const {
    return view_.counter[row_of(warp_) + g / 2].of[g % 2];
  }

 private:
  MOE_HOST_DEVICE std::uint32_t row_of(int warp) const {
    return static_cast<std::uint32_t>(warp) * view_.words;
  }

  B* b_;
  counter_view view_;
  std::uint32_t groups_;
  int lane_, warp_;
};

/// total = the sum of each column over all counted chunks; start = over those before `own`, of the
/// groups. Ends with sync().
/// @param counted  [chunks,columns], aligned to 16 bytes; columns a multiple of four.
template <int Threads, thread_block B>
MOE_HOST_DEVICE inline void sum_chunks(B& b, counter_view const& view, std::int32_t const* counted,
                                       std::uint32_t chunks, std::uint32_t own,
                                       std::uint32_t columns, std::uint32_t groups) {
  std::uint32_t const fours = columns / 4, parts = parts_of(columns, Threads);
  std::uint32_t const all_parts = parts * fours;
  for (auto x = static_cast<std::uint32_t>(b.thread()); x < all_parts; x += Threads) {
    std::uint32_t const part = x / fours;
    auto const* const column = reinterpret_cast<four_counts const*>(counted) + (x - part * fours);
    four_counts all{}, before{};
    constexpr std::uint32_t together = 8;  // loads under way
    for (std::uint32_t c = part; c < chunks; c += together * parts) {
      four_counts n[together];
      MOE_UNROLL
      for (std::uint32_t u = 0; u < together; ++u)
        n[u] = c + u * parts < chunks ? column[std::int64_t{c + u * parts} * fours] : four_counts{};
      MOE_UNROLL
      for (std::uint32_t u = 0; u < together; ++u) {
        MOE_UNROLL
        for (int i = 0; i < 4; ++i) {
          all.of[i] += n[u].of[i];
          before.of[i] += c + u * parts < own ? n[u].of[i] : 0u;
        }
      }
    }
    view.partial[x] = before;
    view.partial[all_parts + x] = all;
  }
  b.sync();
  for (auto column = static_cast<std::uint32_t>(b.thread()); column < columns; column += Threads) {
    std::uint32_t all = 0, before = 0;
    for (std::uint32_t x = column / 4; x < all_parts; x += fours) {
      before += view.partial[x].of[column % 4];
      all += view.partial[all_parts + x].of[column % 4];
    }
    if (column < groups) view.start[column] = before;
    view.total[column] = all;
  }
  b.sync();
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
