// The small values that policies exchange: a token, a choice, the choices of one token.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// Choices per token are at most this many anywhere in the library.
inline constexpr int max_choices = 16;

/// Stands in a routing instead of an expert id.
enum no_expert : int {
  no_candidate = -1,  ///< Fewer live candidates than choices, or a choice that a policy withdrew.
  invalid_token = -2  ///< The token's logits held NaN or +inf: none of its choices has an expert.
};

/// What a policy may know of a token besides its scores.
struct token {
  std::int64_t id = 0;  ///< Global: the same token has the same id on any rank, in any batch split.
  std::int64_t row = 0;    ///< Row of this token in the logits.
  std::uint64_t seed = 0;  ///< Key of every random draw.
  std::uint32_t step = 0;  ///< Training step; draws of two steps are independent.
  bool training = false;   ///< Noise is off when false.
};

/// What the library must know of the tokens of one call, besides their values. Row t of the logits
/// is token `at(t)`. The arrays are the caller's and outlive the calls that are given them.
struct batch {
  std::int64_t first_id = 0;          ///< Global id of row 0; row t has first_id + t,
  std::int64_t const* ids = nullptr;  ///< unless ids [T] are given.
  std::uint64_t seed = 0;
  std::uint32_t step = 0;
  bool training = false;
  /// [T] or null: 0 marks a token that takes no part (padding); it gets no expert.
  std::uint8_t const* live = nullptr;
  /// [T] or null = all 0: the source segment a token belongs to (the rank that sent it).
  std::int32_t const* source = nullptr;

  MOE_HOST_DEVICE constexpr token at(std::int64_t row) const noexcept {
    return {ids != nullptr ? ids[row] : first_id + row, row, seed, step, training};
  }
  MOE_HOST_DEVICE constexpr bool is_live(std::int64_t row) const noexcept {
    return live == nullptr || live[row] != 0;
  }
};

/// One candidate that was picked from a row: its id and the score it was picked by.
template <class V>
struct choice {
  int expert = -1;  ///< -1: no live candidate was left.
  V key = 0;
};

/// What one token chose: `expert[0 .. k)` by falling preference, with its weights.
/// A row with fewer than k live candidates ends in `expert = -1, weight = 0`.
template <int MaxK, class V = float>
struct choices {
  static_assert(MaxK >= 1 && MaxK <= max_choices);
  static constexpr int max_k = MaxK;

  int k = 0;
  int expert[MaxK] = {};
  V weight[MaxK] = {};

  /// Calls f(j) for j < k, in order. In a kernel arrays indexed by that j stay in registers.
  template <class F>
  MOE_HOST_DEVICE constexpr void each(F const& f) const {
    MOE_UNROLL
    for (int j = 0; j < MaxK; ++j)
      if (j < k) f(j);
  }
};

}  // namespace moe::inline MOE_ABI
