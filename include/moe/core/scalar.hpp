// 16-bit storage types: bf16 and half, and what each scalar type is accumulated in.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>

namespace moe::inline MOE_ABI {

/// A bfloat16 number: the upper half of a float. 8 bits of exponent, 8 of precision.
///
/// A storage type: it has no arithmetic, and every conversion is spelled out, so no expression can
/// round twice without showing it. Conversion is by `static_cast`, which is the same in generic code
/// for float and double: `acc += static_cast<accumulate_t<T>>(x)`, `x = static_cast<T>(acc)`.
/// It rounds to nearest, ties to even; beyond the largest number comes infinity, NaN stays NaN.
/// There is none from double: that would round twice.
struct bf16 {
  std::uint16_t bits;

  bf16() = default;
  template <std::same_as<float> Float>
  MOE_HOST_DEVICE explicit constexpr bf16(Float x) noexcept : bits(rounded(x)) {}

  MOE_HOST_DEVICE static constexpr bf16 from_bits(std::uint16_t bits) noexcept {
    bf16 x{};
    x.bits = bits;
    return x;
  }

  MOE_HOST_DEVICE explicit constexpr operator float() const noexcept {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
  }
  MOE_HOST_DEVICE explicit constexpr operator double() const noexcept {
    return static_cast<float>(*this);
  }
  /// By value: -0 equals 0, NaN equals nothing.
  MOE_HOST_DEVICE friend constexpr bool operator==(bf16 a, bf16 b) noexcept {
    return static_cast<float>(a) == static_cast<float>(b);
  }

 private:
  // No branches, so that loops become vector code.
  MOE_HOST_DEVICE static constexpr std::uint16_t rounded(float x) noexcept {
    auto const u = __builtin_bit_cast(std::uint32_t, x);
    std::uint32_t const upper = u >> 16;
    std::uint32_t const nearest = (u + 0x7fffu + (upper & 1u)) >> 16;
    bool const nan = (u & 0x7fffffffu) > 0x7f800000u;
    return static_cast<std::uint16_t>(nan ? upper | 0x40u : nearest);
  }
};

/// An IEEE binary16 number, subnormal ones included. 5 bits of exponent, 11 of precision.
/// A storage type like `bf16`; beyond 65504 (from 65520 on, in float) comes infinity.
struct half {
  std::uint16_t bits;

  half() = default;
  template <std::same_as<float> Float>
  MOE_HOST_DEVICE explicit constexpr half(Float x) noexcept : bits(rounded(x)) {}

  MOE_HOST_DEVICE static constexpr half from_bits(std::uint16_t bits) noexcept {
    half x{};
    x.bits = bits;
    return x;
  }

  MOE_HOST_DEVICE explicit constexpr operator float() const noexcept {
    std::uint32_t const magnitude = static_cast<std::uint32_t>(bits & 0x7fffu) << 13;
    std::uint32_t const sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
    // The exponent moves from bias 15 to 127; that of infinity and NaN goes to the top.
    std::uint32_t const normal = magnitude + ((127u - 15u) << 23);
    std::uint32_t const top = ~detail::mask_if_less(magnitude, 31u << 23) & 0x7f800000u;
    // A subnormal is its mantissa times 2^-24: as a mantissa behind 2^-14, less that 2^-14.
    auto const shifted = __builtin_bit_cast(float, magnitude + (113u << 23));
    auto const subnormal = __builtin_bit_cast(std::uint32_t, shifted - 0x1p-14f);
    std::uint32_t const below = detail::mask_if_less(magnitude, 1u << 23);
    return __builtin_bit_cast(float, sign | top | (subnormal & below) | (normal & ~below));
  }
  MOE_HOST_DEVICE explicit constexpr operator double() const noexcept {
    return static_cast<float>(*this);
  }
  /// By value: -0 equals 0, NaN equals nothing.
  MOE_HOST_DEVICE friend constexpr bool operator==(half a, half b) noexcept {
    return static_cast<float>(a) == static_cast<float>(b);
  }

 private:
  // No branches, so that loops become vector code.
  MOE_HOST_DEVICE static constexpr std::uint16_t rounded(float x) noexcept {
    auto const u = __builtin_bit_cast(std::uint32_t, x);
    std::uint32_t const magnitude = u & 0x7fffffffu;
    // A carry out of the mantissa raises the exponent, up to that of infinity.
    std::uint32_t const odd = (magnitude >> 13) & 1u;
    std::uint32_t const normal = (magnitude - ((127u - 15u) << 23) + 0xfffu + odd) >> 13;
    // Below 2^-14 the addition of 0.5, whose last place is 2^-24, does the rounding.
    float const shifted = __builtin_bit_cast(float, magnitude) + 0.5f;
    std::uint32_t const subnormal = __builtin_bit_cast(std::uint32_t, shifted) - 0x3f000000u;
    std::uint32_t const below = detail::mask_if_less(magnitude, 113u << 23);
    std::uint32_t const finite = (subnormal & below) | (normal & ~below);
    // From 2^16 on: infinity, and NaN beyond that of float.
    std::uint32_t const large = ~detail::mask_if_less(magnitude, 143u << 23);
    std::uint32_t const nan = detail::mask_if_less(0x7f800000u, magnitude) & 0x200u;
    return static_cast<std::uint16_t>(((u >> 16) & 0x8000u) | (finite & ~large) |
                                      ((0x7c00u | nan) & large));
  }
};

static_assert(sizeof(bf16) == 2 && std::is_trivially_copyable_v<bf16> && std::is_trivial_v<bf16>);
static_assert(sizeof(half) == 2 && std::is_trivially_copyable_v<half> && std::is_trivial_v<half>);
static_assert(scalar<bf16> && scalar<half>);

namespace detail {

template <scalar T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};

}  // namespace detail

/// What sums of T are kept in: float for float, bf16 and half; double for double.
template <scalar T>
using accumulate_t = typename detail::accumulate<T>::type;

}  // namespace moe::inline MOE_ABI
