// The k greatest scores of a row that comes in tiles, exact in ties whatever the order of the tiles is.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

/// A score and its index as one number: the greater the better, equal scores by the lower index.
MOE_HOST_DEVICE constexpr std::uint64_t packed_key(float score, std::uint32_t index) noexcept {
  return static_cast<std::uint64_t>(ordered_bits(score)) << 32 | ~index;
}

/// Takes tiles of a row of float scores, and keeps the k best of all it was given: each score is read once,
/// and the row need never exist as a whole. Rows of thousands of experts are its purpose.
///
/// Scores of -inf and NaN are no candidates. Every index is given once. Results equal those of k calls of
/// `array_row::pop_max`, bit by bit.
/// @cost  Two comparisons of vectors for each score of the first tile and one for others, and O(k) for each
///        score that is among the best so far. A long first tile leaves few of these.
/// Example: k = 2, scores 1, 3 | 3, 2: after the first tile 1, 0; after the second 1, 2.
template <int MaxK>
class top_k_stream {
  static_assert(MaxK >= 1 && MaxK <= max_choices);

 public:
  /// @pre  1 <= k <= MaxK.
  MOE_HOST_DEVICE explicit constexpr top_k_stream(int k) noexcept : k_(k) {
    for (std::uint64_t& key : key_) key = none;
  }

  /// A tile: scores of the indices [first, first + count).
  MOE_HOST_DEVICE constexpr void add(float const* scores, int count, int first) noexcept {
    if (key_[k() - 1] == none && count >= 2 * lanes) raise(scores, count);
    int i = 0;
    for (; i + lanes <= count; i += lanes) {
      int found = 0;
      for (int l = 0; l < lanes; ++l) found |= static_cast<int>(scores[i + l] >= least_);
      if (found == 0) continue;
      std::uint32_t which = 0;
      for (int l = 0; l < lanes; ++l)
        which |= static_cast<std::uint32_t>(scores[i + l] >= least_) << l;
      for (; which != 0; which &= which - 1) {
        int const index = i + lowest(which);
        insert(packed_key(scores[index], static_cast<std::uint32_t>(first + index)));
      }
    }
    for (; i < count; ++i)
      if (scores[i] >= least_) insert(packed_key(scores[i], static_cast<std::uint32_t>(first + i)));
  }

  /// What another stream has seen, of other indices.
  MOE_HOST_DEVICE constexpr void add(top_k_stream const& other) noexcept {
    for (std::uint64_t const key : other.key_) insert(key);
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept {
    return k_ < MaxK ? k_ : MaxK;  // so that the compiler, too, knows
  }
  /// The index of the j-th best, j < k; -1 where no candidate was left.
  MOE_HOST_DEVICE constexpr int operator[](int j) const noexcept {
    return key_[j] == none ? -1 : static_cast<int>(~static_cast<std::uint32_t>(key_[j]));
  }

 private:
  static constexpr int lanes = 32;
  /// Better than no candidate, worse than any: that of -inf and index 0.
  static constexpr std::uint64_t none = 0x007fffffffffffffu;

  MOE_HOST_DEVICE static constexpr int lowest(std::uint32_t bits) noexcept {
#if MOE_DEVICE_PASS
    return __ffs(static_cast<int>(bits)) - 1;
#else
    return __builtin_ctz(bits);
#endif
  }

  /// Raises `least_` to what k of the scores reach, so that few others are looked at: the k-th greatest of
  /// the lanes' greatest, or less where these are equal.
  MOE_HOST_DEVICE constexpr void raise(float const* scores, int count) noexcept {
    float lane[lanes];
    for (int l = 0; l < lanes; ++l) lane[l] = scores[l] >= least_ ? scores[l] : least_;
    for (int i = lanes; i + lanes <= count; i += lanes)
      for (int l = 0; l < lanes; ++l) lane[l] = scores[i + l] > lane[l] ? scores[i + l] : lane[l];
    float highest = 0;
    for (int j = 0; j < k(); ++j) {
      float top[lanes / 2];
      for (int l = 0; l < lanes / 2; ++l)
        top[l] = lane[l] > lane[l + lanes / 2] ? lane[l] : lane[l + lanes / 2];
      for (int width = lanes / 4; width > 0; width /= 2)
        for (int l = 0; l < width; ++l) top[l] = top[l] > top[l + width] ? top[l] : top[l + width];
      highest = top[0];
      for (int l = 0; l < lanes; ++l) lane[l] = lane[l] == highest ? least_ : lane[l];
    }
    least_ = highest;
  }

  /// Without branches: a key that is not among the best falls out at the end.
  MOE_HOST_DEVICE constexpr void insert(std::uint64_t key) noexcept {
    for (int j = 0; j < k(); ++j) {
      std::uint64_t const other = key_[j];
      bool const better = key > other;
      key_[j] = better ? key : other;
      key = better ? other : key;
    }
    float const last = score_of(key_[k() - 1]);
    least_ = last > least_ ? last : least_;
  }

  /// The other direction of ordered_bits.
  MOE_HOST_DEVICE static constexpr float score_of(std::uint64_t key) noexcept {
    auto const bits = static_cast<std::uint32_t>(key >> 32);
    return __builtin_bit_cast(float, bits >= 0x80000000u ? bits & 0x7fffffffu : ~bits);
  }

  std::uint64_t key_[MaxK];               // [k], best first
  float least_ = -__builtin_huge_valf();  // k scores that were given, or are in this tile, reach it
  int k_;
};

}  // namespace moe::inline MOE_ABI
