// Four vector registers of sums, loaded from and rounded to any scalar type.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>

#if MOE_HAS_AVX2
#include <immintrin.h>
#elif MOE_HAS_SSE2
#include <emmintrin.h>
#endif

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

/// Whether a sum is rounded to become an S. The rounding takes longer than the memory then, so that
/// nothing is won by going past the cache: combine of bf16 12 GB/s through it, 10 past it (1 thread,
/// Zen 3, g++ 12, T = 4096, K = 2, M = 1024, 2026-11).
template <class S>
inline constexpr bool rounds = !std::is_same_v<S, accumulate_t<S>>;

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

/// bf16 of the floats in x and y, as the bits of one register. The vector code below gives the same
/// bits, except for NaN; it narrows by an instruction that saturates, where compilers use shuffles.
template <class Bits>
[[gnu::noinline]] Bits narrow_one_by_one(lanes<float>::vector x, lanes<float>::vector y) noexcept {
  constexpr int width = vector_bytes / static_cast<int>(sizeof(float));
  bf16 narrowed[2 * width];
  for (int l = 0; l < width; ++l) {
    narrowed[l] = static_cast<bf16>(x[l]);
    narrowed[width + l] = static_cast<bf16>(y[l]);
  }
  return __builtin_bit_cast(Bits, narrowed);
}

#if MOE_HAS_AVX2
/// The upper halves of floats that are no NaN, rounded to nearest even, in 32 bits with sign.
[[gnu::always_inline]] inline __m256i upper_half(__m256i bits) noexcept {
  __m256i const odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i const up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  return _mm256_srai_epi32(_mm256_add_epi32(bits, up), 16);
}
[[gnu::always_inline]] inline __m256i narrow(lanes<float>::vector x,
                                             lanes<float>::vector y) noexcept {
  auto const p = __builtin_bit_cast(__m256, x), q = __builtin_bit_cast(__m256, y);
  if (_mm256_movemask_ps(_mm256_cmp_ps(p, q, _CMP_UNORD_Q)) != 0) [[unlikely]]
    return narrow_one_by_one<__m256i>(x, y);
  return _mm256_permute4x64_epi64(
      _mm256_packs_epi32(upper_half(_mm256_castps_si256(p)), upper_half(_mm256_castps_si256(q))),
      0xd8);
}
[[gnu::always_inline]] inline lanes<float>::vector widen(bf16 const* from) noexcept {
  __m128i const bits = _mm_loadu_si128(reinterpret_cast<__m128i const*>(from));
  return __builtin_bit_cast(lanes<float>::vector,
                            _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
[[gnu::always_inline]] inline lanes<float> load_lanes(bf16 const* from) noexcept {
  return {widen(from), widen(from + 8), widen(from + 16), widen(from + 24)};
}
#elif MOE_HAS_SSE2
/// The upper halves of floats that are no NaN, rounded to nearest even, in 32 bits with sign.
[[gnu::always_inline]] inline __m128i upper_half(__m128i bits) noexcept {
  __m128i const odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
  __m128i const up = _mm_add_epi32(odd, _mm_set1_epi32(0x7fff));
  return _mm_srai_epi32(_mm_add_epi32(bits, up), 16);
}
[[gnu::always_inline]] inline __m128i narrow(lanes<float>::vector x,
                                             lanes<float>::vector y) noexcept {
  auto const p = __builtin_bit_cast(__m128, x), q = __builtin_bit_cast(__m128, y);
  if (_mm_movemask_ps(_mm_cmpunord_ps(p, q)) != 0) [[unlikely]]
    return narrow_one_by_one<__m128i>(x, y);
  return _mm_packs_epi32(upper_half(_mm_castps_si128(p)), upper_half(_mm_castps_si128(q)));
}
[[gnu::always_inline]] inline lanes<float> load_lanes(bf16 const* from) noexcept {
  __m128i const zero = _mm_setzero_si128();
  auto const* eight = reinterpret_cast<__m128i const*>(from);
  __m128i const low = _mm_loadu_si128(eight), high = _mm_loadu_si128(eight + 1);
  using vector = lanes<float>::vector;
  return {__builtin_bit_cast(vector, _mm_unpacklo_epi16(zero, low)),
          __builtin_bit_cast(vector, _mm_unpackhi_epi16(zero, low)),
          __builtin_bit_cast(vector, _mm_unpacklo_epi16(zero, high)),
          __builtin_bit_cast(vector, _mm_unpackhi_epi16(zero, high))};
}
#endif

/// Past: past the cache; `to` is aligned to a register then.
template <bool Past, class Vector>
[[gnu::always_inline]] inline void store_vector(void* to, Vector const& value) noexcept {
#if MOE_HAS_AVX2
  if constexpr (Past)
    return _mm256_stream_si256(static_cast<__m256i*>(to), __builtin_bit_cast(__m256i, value));
#elif MOE_HAS_SSE2
  if constexpr (Past)
    return _mm_stream_si128(static_cast<__m128i*>(to), __builtin_bit_cast(__m128i, value));
#endif
  std::memcpy(to, &value, sizeof value);
}

/// Rounds to S and stores `size` numbers. Past: past the cache; only what is not rounded, see
/// `rounds`.
template <bool Past, class S>
[[gnu::always_inline]] inline void store_lanes(S* to, lanes<accumulate_t<S>> const& x) noexcept {
  static_assert(!Past || !rounds<S>);
  using A = accumulate_t<S>;
  constexpr int width = vector_bytes / static_cast<int>(sizeof(A));
  if constexpr (std::is_same_v<S, A>) {
    store_vector<Past>(to, x.a);
    store_vector<Past>(to + width, x.b);
    store_vector<Past>(to + 2 * width, x.c);
    store_vector<Past>(to + 3 * width, x.d);
#if MOE_HAS_SSE2
  } else if constexpr (std::is_same_v<S, bf16>) {
    store_vector<Past>(to, narrow(x.a, x.b));
    store_vector<Past>(to + 2 * width, narrow(x.c, x.d));
#endif
  } else {
    A wide[lanes<A>::size];
    std::memcpy(wide, &x, sizeof wide);
    for (int l = 0; l < lanes<A>::size; ++l) to[l] = static_cast<S>(wide[l]);
  }
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
