// A few neighbouring elements of a row, which a thread of a kernel loads, computes with and stores.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Bytes of the widest access of a GPU's thread.
inline constexpr int access_bytes = 16;

/// `Size` elements of S, as they lie in memory that is aligned to all of them.
template <class S, int Size>
struct alignas(sizeof(S) * Size) chunk {
  static constexpr int size = Size;
  S element[Size];
};

#if MOE_IS_CUDA
/// What one instruction moves.
template <int Bytes>
struct machine_word;
template <>
struct machine_word<16> {
  using type = uint4;
};
template <>
struct machine_word<8> {
  using type = unsigned long long;
};
template <>
struct machine_word<4> {
  using type = unsigned;
};
template <>
struct machine_word<2> {
  using type = unsigned short;
};
template <class Chunk>
using word_of = typename machine_word<sizeof(Chunk)>::type;
#endif

template <class Chunk, class S>
MOE_HOST_DEVICE inline Chunk load(S const* from) noexcept {
#if MOE_DEVICE_PASS
  return __builtin_bit_cast(Chunk, *reinterpret_cast<word_of<Chunk> const*>(from));
#else
  Chunk x;
  std::memcpy(&x, from, sizeof x);
  return x;
#endif
}

/// The same for what nobody needs again: the first lines of the caches to make room. Call it
/// under no condition: nvcc 13 moves what a branch has loaded to where both its sides expect it, and
/// waits for it there, so that the loads of several rows come one after the other.
template <class Chunk, class S>
MOE_HOST_DEVICE inline Chunk load_once(S const* from) noexcept {
#if MOE_DEVICE_PASS
  // Volatile, as the stores are, for its place among them: they may be to the same address.
  if constexpr (sizeof(Chunk) == access_bytes) {
    uint4 x;
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from));
    return __builtin_bit_cast(Chunk, x);
  }
#endif
  return load<Chunk>(from);
}

/// @param streaming  Nobody reads it while it could still be in the caches.
template <class Chunk, class S>
MOE_HOST_DEVICE inline void store(S* to, Chunk const& x, [[maybe_unused]] bool streaming) noexcept {
#if MOE_DEVICE_PASS
  if constexpr (sizeof(Chunk) == access_bytes) {
    auto const word = __builtin_bit_cast(uint4, x);
    if (streaming)
      asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x),
                   "r"(word.y), "r"(word.z), "r"(word.w)
                   : "memory");
    else
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word.x), "r"(word.y),
                   "r"(word.z), "r"(word.w)
                   : "memory");
  } else {
    *reinterpret_cast<word_of<Chunk>*>(to) = __builtin_bit_cast(word_of<Chunk>, x);
  }
#else
  std::memcpy(to, &x, sizeof x);
#endif
}

/// a * b + c, in one rounding on a GPU.
template <class A>
MOE_HOST_DEVICE inline A multiply_add(A a, A b, A c) noexcept {
#if MOE_DEVICE_PASS
  if constexpr (std::is_same_v<A, float>)
    return __fmaf_rn(a, b, c);
  else
    return __fma_rn(a, b, c);
#else
  return a * b + c;
#endif
}

template <class S>
MOE_HOST_DEVICE inline accumulate_t<S> widen(S x) noexcept {
#if MOE_DEVICE_PASS
  if constexpr (std::is_same_v<S, half>) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
  }
#endif
  return static_cast<accumulate_t<S>>(x);
}

template <class S, int Size>
MOE_HOST_DEVICE inline void widen(accumulate_t<S> (&to)[Size], chunk<S, Size> const& x) noexcept {
#if MOE_DEVICE_PASS
  // The upper one of two bf16 is a float with the lower one behind its last digit.
  if constexpr (std::is_same_v<S, bf16> && Size == 8) {
    auto const two = __builtin_bit_cast(uint4, x);
    std::uint32_t const word[4] = {two.x, two.y, two.z, two.w};
    MOE_UNROLL
    for (int i = 0; i < Size; i += 2) {
      to[i] = __builtin_bit_cast(float, word[i / 2] << 16);
      to[i + 1] = __builtin_bit_cast(float, word[i / 2] & 0xffff0000u);
    }
  } else
#endif
  {
    MOE_UNROLL
    for (int i = 0; i < Size; ++i) to[i] = widen(x.element[i]);
  }
}

#if MOE_DEVICE_PASS
/// Two numbers in one instruction, the first in the lower half.
template <class S>
MOE_HOST_DEVICE inline std::uint32_t narrow_two(float first, float second) noexcept {
  std::uint32_t both;
  if constexpr (std::is_same_v<S, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
#endif

/// Each number rounded to S; a NaN becomes a NaN, on a GPU not always the same one.
template <class S, int Size>
MOE_HOST_DEVICE inline chunk<S, Size> narrow(accumulate_t<S> const (&x)[Size]) noexcept {
  chunk<S, Size> result;
#if MOE_DEVICE_PASS
  if constexpr (sizeof(S) == 2 && Size == 8) {
    result = __builtin_bit_cast(decltype(result),
                                uint4{narrow_two<S>(x[0], x[1]), narrow_two<S>(x[2], x[3]),
                                      narrow_two<S>(x[4], x[5]), narrow_two<S>(x[6], x[7])});
  } else
#endif
  {
    MOE_UNROLL
    for (int i = 0; i < Size; ++i) result.element[i] = static_cast<S>(x[i]);
  }
  return result;
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
