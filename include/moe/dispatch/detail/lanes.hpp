// Four vector registers of sums, loaded from and rounded to any scalar type.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

// Spelled out and forced inline, because g++ 12 at -O2 makes no vector code of loops with an unknown
// end, does not keep an array of sums in registers, and passes lanes through memory.
#if MOE_HAS_AVX2
inline constexpr int vector_bytes = 32;
#else
inline constexpr int vector_bytes = 16;
#endif
template <class A>
struct native_vector;
template <>
struct native_vector<float> {
  typedef float type __attribute__((vector_size(vector_bytes)));
};
template <>
struct native_vector<double> {
  typedef double type __attribute__((vector_size(vector_bytes)));
};

/// `size` numbers of type A, float or double.
template <class A>
struct lanes {
  using vector = typename native_vector<A>::type;
  static constexpr int size = 4 * vector_bytes / static_cast<int>(sizeof(A));

  vector a, b, c, d;

  /// this += w * x
  [[gnu::always_inline]] void add(A w, lanes const& x) noexcept {
    a += w * x.a;
    b += w * x.b;
    c += w * x.c;
    d += w * x.d;
  }
  /// this += x * y
  [[gnu::always_inline]] void add(lanes const& x, lanes const& y) noexcept {
    a += x.a * y.a;
    b += x.b * y.b;
    c += x.c * y.c;
    d += x.d * y.d;
  }
  [[gnu::always_inline]] static lanes product(A w, lanes const& x) noexcept {
    return {w * x.a, w * x.b, w * x.c, w * x.d};
  }
  /// The sum of all, as a tree.
  A total() const noexcept {
    vector const sum = (a + b) + (c + d);
    constexpr int width = vector_bytes / static_cast<int>(sizeof(A));
    A lane[width];
    std::memcpy(lane, &sum, sizeof lane);
    for (int half = width / 2; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
    return lane[0];
  }
};

template <class S>
inline constexpr int lane_count = lanes<accumulate_t<S>>::size;

template <class A>
[[gnu::always_inline]] inline typename lanes<A>::vector load_vector(A const* from) noexcept {
  typename lanes<A>::vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

/// from[0 .. size), widened.
template <class S>
[[gnu::always_inline]] inline lanes<accumulate_t<S>> load_lanes(S const* from) noexcept {
  using A = accumulate_t<S>;
  constexpr int width = vector_bytes / static_cast<int>(sizeof(A));
  if constexpr (std::is_same_v<S, A>) {
    return {load_vector(from), load_vector(from + width), load_vector(from + 2 * width),
            load_vector(from + 3 * width)};
  } else {
    A wide[lanes<A>::size];
    for (int l = 0; l < lanes<A>::size; ++l) wide[l] = static_cast<A>(from[l]);
    return load_lanes(static_cast<A const*>(wide));
  }
}

typedef std::uint32_t bits_vector __attribute__((vector_size(vector_bytes)));

/// Two bf16 in each 32 bits: the one in the upper half is a float as it stands, but for the lower
/// half, and the other one after a shift. So a lane is not of the column that its place suggests, but
/// store_lanes knows, and sums do not care.
[[gnu::always_inline]] inline lanes<float> load_lanes(bf16 const* from) noexcept {
  using vector = lanes<float>::vector;
  constexpr int width = vector_bytes / static_cast<int>(sizeof(bf16));
  bits_vector x, y;
  std::memcpy(&x, from, sizeof x);
  std::memcpy(&y, from + width, sizeof y);
  return {__builtin_bit_cast(vector, x << 16), __builtin_bit_cast(vector, x & 0xffff0000u),
          __builtin_bit_cast(vector, y << 16), __builtin_bit_cast(vector, y & 0xffff0000u)};
}

/// The upper halves are rounded to nearest even. A NaN stays one: arithmetic gives only quiet ones.
[[gnu::always_inline]] inline bits_vector round_upper(lanes<float>::vector x) noexcept {
  auto const bits = __builtin_bit_cast(bits_vector, x);
  auto const is_number = __builtin_bit_cast(bits_vector, x == x);
  return bits + (((bits >> 16 & 1u) + 0x7fffu) & is_number);
}
[[gnu::always_inline]] inline bits_vector narrow(lanes<float>::vector lower,
                                                 lanes<float>::vector upper) noexcept {
  return round_upper(lower) >> 16 | (round_upper(upper) & 0xffff0000u);
}

/// Past: past the cache; `to` is aligned to a register then.
template <bool Past, class Vector>
[[gnu::always_inline]] inline void store_vector(void* to, Vector const& value) noexcept {
  if constexpr (Past) {
    auto const x = __builtin_bit_cast(native_vector<float>::type, value);
    MOE_STREAM(static_cast<float*>(to), x);
  } else {
    std::memcpy(to, &value, sizeof value);
  }
}

/// Rounds to S and stores `size` numbers.
template <bool Past, class S>
[[gnu::always_inline]] inline void store_lanes(S* to, lanes<accumulate_t<S>> const& x) noexcept {
  using A = accumulate_t<S>;
  constexpr int width = vector_bytes / static_cast<int>(sizeof(S));
  if constexpr (std::is_same_v<S, A>) {
    store_vector<Past>(to, x.a);
    store_vector<Past>(to + width, x.b);
    store_vector<Past>(to + 2 * width, x.c);
    store_vector<Past>(to + 3 * width, x.d);
  } else if constexpr (std::is_same_v<S, bf16>) {
    store_vector<Past>(to, narrow(x.a, x.b));
    store_vector<Past>(to + width, narrow(x.c, x.d));
  } else {
    A wide[lanes<A>::size];
    S rounded[lanes<A>::size];
    std::memcpy(wide, &x, sizeof wide);
    for (int l = 0; l < lanes<A>::size; ++l) rounded[l] = static_cast<S>(wide[l]);
    bits_vector packed[2];
    static_assert(sizeof packed == sizeof rounded);
    std::memcpy(packed, rounded, sizeof packed);
    store_vector<Past>(to, packed[0]);
    store_vector<Past>(to + width, packed[1]);
  }
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
