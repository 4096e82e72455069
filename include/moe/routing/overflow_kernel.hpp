// The bodies of the kernels that build_table needs for overflow by priority: which pairs a full expert
// keeps, and the order of the tokens.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/detail/block_sums.hpp>
#include <moe/routing/detail/group_counters.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/detail/table_job.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// A block for each group, or for several: of the keys of a full group, which are in the order of ranks,
/// the job.keep[g] greatest become slots 0, 1, 2, ... and the others -1. Of equal keys the first are
/// kept.
template <int Threads>
struct select_slots_kernel {
  static constexpr int threads = Threads;
  static constexpr int items = detail::items_of<Threads>, warps = Threads / warp_size;
  static constexpr std::uint32_t tile = detail::tile_of<Threads>, digits = 256;

  struct shared {
    detail::counter_room<digits, Threads> counters;
    detail::scan_room scan;
    std::uint32_t digit, left;
    std::uint32_t above[warps], equal[warps];
  };

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, detail::table_job job) const {
    using detail::table_job;
    b.wait_for_previous();
    b.let_next_start();
    auto const blocks = static_cast<std::uint32_t>(b.blocks());
    for (auto g = static_cast<std::uint32_t>(b.block()); g < job.groups; g += blocks)
      if (job.keys_of[g] != table_job::not_full)
        select(b, s, job.keys + job.keys_of[g], job.load[g], job.keep[g]);
  }

 private:
  /// From n keys to slots.
  template <class B>
  MOE_HOST_DEVICE static void select(B& b, shared& s, std::uint32_t* keys, std::uint32_t n,
                                     std::uint32_t keep) {
    // The least key that is kept, digit by digit from the top, and how many pairs of that key are.
    std::uint32_t least = 0xffffffffu, of_least = keep;
    if (of_least > 0) {
      least = 0;
      for (int shift = 24; shift >= 0; shift -= 8) {
        find_digit(b, s, keys, n, shift, least, of_least);
        least |= s.digit << shift;
        of_least = s.left;
      }
    }
    write_slots(b, s, keys, n, least, of_least);
  }

  /// Of the keys that agree with `least` above the digit at `shift`: the digit of the keep-th greatest
  /// of them, and how many of those with that digit are to be kept.
  template <class B>
  MOE_HOST_DEVICE static void find_digit(B& b, shared& s, std::uint32_t const* keys,
                                         std::uint32_t n, int shift, std::uint32_t least,
                                         std::uint32_t keep) {
    using namespace detail;
    counter_view const view = s.counters.view(digits, nullptr);
    group_counters<B, Threads> counters(b, view, digits);
    std::uint32_t const known = shift == 24 ? 0u : ~0u << (shift + 8);
    for (std::uint32_t at = 0; at < n; at += tile) {
      std::uint32_t const m = n - at < tile ? n - at : tile;
      int const rounds = counters.rounds(m);
      std::int32_t digit[items];
      std::uint32_t rank[items];
      MOE_UNROLL
      for (int k = 0; k < items; ++k) {
        std::uint32_t const x = counters.first(rounds) + static_cast<std::uint32_t>(k * warp_size);
        digit[k] = no_pair;
        if (k < rounds && x < m && (keys[at + x] & known) == least)
          digit[k] = static_cast<std::int32_t>(keys[at + x] >> shift & 255u);
      }
      counters.clear();
      counters.rank(digit, rounds, rank);
      b.sync();
      counters.scan([&](std::uint32_t d, std::uint32_t, std::uint32_t count) {
        view.total[d] = at == 0 ? count : view.total[d] + count;
      });
      b.sync();
    }
    std::uint32_t greater = 0;
    int turn = 0;
    for (std::uint32_t d0 = 0; d0 < digits; d0 += Threads) {
      std::uint32_t const d = d0 + static_cast<std::uint32_t>(b.thread());
      std::uint32_t const count = d < digits ? view.total[digits - 1 - d] : 0u;
      block_sum const sum = scan_block<Threads>(b, s.scan, turn++, count);
      std::uint32_t const before = greater + sum.before;
      if (before < keep && keep <= before + count) {
        s.digit = digits - 1 - d;
        s.left = keep - before;
      }
      greater += sum.all;
    }
    b.sync();
  }

  template <class B>
  MOE_HOST_DEVICE static void write_slots(B& b, shared& s, std::uint32_t* keys, std::uint32_t n,
                                          std::uint32_t least, std::uint32_t of_least) {
    int const lane = b.thread() % warp_size, warp = b.thread() / warp_size;
    std::uint32_t above = 0, equal = 0;  // of the tiles before
    for (std::uint32_t at = 0; at < n; at += Threads) {
      std::uint32_t const x = at + static_cast<std::uint32_t>(b.thread());
      std::uint32_t const key = x < n ? keys[x] : 0u;
      bool const is_above = x < n && key > least, is_equal = x < n && key == least;
      std::uint32_t const lanes_above = b.ballot(all_lanes, is_above);
      std::uint32_t const lanes_equal = b.ballot(all_lanes, is_equal);
      auto const count = [](std::uint32_t lanes) {
        return static_cast<std::uint32_t>(count_lanes(lanes));
      };
      if (lane == 0) {
        s.above[warp] = count(lanes_above);
        s.equal[warp] = count(lanes_equal);
      }
      b.sync();
      std::uint32_t above_here = above + count(lanes_above & lanes_below(lane));
      std::uint32_t equal_here = equal + count(lanes_equal & lanes_below(lane));
      for (int w = 0; w < warps; ++w) {
        above += s.above[w];
        equal += s.equal[w];
        if (w < warp) {
          above_here += s.above[w];
          equal_here += s.equal[w];
        }
      }
      bool const kept = is_above || (is_equal && equal_here < of_least);
      std::uint32_t const slot = above_here + (equal_here < of_least ? equal_here : of_least);
      if (x < n) keys[x] = kept ? slot : ~0u;
      b.sync();
    }
  }
};

/// From the ranks of the pairs of full groups, and their slots, to rows. Any number of blocks.
template <int Threads>
struct settle_pairs_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, detail::table_job job) const {
    using namespace detail;
    b.wait_for_previous();
    b.let_next_start();
    if (*job.refused != 0) return;
    auto const stride = static_cast<std::uint32_t>(b.blocks()) * Threads;
    auto x = static_cast<std::uint32_t>(b.block() * Threads + b.thread());
    for (; x < job.positions; x += stride) {
      pair_tile<1> tile;
      load_pairs<1>(job, x, job.positions, 1, tile);
      if (tile.group[0] < 0) continue;
      auto const g = static_cast<std::uint32_t>(tile.group[0]);
      if (job.keys_of[g] == table_job::not_full) continue;
      std::uint32_t const i = tile.pair[0];
      std::uint32_t const slot =
          job.keys[job.keys_of[g] + static_cast<std::uint32_t>(job.row_of[i])];
      std::int32_t const row = slot == ~0u ? dropped_row : row_of_slot(job, g, slot);
      job.row_of[i] = row;
      if (row >= 0) job.pair_of[row] = static_cast<std::int32_t>(i);
    }
  }
};

/// One pass of the order of the tokens by falling best score, ties to the lower token: a stable sort of
/// (key << 32 | token) words by 8 bits of the key, one block for each chunk of tokens. Counts,
/// places, or both if one block has all tokens.
template <class V, int Threads>
struct sort_tokens_kernel {
  static constexpr int threads = Threads, resident_blocks = 1;
  static constexpr int items = detail::items_of<Threads>;
  static constexpr std::uint32_t tile = detail::tile_of<Threads>, digits = 256;

  struct shared {
    detail::counter_room<digits, Threads> counters;
    detail::scan_room scan;
  };

  /// @param in       The routing.
  /// @param words    [T] in; null in the first pass, which makes them.
  /// @param out      [T] out.
  /// @param shift    Of the digit in a word: 32, 40, 48, 56.
  /// @param chunk    Tokens of a block.
  /// @param counted  [chunks,256] out of the phase that counts, in to the one that places.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, basic_routing<V> in, std::uint64_t const* words,
                                  std::uint64_t* out, int shift, unsigned phases,
                                  std::uint32_t chunk, std::int32_t* counted,
                                  std::uint32_t chunks) const {
    using namespace detail;
    counter_view const view = s.counters.view(digits, nullptr);
    group_counters<B, Threads> counters(b, view, digits);
    auto const T = static_cast<std::uint32_t>(in.T);
    std::uint64_t const begin = std::uint64_t{chunk} * static_cast<std::uint32_t>(b.block());
    std::uint32_t const first = begin < T ? static_cast<std::uint32_t>(begin) : T;
    std::uint32_t const last = chunk < T - first ? first + chunk : T;
    b.wait_for_previous();
    b.let_next_start();

    // Calls each(word, digit, rank, at) after the scan of each tile.
    auto const walk = [&](auto const& of_digit, auto const& each) {
      for (std::uint32_t at = first; at < last; at += tile) {
        std::uint32_t const m = last - at < tile ? last - at : tile;
        int const rounds = counters.rounds(m);
        std::uint64_t word[items];
        std::int32_t digit[items];
        std::uint32_t rank[items];
        MOE_UNROLL
        for (int k = 0; k < items; ++k) {
          std::uint32_t const x =
              counters.first(rounds) + static_cast<std::uint32_t>(k * warp_size);
          bool const inside = k < rounds && x < m;
          word[k] = !inside ? 0 : words != nullptr ? words[at + x] : word_of(in, at + x);
          digit[k] = inside ? static_cast<std::int32_t>(word[k] >> shift & 255u) : no_pair;
        }
        counters.clear();
        counters.rank(digit, rounds, rank);
        b.sync();
        counters.scan([&](std::uint32_t d, std::uint32_t tile_before, std::uint32_t n) {
          of_digit(d, at == first, tile_before, n);
        });
        b.sync();
        MOE_UNROLL
        for (int k = 0; k < items; ++k)
          if (k < rounds && digit[k] >= 0)
            each(word[k], static_cast<std::uint32_t>(digit[k]), rank[k]);
      }
    };

    if ((phases & phase_count) != 0) {
      walk(
          [&](std::uint32_t d, bool is_first, std::uint32_t, std::uint32_t n) {
            view.total[d] = is_first ? n : view.total[d] + n;
            view.start[d] = 0;
          },
          [](std::uint64_t, std::uint32_t, std::uint32_t) {});
      if ((phases & phase_place) == 0) {
        for (auto d = static_cast<std::uint32_t>(b.thread()); d < digits; d += Threads)
          counted[static_cast<std::uint32_t>(b.block()) * digits + d] =
              first < last ? static_cast<std::int32_t>(view.total[d]) : 0;
        return;
      }
    } else {
      sum_chunks<Threads>(b, view, counted, chunks, static_cast<std::uint32_t>(b.block()), digits,
                          digits);
    }
    std::uint32_t lower = 0;
    int turn = 0;
    for (std::uint32_t d0 = 0; d0 < digits; d0 += Threads) {
      std::uint32_t const d = d0 + static_cast<std::uint32_t>(b.thread());
      block_sum const sum = scan_block<Threads>(b, s.scan, turn++, d < digits ? view.total[d] : 0u);
      if (d < digits) view.start[d] += lower + sum.before;
      lower += sum.all;
    }
    b.sync();
    walk(
        [&](std::uint32_t d, bool is_first, std::uint32_t tile_before, std::uint32_t) {
          if (!is_first) view.start[d] += tile_before;
        },
        [&](std::uint64_t word, std::uint32_t d, std::uint32_t rank) {
          out[view.start[d] + counters.before(d) + rank] = word;
        });
  }

 private:
  /// As rank_tokens makes them on the CPU.
  MOE_HOST_DEVICE static std::uint64_t word_of(basic_routing<V> const& in, std::uint32_t t) {
    detail::pair_range const pairs = detail::pairs_of(in, t);
    std::uint32_t best = 0;
    for (std::int64_t i = pairs.first; i < pairs.last; ++i)
      if (static_cast<std::uint32_t>(in.expert[i]) < static_cast<std::uint32_t>(in.E)) {
        std::uint32_t const bits = ordered_bits(static_cast<float>(in.rank_score(i)));
        best = bits > best ? bits : best;
      }
    return std::uint64_t{~best} << 32 | t;
  }
};

}  // namespace moe::inline MOE_ABI
