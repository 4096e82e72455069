// Elementary functions that CPU and GPU share, and tests that survive any optimisation flag.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// All bits if a < b, else none; a and b below 2^31. Selecting by masks keeps loops free of branches:
/// g++ moves a floating-point operation into the branch of `?:` that uses it, and then finds no way
/// to turn the loop into vector code.
MOE_HOST_DEVICE constexpr std::uint32_t mask_if_less(std::uint32_t a, std::uint32_t b) noexcept {
  return static_cast<std::uint32_t>(static_cast<std::int32_t>(a - b) >> 31);
}

}  // namespace detail

/// `a` if condition, else `b`, by bits: a conditional operator lets compilers move the work for `a`
/// and `b` into branches, and a loop with branches does not become vector code.
template <std::floating_point V>
MOE_HOST_DEVICE constexpr V where(bool condition, V a, V b) noexcept {
  using Bits = std::conditional_t<sizeof(V) == 4, std::int32_t, std::int64_t>;
  Bits const mask = -static_cast<Bits>(condition);
  return __builtin_bit_cast(
      V, (__builtin_bit_cast(Bits, a) & mask) | (__builtin_bit_cast(Bits, b) & ~mask));
}

/// Divides by one number again and again. On a GPU, where a division takes ten times as long as a
/// product, by its reciprocal: within four units in the last place.
template <std::floating_point V>
class divided_by {
 public:
  /// @param moderate  Whether the divisor's size is known to be between 2^-100 and 2^100.
  MOE_HOST_DEVICE explicit divided_by(V divisor, [[maybe_unused]] bool moderate = false) noexcept
      : number_(divisor) {
#if MOE_DEVICE_PASS
    // So that the reciprocal is neither infinite nor denormal; powers of two change no other bit.
    V const size = divisor < 0 ? -divisor : divisor;
    if (!moderate)
      scale_ = size < V(0x1p-100) ? V(0x1p100) : size > V(0x1p100) ? V(0x1p-100) : V(1);
    if constexpr (sizeof(V) == 4)
      number_ = __fdividef(1.0f, divisor * scale_);  // no call for numbers that do not come
    else
      number_ = 1 / (divisor * scale_);
#endif
  }

  MOE_HOST_DEVICE constexpr V operator()(V x) const noexcept {
#if MOE_DEVICE_PASS
    return x * scale_ * number_;
#else
    return x / number_;
#endif
  }

 private:
  V number_;
  V scale_ = 1;  // of device code
};

/// e to the x. float: within 1.1 units in the last place, 0 below -87.3, +inf above 88.7, NaN for
/// NaN; without branches, so that compilers turn loops over it into vector code. double: std::exp.
MOE_HOST_DEVICE inline float exp(float x) noexcept {
#if MOE_DEVICE_PASS
  return ::expf(x);
#else
  auto const bits = __builtin_bit_cast(std::uint32_t, x);
  std::uint32_t const sign = bits & 0x80000000u;
  std::uint32_t const magnitude = bits ^ sign;
  std::uint32_t const negative = 0u - (sign >> 31);
  constexpr std::uint32_t lowest = __builtin_bit_cast(std::uint32_t, 87.3f);
  constexpr std::uint32_t highest = __builtin_bit_cast(std::uint32_t, 88.7f);
  constexpr std::uint32_t infinity = 0x7f800000u;
  std::uint32_t const limit = highest - (negative & (highest - lowest));
  std::uint32_t const outside = detail::mask_if_less(limit, magnitude);
  std::uint32_t const nan = detail::mask_if_less(infinity, magnitude);
  // x = n ln2 + r with |r| <= ln2 / 2; e^r by a polynomial of degree 7 (Cephes' expf).
  auto const inside = __builtin_bit_cast(float, bits & ~outside);
  auto const signed_half = __builtin_bit_cast(float, sign | 0x3f000000u);
  auto const n = static_cast<std::int32_t>(inside * 1.44269504088896341f + signed_half);
  auto const real_n = static_cast<float>(n);
  float const r = (inside - real_n * 0.693359375f) - real_n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  float const e_to_r = p * (r * r) + r + 1.0f;
  // 2^n by its exponent bits, in two factors because n = 128 has none of its own.
  std::int32_t const half = n >> 1;
  auto const scale0 = __builtin_bit_cast(float, (half + 127) << 23);
  auto const scale1 = __builtin_bit_cast(float, (n - half + 127) << 23);
  auto const value = __builtin_bit_cast(std::uint32_t, (e_to_r * scale0) * scale1);
  std::uint32_t const beyond = (infinity & ~negative) | (bits & nan);
  return __builtin_bit_cast(float, (value & ~outside) | (beyond & outside));
#endif
}
MOE_HOST_DEVICE inline double exp(double x) noexcept {
  return ::exp(x);
}

/// log(1 + e^x) > 0, or 0 where that underflows; NaN for NaN. float: within 3 units in the last place of
/// the true value down to x = -87.3, below which it is 0; without branches, as `exp` is.
MOE_HOST_DEVICE inline float softplus(float x) noexcept {
  // max(x, 0) + log1p(y) with y = e^-|x| <= 1: log1p(y) = 2 atanh(z), z = y / (2 + y) <= 1 / 3.
  bool const negative = x < 0.0f;
  float const y = moe::exp(where(negative, x, -x));
  float const z = y / (2.0f + y), w = z * z;
  float p = 1.0f / 15;
  p = p * w + 1.0f / 13;
  p = p * w + 1.0f / 11;
  p = p * w + 1.0f / 9;
  p = p * w + 1.0f / 7;
  p = p * w + 1.0f / 5;
  p = p * w + 1.0f / 3;
  p = p * w + 1.0f;
  return where(negative, 0.0f, x) + 2.0f * z * p;
}
MOE_HOST_DEVICE inline double softplus(double x) noexcept {
  return x < 0 ? ::log1p(::exp(x)) : x + ::log1p(::exp(-x));
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
