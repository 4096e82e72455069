// Sums and scans over the threads of a block. Private to the kernels of routing.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Three times 32 words: for `highest_of_block` and, in turn, for `scan_block`.
struct scan_room {
  std::uint32_t word[3][warp_size];
};

inline constexpr std::uint32_t most_rows = 0x7fffffff;

/// a + b, at most most_rows: associative, so that sums beyond all row numbers do no harm.
MOE_HOST_DEVICE constexpr std::uint32_t add_rows(std::uint32_t a, std::uint32_t b) noexcept {
  std::uint32_t const sum = a + b;
  return sum < most_rows ? sum : most_rows;
}

/// The sum of add_rows over the lanes up to this one.
template <thread_block B>
MOE_HOST_DEVICE inline std::uint32_t scan_warp(B& b, std::uint32_t n) {
  int const lane = b.thread() % warp_size;
  MOE_UNROLL
  for (int d = 1; d < warp_size; d *= 2) {
    std::uint32_t const below = b.shuffle_up(all_lanes, n, d);
    if (lane >= d) n = add_rows(n, below);
  }
  return n;
}

struct block_sum {
  std::uint32_t before;  ///< Of the threads below.
  std::uint32_t all;
};

/// The sums of n by add_rows. `turn` differs from one call to the next.
template <int Threads, thread_block B>
MOE_HOST_DEVICE inline block_sum scan_block(B& b, scan_room& room, int turn, std::uint32_t n) {
  constexpr int warps = Threads / warp_size;
  int const lane = b.thread() % warp_size, warp = b.thread() / warp_size;
  std::uint32_t* const sums = room.word[1 + turn % 2];
  std::uint32_t const own = scan_warp(b, n);
  std::uint32_t const below = b.shuffle_up(all_lanes, own, 1);
  if (lane == warp_size - 1) sums[warp] = own;
  b.sync();
  std::uint32_t const upto = scan_warp(b, lane < warps ? sums[lane] : 0u);
  std::uint32_t const warps_before = b.shuffle(all_lanes, upto, warp == 0 ? 0 : warp - 1);
  block_sum s;
  s.before = add_rows(warp == 0 ? 0u : warps_before, lane == 0 ? 0u : below);
  s.all = b.shuffle(all_lanes, upto, warp_size - 1);
  return s;
}

/// The highest n of the block.
template <int Threads, thread_block B>
MOE_HOST_DEVICE inline std::uint32_t highest_of_block(B& b, scan_room& room, std::uint32_t n) {
  int const lane = b.thread() % warp_size;
  std::uint32_t const own = b.highest(all_lanes, n);
  if (lane == 0) room.word[0][b.thread() / warp_size] = own;
  b.sync();
  return b.highest(all_lanes, lane < Threads / warp_size ? room.word[0][lane] : 0u);
}

/// The sum of n over the warp's lanes, in each of them. Often there is none at all.
template <thread_block B>
MOE_HOST_DEVICE inline std::uint32_t sum_warp(B& b, std::uint32_t n) {
  if (b.ballot(all_lanes, n != 0) == 0) return 0;
  MOE_UNROLL
  for (int bits = warp_size / 2; bits > 0; bits /= 2) n += b.shuffle_xor(all_lanes, n, bits);
  return n;
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
