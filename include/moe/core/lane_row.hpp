// A row of scores in the registers of threads: the models of score_row for kernels.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>

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

/// The float of `ordered_bits`; 0 for either zero.
MOE_HOST_DEVICE constexpr float from_ordered_bits(std::uint32_t bits) noexcept {
  return __builtin_bit_cast(float, bits >= 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

/// An element by which it is chosen: the score as an integer of the same order, and ~id. The greatest is
/// that of the best candidate, and of the lowest id among equal ones; 0 is the score of no candidate.
struct element_key {
  std::uint32_t score, low;

  // In two halves, because nvcc makes of a 64-bit exchange a maximum and a minimum, each with a comparison.
  MOE_HOST_DEVICE std::uint64_t bits() const noexcept { return std::uint64_t(score) << 32 | low; }
};

MOE_HOST_DEVICE inline element_key key_of(float score, std::uint32_t low) noexcept {
  // `ordered_bits` without NaN: + 0 makes 0 of -0.
  auto const bits = __builtin_bit_cast(std::uint32_t, rounded_sum(score, 0.0f));
  auto const negative = static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31);
  return {is_candidate(score) ? bits ^ (negative | 0x80000000u) : 0, low};
}

/// Batcher's merge exchange: a network, so that the keys of a thread stay in registers. Its steps are
/// templates because nvcc unrolls no loop of loops of that size.
template <int N, int P = 1, int Q = 1>
MOE_HOST_DEVICE void sort_falling(element_key (&key)[N]) noexcept {
  if constexpr (P < N) {
    MOE_UNROLL
    for (int i = Q % P; i + Q < N; ++i) {
      if ((i - Q % P) / Q % 2 != 0 || i / (2 * P) != (i + Q) / (2 * P)) continue;
      element_key const a = key[i], b = key[i + Q];
      bool const falling = a.bits() > b.bits();
      key[i] = {falling ? a.score : b.score, falling ? a.low : b.low};
      key[i + Q] = {falling ? b.score : a.score, falling ? b.low : a.low};
    }
    sort_falling<N, Q == 1 ? 2 * P : P, Q == 1 ? 2 * P : Q / 2>(key);
  }
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

/// E scores in the registers of `Lanes` (sub_warp or whole_block), element e in the one of rank
/// e % width, its register e / width; E <= width * Slots.
///
/// The same results as array_row<float>, bit by bit, in every thread: ties go to the lower id, and in
/// sums lane l of 32 adds elements l, l + 32, ... in turn before the lanes are added as a butterfly,
/// whatever the width. A narrow sub-warp does the work of several such lanes in each of its own; of a
/// block one warp adds. (Of a highest score that is 0, max does not tell the sign.) On a GPU the
/// functions that a policy passes may differ in their last bits: exp and `divided_by` do, and
/// compilers contract products and sums within them.
/// @note  Called by all lanes together with the same arguments; a policy that knows nothing of
///        lanes does that. Policies have no loops of a length that differs by lane, as everything that
///        a row tells is the same in all of them.
/// @cost  Slots per lane and, but for transform, add and copy, log2 width shuffles at most.
/// @tparam Full  So many registers have an element in every lane, width * Full <= E: without a check.
template <class Lanes, int Slots, int Full = 0>
class lane_row {
 public:
  using value_type = float;

  /// @param lanes  Outlives the row and its copies.
  /// @param load   load(e) is the score of e; called once by the lane that keeps it.
  template <class Load>
  MOE_HOST_DEVICE lane_row(Lanes& lanes, int size, Load const& load) : lanes_(&lanes), size_(size) {
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j) score_[j] = has(j) ? load(element(j)) : no_score<float>;
  }

  MOE_HOST_DEVICE int size() const noexcept { return size_; }

  template <class F>
  MOE_HOST_DEVICE void transform(F const& f) {
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j)
      if (has(j)) score_[j] = f(element(j), score_[j]);
  }
  template <class F>
  MOE_HOST_DEVICE void transform(lane_row const& other, F const& f) {
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j)
      if (has(j)) score_[j] = f(element(j), score_[j], other.score_[j]);
  }

  MOE_HOST_DEVICE float max(int first, int last) const {
    bool const all = first <= 0 && last >= size_;  // known to compilers, mostly
    float best = no_score<float>;
    each([&](int e, float s) {
      if (all || (e >= first && e < last)) best = ::fmaxf(best, s);  // not NaN
    });
    return detail::from_ordered_bits(lanes_->highest(ordered_bits(best)));
  }

  template <class F>
  MOE_HOST_DEVICE float sum(F const& f) const {
    float term[Slots];
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j) term[j] = has(j) ? f(element(j), score_[j]) : 0.0f;
    return lanes_->sum(term, size_);
  }
  template <class F>
  MOE_HOST_DEVICE float sum(lane_row const& other, F const& f) const {
    float term[Slots];
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j)
      term[j] = has(j) ? f(element(j), score_[j], other.score_[j]) : 0.0f;
    return lanes_->sum(term, size_);
  }

  MOE_HOST_DEVICE float at(int e) const {
    auto const id = static_cast<unsigned>(e), width = static_cast<unsigned>(lanes_->width());
    float const mine = detail::value_at(score_, static_cast<int>(id / width));
    return lanes_->value_of(mine, static_cast<int>(id % width));
  }

  MOE_HOST_DEVICE void add(int e, float value) {
    each([&](int here, float& s) {
      if (here == e) s = detail::rounded_sum(s, value);
    });
  }

  MOE_HOST_DEVICE lane_row copy() const { return *this; }

  MOE_HOST_DEVICE choice<float> pop_max(int first, int last) {
    float best = no_score<float>;
    int id = 0;
    each([&](int e, float s) {
      bool const better = e >= first && e < last && s > best;
      best = better ? s : best;
      id = better ? e : id;
    });
    // Below the id the sign, which tells -0 from 0.
    std::uint32_t const sign = __builtin_bit_cast(std::uint32_t, best) >> 31;
    std::uint64_t const key =
        lanes_->highest(detail::key_of(best, ~static_cast<unsigned>(id) << 1 | sign).bits());
    auto const high = static_cast<std::uint32_t>(key >> 32), low = static_cast<std::uint32_t>(key);
    bool const found = high != 0;
    int const expert = found ? static_cast<int>(~(low >> 1) & 0x7fffffffu) : -1;
    float const score = detail::from_ordered_bits(high);
    each([&](int e, float& s) { s = e == expert ? no_score<float> : s; });
    return {expert, !found ? no_score<float> : score == 0 && (low & 1u) != 0 ? -0.0f : score};
  }

  /// expert[j], j < k: what k calls of pop_max(0, size()) would give. What is left of the row is
  /// not defined.
  template <int MaxK>
  MOE_HOST_DEVICE void pop_best(int k, int (&expert)[MaxK]) {
    detail::element_key key[Slots];  // falling
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j)
      key[j] = detail::key_of(score_[j], ~static_cast<unsigned>(element(j)));
    detail::sort_falling(key);
    MOE_UNROLL
    for (int j = 0; j < MaxK; ++j) {
      if (j >= k) continue;
      std::uint64_t const best = lanes_->highest(key[0].bits());
      auto const low = static_cast<std::uint32_t>(best);
      expert[j] = best >> 32 == 0 ? -1 : static_cast<int>(~low);
      bool const mine = key[0].low == low;
      MOE_UNROLL
      for (int i = 0; i < Slots && i < MaxK - 1 - j; ++i) {  // what later choices may need
        detail::element_key const next = i + 1 < Slots ? key[i + 1] : detail::element_key{0, 0};
        key[i] = {mine ? next.score : key[i].score, mine ? next.low : key[i].low};
      }
    }
  }

  /// The score of an expert that each lane names for itself, below the capacity of the row.
  MOE_HOST_DEVICE float gather(int expert) const
    requires requires(Lanes& lanes, float const (&score)[Slots]) { lanes.gather(score, expert); }
  {
    return lanes_->gather(score_, expert);
  }

  /// value[j] = at(expert[j]), j < k; 0 where expert[j] < 0. All of expert[] is below E.
  template <int MaxK>
  MOE_HOST_DEVICE void read(int k, int const (&expert)[MaxK], float (&value)[MaxK]) const {
    if constexpr (can_share<MaxK>) {
      // Lane j finds the j-th for all the others.
      int mine = 0;
      MOE_UNROLL
      for (int j = 0; j < MaxK; ++j) {
        int const here = expert[j];  // read in all lanes: else it becomes expert[rank()]
        mine = j == lanes_->rank() ? here : mine;
      }
      float const found = gather(mine < 0 ? 0 : mine);
      MOE_UNROLL
      for (int j = 0; j < MaxK; ++j) {
        if (j >= k) continue;
        float const score = lanes_->value_of(found, j);
        value[j] = expert[j] < 0 ? 0.0f : score;
      }
    } else {
      MOE_UNROLL
      for (int j = 0; j < MaxK; ++j) {
        if (j >= k) continue;
        float const score = at(expert[j] < 0 ? 0 : expert[j]);
        value[j] = expert[j] < 0 ? 0.0f : score;
      }
    }
  }

 private:
  /// Whether a lane each can find the scores of MaxK experts.
  template <int MaxK>
  static constexpr bool can_share = [] {
    if constexpr (requires(Lanes& lanes, float const(&score)[Slots]) { lanes.gather(score, 0); })
      return Lanes::width() >= MaxK;
    else
      return false;
  }();

  /// Whether register j keeps an element.
  MOE_HOST_DEVICE bool has(int j) const { return j < Full || element(j) < size_; }

  /// The element that register j keeps.
  MOE_HOST_DEVICE int element(int j) const { return lanes_->rank() + lanes_->width() * j; }

  // Written out for every register, because one that is chosen at run time lies in memory.
  template <class F>
  MOE_HOST_DEVICE void each(F const& f) {
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j) f(element(j), score_[j]);
  }
  template <class F>
  MOE_HOST_DEVICE void each(F const& f) const {
    MOE_UNROLL
    for (int j = 0; j < Slots; ++j) f(element(j), score_[j]);
  }

  float score_[Slots];  // -inf beyond E
  Lanes* lanes_;
  int size_;
};

}  // namespace moe::inline MOE_ABI
