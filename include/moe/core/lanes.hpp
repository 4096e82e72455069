// Who keeps a row in a kernel: the lanes of a part of a warp, or the threads of a block.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// a + b, rounded: never part of a fused multiply-add, which would change the bits of sums.
MOE_HOST_DEVICE inline float rounded_sum(float a, float b) noexcept {
#if MOE_DEVICE_PASS
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

/// value[i], i < N, by halves and without an address that depends on i.
template <int N>
MOE_HOST_DEVICE float value_at(float const (&value)[N], int i) noexcept {
  if constexpr (N == 1) {
    return value[0];
  } else {
    constexpr int half = (N + 1) / 2;
    bool const above = i >= half;
    float left[half];
    MOE_UNROLL
    for (int j = 0; j < half; ++j) {
      float const low = value[j], high = value[j + half < N ? j + half : j];
      left[j] = above ? high : low;
    }
    return value_at(left, above ? i - half : i);
  }
}

}  // namespace detail

/// `Width` neighbouring lanes of a warp, a power of two, that keep one row together. The other lanes
/// of the warp may be anywhere else meanwhile, so that a warp works on 32 / Width tokens.
///
/// Its functions, and those of a row over it, are called by all its lanes together, with the same
/// arguments but for the values they combine, and give all of them the same result.
template <thread_block B, int Width>
class sub_warp {
  static_assert(Width >= 1 && Width <= warp_size && (Width & (Width - 1)) == 0);

 public:
  MOE_HOST_DEVICE explicit sub_warp(B& block)
      : block_(&block),
        first_(block.thread() % warp_size / Width * Width),
        lanes_((all_lanes >> (warp_size - Width)) << first_) {}

  MOE_HOST_DEVICE static constexpr int width() { return Width; }
  /// Of this thread, in [0, width).
  MOE_HOST_DEVICE int rank() const { return block_->thread() % Width; }

  /// The value that the lane of this rank gives.
  MOE_HOST_DEVICE float value_of(float value, int rank) const {
    if constexpr (Width == 1) return value;
    return block_->shuffle(lanes_, value, first_ + rank);
  }

  /// value[id / width] of the lane of rank id % width; each lane asks for an id of its own.
  template <int Slots>
  MOE_HOST_DEVICE float gather(float const (&value)[Slots], int id) const {
    if constexpr (Width == 1) return detail::value_at(value, id);
    int const slot = id / Width;
    float found = 0;
    MOE_UNROLL
    for (int s = 0; s < Slots; ++s) {
      float const here = value_of(value[s], id & (Width - 1));
      found = s == slot ? here : found;
    }
    return found;
  }

  /// The highest value of all lanes.
  template <class Unsigned>
  MOE_HOST_DEVICE Unsigned highest(Unsigned value) const {
    if constexpr (Width == warp_size && sizeof(Unsigned) == 4) {
      return block_->highest(lanes_, value);
    } else if constexpr (Width == warp_size) {
      auto const high = static_cast<std::uint32_t>(value >> 32);
      std::uint32_t const best = highest(high);
      return Unsigned(best) << 32 | highest(high == best ? static_cast<std::uint32_t>(value) : 0);
    } else {
      MOE_UNROLL
      for (int bits = Width / 2; bits > 0; bits /= 2) {
        Unsigned const other = block_->shuffle_xor(lanes_, value, bits);
        value = other > value ? other : value;
      }
      return value;
    }
  }

  /// The sum of term[j] over all lanes and j, element rank + width j, in the order of `score_row`.
  template <int Slots>
  MOE_HOST_DEVICE float sum(float const (&term)[Slots], int) const {
    // A lane does the work of `kept` lanes of a whole warp, rank, rank + width, ..., but for those
    // that have no element.
    constexpr int kept = [] {
      int n = warp_size / Width;
      while (n / 2 >= Slots) n /= 2;
      return n;
    }();
    float partial[kept] = {};
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j)
      partial[j % kept] = detail::rounded_sum(partial[j % kept], term[j]);
    MOE_UNROLL
    for (int n = kept / 2; n > 0; n /= 2) {
      MOE_UNROLL
      for (int j = 0; j < n; ++j) partial[j] = detail::rounded_sum(partial[j], partial[j + n]);
    }
    float total = partial[0];
    MOE_UNROLL
    for (int bits = Width / 2; bits > 0; bits /= 2)
      total = detail::rounded_sum(total, block_->shuffle_xor(lanes_, total, bits));
    return total;
  }

 private:
  B* block_;
  int first_;            // lane of rank 0
  std::uint32_t lanes_;  // of this group
};

/// Shared memory of a block that keeps rows of up to MaxE scores together.
template <int MaxE>
struct row_exchange {
  float term[MaxE];
  float value[2];
  std::uint64_t highest[2][warp_size];  // [.][warp]
};

/// All threads of a block, whole warps, that keep one row together: for a large E.
///
/// One object per thread for the whole kernel, its functions called by all threads as those of
/// `sub_warp`. Each of them has one barrier, sum has two.
template <thread_block B, int MaxE>
class whole_block {
 public:
  MOE_HOST_DEVICE whole_block(B& block, row_exchange<MaxE>& shared)
      : block_(&block), shared_(&shared) {}

  MOE_HOST_DEVICE int width() const { return block_->threads(); }
  MOE_HOST_DEVICE int rank() const { return block_->thread(); }

  MOE_HOST_DEVICE float value_of(float value, int rank) {
    if (block_->thread() == rank) shared_->value[turn_] = value;
    block_->sync();
    return shared_->value[take_turn()];
  }

  template <class Unsigned>
  MOE_HOST_DEVICE Unsigned highest(Unsigned value) {
    value = sub_warp<B, warp_size>(*block_).highest(value);
    if (block_->thread() % warp_size == 0)
      shared_->highest[turn_][block_->thread() / warp_size] = value;
    block_->sync();
    int const turn = take_turn();
    for (int warp = 0; warp < block_->threads() / warp_size; ++warp) {
      auto const other = static_cast<Unsigned>(shared_->highest[turn][warp]);
      value = other > value ? other : value;
    }
    return value;
  }

  /// The first warp adds alone: to share the work would be another order.
  template <int Slots>
  MOE_HOST_DEVICE float sum(float const (&term)[Slots], int size) {
    int const lane = block_->thread();
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j)
      if (int const e = rank() + width() * j; e < size) shared_->term[e] = term[j];
    block_->sync();
    if (lane < warp_size) {
      float partial[1] = {};
      for (int e = lane; e < size; e += warp_size)
        partial[0] = detail::rounded_sum(partial[0], shared_->term[e]);
      float const total = sub_warp<B, warp_size>(*block_).sum(partial, warp_size);
      if (lane == 0) shared_->value[turn_] = total;
    }
    block_->sync();
    return shared_->value[take_turn()];
  }

 private:
  /// Results lie in two places by turns: a thread that is a call ahead does not overwrite what
  /// others have still to read, and cannot be two ahead.
  MOE_HOST_DEVICE int take_turn() {
    int const turn = turn_;
    turn_ = 1 - turn;
    return turn;
  }

  B* block_;
  row_exchange<MaxE>* shared_;
  int turn_ = 0;
};

}  // namespace moe::inline MOE_ABI
