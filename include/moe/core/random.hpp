// Counter-based random numbers: a value is a function of (seed, step, token, stream, index) alone.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/types.hpp>

namespace moe::inline MOE_ABI {

/// Four 32-bit words: a Philox counter, or the output made from it.
struct philox_block {
  std::uint32_t word[4];

  /// word[i]; on a GPU without an index, which would put the words into local memory.
  MOE_HOST_DEVICE constexpr std::uint32_t at(std::uint32_t i) const noexcept {
#if MOE_DEVICE_PASS
    return i < 2 ? (i == 0 ? word[0] : word[1]) : i == 2 ? word[2] : word[3];
#else
    return word[i];
#endif
  }
};

/// Philox-4x32-10: a bijection of the counter for each key, ten rounds.
/// @cost  About 40 integer operations; no state.
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11.
MOE_HOST_DEVICE constexpr philox_block philox(philox_block counter, std::uint32_t key0,
                                              std::uint32_t key1) noexcept {
  for (int round = 0; round < 10; ++round) {
    std::uint64_t const p0 = std::uint64_t{0xD2511F53u} * counter.word[0];
    std::uint64_t const p1 = std::uint64_t{0xCD9E8D57u} * counter.word[2];
    counter = {{static_cast<std::uint32_t>(p1 >> 32) ^ counter.word[1] ^ key0,
                static_cast<std::uint32_t>(p1),
                static_cast<std::uint32_t>(p0 >> 32) ^ counter.word[3] ^ key1,
                static_cast<std::uint32_t>(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

/// What a draw is for. Draws of two streams never share a counter. A user's own streams are those
/// from `user` to 255.
enum class stream : std::uint32_t {
  jitter = 1,
  gumbel = 2,
  overflow = 3,
  noise = 4,
  dispatch = 5,
  user = 64
};

/// The random bits of elements [4 * quarter, 4 * quarter + 4) of one token's stream.
/// @pre quarter < 2^24.
MOE_HOST_DEVICE constexpr philox_block random_block(token const& t, stream s,
                                                    std::uint32_t quarter) noexcept {
  // The token's 64-bit id, the step and (stream, quarter) are the counter; the seed is the key.
  auto const id = static_cast<std::uint64_t>(t.id);
  return philox({{static_cast<std::uint32_t>(id), static_cast<std::uint32_t>(id >> 32), t.step,
                  (static_cast<std::uint32_t>(s) << 24) ^ quarter}},
                static_cast<std::uint32_t>(t.seed), static_cast<std::uint32_t>(t.seed >> 32));
}

/// A token that keeps the block it drew from last: neighbouring elements of a stream, drawn one after
/// another, cost a quarter. The numbers are those of the token itself.
struct drawing_token : token {
  MOE_HOST_DEVICE explicit constexpr drawing_token(token const& t) noexcept : token(t) {}

  MOE_HOST_DEVICE constexpr std::uint32_t bits(stream s, std::uint32_t index) noexcept {
    if (empty_ || s != stream_ || index >> 2 != quarter_) {
      empty_ = false;
      stream_ = s;
      quarter_ = index >> 2;
      block_ = random_block(*this, s, quarter_);
    }
    return block_.at(index & 3u);
  }

 private:
  bool empty_ = true;
  stream stream_{};
  std::uint32_t quarter_ = 0;
  philox_block block_{};
};

/// 32 random bits of element `index` of one token's stream. Does not depend on the number of
/// threads or ranks, on the batch split, or on what else is drawn.
/// @pre index < 2^26.
MOE_HOST_DEVICE constexpr std::uint32_t random_bits(token const& t, stream s,
                                                    std::uint32_t index) noexcept {
  return random_block(t, s, index >> 2).at(index & 3u);
}
MOE_HOST_DEVICE constexpr std::uint32_t random_bits(drawing_token& t, stream s,
                                                    std::uint32_t index) noexcept {
  return t.bits(s, index);
}

/// Random bits as a number strictly between 0 and 1, an odd multiple of 2^-24: 0 and 1 are never
/// drawn, so logarithms are finite and a random priority cannot lose a token.
MOE_HOST_DEVICE constexpr float uniform(std::uint32_t bits) noexcept {
  return static_cast<float>(2 * (bits >> 9) + 1) * 0x1p-24f;
}

/// The same of element `index` of a token's stream.
/// @param t  A token, or a drawing_token.
template <class Token = token const&>
MOE_HOST_DEVICE constexpr float uniform(Token&& t, stream s, std::uint32_t index) noexcept {
  return uniform(random_bits(t, s, index));
}

/// A standard Gumbel number: -log(-log(u)).
template <class Token = token const&>
MOE_HOST_DEVICE inline float gumbel(Token&& t, stream s, std::uint32_t index) noexcept {
  return -std::log(-std::log(uniform(t, s, index)));
}

/// A standard normal number (Box-Muller; elements 2i and 2i+1 share one pair of uniforms).
template <class Token = token const&>
MOE_HOST_DEVICE inline float normal(Token&& t, stream s, std::uint32_t index) noexcept {
  constexpr float two_pi = 6.28318530717958647692f;
  float const radius = std::sqrt(-2.0f * std::log(uniform(t, s, index & ~1u)));
  float const angle = two_pi * uniform(t, s, index | 1u);
  return (index & 1u) == 0 ? radius * std::cos(angle) : radius * std::sin(angle);
}

}  // namespace moe::inline MOE_ABI
