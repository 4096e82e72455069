// Elementary functions that CPU and GPU share, and tests that survive any optimisation flag.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// e to the x. float: within 1 unit in the last place, 0 below -87.3 and +inf above 88.7, NaN for NaN;
/// written without branches so that compilers turn loops over it into vector code. double: std::exp.
MOE_HOST_DEVICE inline float exp(float x) noexcept {
#if defined(__CUDA_ARCH__)
  return ::expf(x);
#else
  // x = n ln2 + r with |r| <= ln2 / 2; e^r by a polynomial of degree 6 (Cephes' expf).
  constexpr float lowest = -87.3f, highest = 88.7f;
  float const above = x > lowest ? x : lowest;  // NaN, too
  float const clamped = above < highest ? above : highest;
  auto const exponent =
      static_cast<std::int32_t>(clamped * 1.44269504088896341f + (clamped < 0.0f ? -0.5f : 0.5f));
  auto const n = static_cast<float>(exponent);
  float const r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float const e_to_r = p * (r * r) + r + 1.0f;
  // 2^n by its exponent bits, in two factors because n = 128 has none of its own.
  std::int32_t const half = exponent >> 1;
  float const scale0 = __builtin_bit_cast(float, (half + 127) << 23);
  float const scale1 = __builtin_bit_cast(float, (exponent - half + 127) << 23);
  float const value = e_to_r * scale0 * scale1;
  float const beyond = x < lowest ? 0.0f : x + __builtin_bit_cast(float, 0x7f800000);
  return x >= lowest && x <= highest ? value : beyond;
#endif
}
MOE_HOST_DEVICE inline double exp(double x) noexcept {
  return ::exp(x);
}

/// Whether a logit is NaN or +inf, which no gate accepts. By bits: one integer comparison.
MOE_HOST_DEVICE constexpr bool is_invalid_logit(float x) noexcept {
  auto const bits = __builtin_bit_cast(std::uint32_t, x);
  return (bits & 0x7fffffffu) >= 0x7f800000u && bits != 0xff800000u;
}
MOE_HOST_DEVICE constexpr bool is_invalid_logit(double x) noexcept {
  auto const bits = __builtin_bit_cast(std::uint64_t, x);
  return (bits & 0x7fffffffffffffffu) >= 0x7ff0000000000000u && bits != 0xfff0000000000000u;
}

/// A float as an unsigned integer of the same order, -0 and 0 being equal; NaN of either sign comes
/// below -inf.
MOE_HOST_DEVICE constexpr std::uint32_t ordered_bits(float x) noexcept {
  auto const bits = __builtin_bit_cast(std::uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0;
  return bits > 0x80000000u ? ~bits : bits | 0x80000000u;
}

}  // namespace moe::inline MOE_ABI
