// A row of scores in the registers of threads: the models of score_row for kernels.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/lanes.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

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

}  // namespace detail

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
