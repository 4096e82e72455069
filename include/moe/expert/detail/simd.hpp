// Vectors of one register, as the compiler's vector extension: any instruction set, one source.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

template <class V>
struct register_of {
  typedef V type __attribute__((vector_size(MOE_VECTOR_BYTES)));
};
/// As many elements as one register holds.
template <class V>
using simd = typename register_of<V>::type;

template <class V>
inline constexpr int lanes = MOE_VECTOR_BYTES / static_cast<int>(sizeof(V));

template <class V>
MOE_ALWAYS_INLINE simd<V> load(V const* from) noexcept {
  simd<V> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
MOE_ALWAYS_INLINE void store(V* to, simd<V> v) noexcept {
  std::memcpy(to, &v, sizeof v);
}

template <int... I, class F>
MOE_ALWAYS_INLINE void unroll(std::integer_sequence<int, I...>, F const& f) {
  (f(std::integral_constant<int, I>{}), ...);
}
/// f(0), f(1), ... f(N - 1) with compile-time arguments, so that arrays become registers.
template <int N, class F>
MOE_ALWAYS_INLINE void unroll(F const& f) {
  unroll(std::make_integer_sequence<int, N>{}, f);
}

/// u and l with their lanes chosen by `lane(i)`, which counts those of l after those of u. Spelled out:
/// nvcc 13.0 loses a parameter pack in the arguments of this builtin.
template <class V, class Lane>
MOE_ALWAYS_INLINE simd<V> shuffle(simd<V> u, simd<V> l, Lane) noexcept {
  constexpr Lane at{};
  if constexpr (lanes<V> == 2)
    return __builtin_shufflevector(u, l, at(0), at(1));
  else if constexpr (lanes<V> == 4)
    return __builtin_shufflevector(u, l, at(0), at(1), at(2), at(3));
  else if constexpr (lanes<V> == 8)
    return __builtin_shufflevector(u, l, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7));
  else
    return __builtin_shufflevector(u, l, at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7),
                                   at(8), at(9), at(10), at(11), at(12), at(13), at(14), at(15));
}

template <int Step, int Lanes>
struct upper_lane {
  constexpr int operator()(int i) const noexcept { return (i & Step) != 0 ? Lanes + i - Step : i; }
};
template <int Step, int Lanes>
struct lower_lane {
  constexpr int operator()(int i) const noexcept { return (i & Step) != 0 ? Lanes + i : i + Step; }
};

/// One step of a transposition: exchanges the off-diagonal blocks of width `Step` of two rows.
template <int Step, class V>
MOE_ALWAYS_INLINE void exchange_blocks(simd<V>& upper, simd<V>& lower) noexcept {
  simd<V> const u = upper, l = lower;
  upper = shuffle<V>(u, l, upper_lane<Step, lanes<V>>{});
  lower = shuffle<V>(u, l, lower_lane<Step, lanes<V>>{});
}

/// Transposes a square of lanes x lanes elements in registers.
template <class V>
MOE_ALWAYS_INLINE void transpose(simd<V> (&row)[lanes<V>]) noexcept {
  constexpr int L = lanes<V>;
  auto const step = [&]<int Step>(std::integral_constant<int, Step>) {
    if constexpr (Step < L)
      unroll<L>([&](auto i) {
        if constexpr ((i & Step) == 0) exchange_blocks<Step, V>(row[i], row[i + Step]);
      });
  };
  step(std::integral_constant<int, 1>{});
  step(std::integral_constant<int, 2>{});
  step(std::integral_constant<int, 4>{});
  step(std::integral_constant<int, 8>{});
}

/// The sum of all lanes, added in halves.
template <class V>
MOE_ALWAYS_INLINE V sum_of_lanes(simd<V> v) noexcept {
  V lane[lanes<V>];
  std::memcpy(lane, &v, sizeof v);
  for (int width = lanes<V> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

}  // namespace moe::inline MOE_ABI::detail::gemm
