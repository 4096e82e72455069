// A row of scores as a plain array: the CPU model of score_row, in float and double.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <limits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/top_k_stream.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

/// "Not a candidate".
template <class V>
inline constexpr V no_score = -std::numeric_limits<V>::infinity();

/// Whether a score belongs to a live candidate.
template <class V>
MOE_HOST_DEVICE constexpr bool is_candidate(V score) noexcept {
  return score > no_score<V>;
}

/// Room for the copies of one row and of its copies.
template <std::floating_point V>
struct row_room {
  V* next = nullptr;  ///< [left, E]
  int left = 0;       ///< Copies that still fit.
};

/// E scores in an array. Owns neither them nor the room for copies.
template <std::floating_point V>
class array_row {
 public:
  using value_type = V;

  /// @param scores  [size], changed in place.
  /// @param room    Where copy() puts copies; null if there will be none.
  MOE_HOST_DEVICE constexpr array_row(V* scores, int size, row_room<V>* room = nullptr) noexcept
      : scores_(scores), size_(size), room_(room) {}

  MOE_HOST_DEVICE constexpr int size() const noexcept { return size_; }
  MOE_HOST_DEVICE constexpr V* data() const noexcept { return scores_; }

  template <class F>
  MOE_HOST_DEVICE constexpr void transform(F const& f) {
    for (int e = 0; e < size_; ++e) scores_[e] = f(e, scores_[e]);
  }
  template <class F>
  MOE_HOST_DEVICE constexpr void transform(array_row const& other, F const& f) {
    for (int e = 0; e < size_; ++e) scores_[e] = f(e, scores_[e], other.scores_[e]);
  }

  MOE_HOST_DEVICE constexpr V max(int first, int last) const noexcept {
    V best = no_score<V>;
    int e = first;
    if (last - first >= lanes) {
      // In lanes, because compilers do not reorder the comparisons of one chain.
      V lane[lanes];
      for (V& v : lane) v = no_score<V>;
      for (; e + lanes <= last; e += lanes)
        for (int l = 0; l < lanes; ++l)
          lane[l] = scores_[e + l] > lane[l] ? scores_[e + l] : lane[l];
      for (int width = lanes / 2; width > 0; width /= 2)
        for (int l = 0; l < width; ++l)
          lane[l] = lane[l + width] > lane[l] ? lane[l + width] : lane[l];
      best = lane[0];
    }
    for (; e < last; ++e) best = scores_[e] > best ? scores_[e] : best;
    return best;
  }

  template <class F>
  MOE_HOST_DEVICE constexpr V sum(F const& f) const {
    return sum_of([&](int e) { return f(e, scores_[e]); });
  }
  template <class F>
  MOE_HOST_DEVICE constexpr V sum(array_row const& other, F const& f) const {
    return sum_of([&](int e) { return f(e, scores_[e], other.scores_[e]); });
  }

  MOE_HOST_DEVICE constexpr V at(int e) const noexcept { return scores_[e]; }
  MOE_HOST_DEVICE constexpr void add(int e, V value) noexcept { scores_[e] += value; }

  /// @throws precondition_error if the room is used up: a policy makes more copies than it
  ///         declares in `copies`.
  MOE_NO_EXEC_CHECK
  MOE_HOST_DEVICE constexpr array_row copy() const {
    expects(room_ != nullptr && room_->left > 0,
            "array_row::copy: a policy makes at most as many copies as it declares in `copies`",
            call_site::here());
    array_row duplicate(room_->next, size_, room_);
    room_->next += size_;
    --room_->left;
    for (int e = 0; e < size_; ++e) duplicate.scores_[e] = scores_[e];
    return duplicate;
  }

  MOE_HOST_DEVICE constexpr choice<V> pop_max(int first, int last) noexcept {
    V const highest = max(first, last);
    if (!is_candidate(highest)) return {-1, no_score<V>};
    // The value first and then its first place: both are vector code, a search for both is not.
    int e = first;
    for (; e + lanes <= last; e += lanes) {
      int place = lanes;
      for (int l = 0; l < lanes; ++l) {
        int const here = scores_[e + l] == highest ? l : lanes;
        place = here < place ? here : place;
      }
      if (place < lanes) return pop(e + place);
    }
    while (scores_[e] != highest) ++e;
    return pop(e);
  }

  /// The experts of k calls of pop_max(0, size()), by one pass over the row where that is faster.
  template <int MaxK>
    requires std::same_as<V, float>
  MOE_HOST_DEVICE constexpr void pop_best(int k, int (&expert)[MaxK]) noexcept {
    // K = 8: 1.2 times as fast as searches for E = 256, 2 for E = 4096 (Zen 3, AVX2, 2026-11); with SSE2
    // 1.5 and 3.6. Of few choices searches are as fast.
    if (k < 4 || size_ < 64) {
      for (int j = 0; j < k; ++j) expert[j] = pop_max(0, size_).expert;
      return;
    }
    top_k_stream<MaxK> best(k);
    best.add(scores_, size_, 0);
    for (int j = 0; j < k; ++j) {
      expert[j] = best[j];
      if (expert[j] >= 0) scores_[expert[j]] = no_score<V>;
    }
  }

 private:
  static constexpr int lanes = 32;

  MOE_HOST_DEVICE constexpr choice<V> pop(int e) noexcept {
    choice<V> const best{e, scores_[e]};
    scores_[e] = no_score<V>;
    return best;
  }

  /// Lane l of 32 adds elements l, l + 32, ...; the lanes are added as a butterfly. A warp, a part
  /// of one and a plain loop can all follow this order, so their sums are equal bit by bit.
  template <class F>
  MOE_HOST_DEVICE constexpr V sum_of(F const& f) const {
    V lane[lanes] = {};
    int e = 0;
    for (; e + lanes <= size_; e += lanes)
      for (int l = 0; l < lanes; ++l) lane[l] += f(e + l);
    for (int l = 0; e + l < size_; ++l) lane[l] += f(e + l);
    if (size_ >= lanes) return fold(lane, lanes / 2);
    int used = lanes;  // the others are 0 and need not be added
    while (used > 1 && used / 2 >= size_) used /= 2;
    return fold(lane, used / 2);
  }

  MOE_HOST_DEVICE static constexpr V fold(V (&lane)[lanes], int width) noexcept {
    for (; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
    return lane[0];
  }

  V* scores_;
  int size_;
  row_room<V>* room_;
};

/// chosen.weight[j] = the score of chosen.expert[j], 0 where that is negative.
template <class R, int MaxK>
MOE_HOST_DEVICE constexpr void read_scores(R const& scores,
                                           choices<MaxK, typename R::value_type>& chosen) {
  using V = typename R::value_type;
  if constexpr (requires { scores.read(chosen.k, chosen.expert, chosen.weight); }) {
    scores.read(chosen.k, chosen.expert, chosen.weight);
  } else {
    // No branch around at(), which lanes call together.
    chosen.each([&](int j) {
      V const s = scores.at(chosen.expert[j] < 0 ? 0 : chosen.expert[j]);
      chosen.weight[j] = chosen.expert[j] < 0 ? V(0) : s;
    });
  }
}

static_assert(score_row<array_row<float>>);
static_assert(score_row<array_row<double>>);

}  // namespace moe::inline MOE_ABI
