// Register tiles of a matrix product: the inner loops of grouped_gemm.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/expert/detail/simd.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

/// Rows of a tile: with two vectors of columns the accumulators fill the register file but for
/// the operands (12 of 16 registers, 24 of 32).
inline constexpr int tile_rows = MOE_VECTOR_BYTES == 64 ? 12 : 6;
/// Packed A is [k][a_stride]: whole vectors, so that it is transposed in registers.
inline constexpr int a_stride = MOE_VECTOR_BYTES == 64 ? 16 : 8;
/// Columns of a tile; packed B is panels of [k][tile_cols].
template <class V>
inline constexpr int tile_cols = 2 * lanes<V>;

/// What a tile of C holds before the first product is added.
enum class start { zero, bias, current };

/// C[r][j] = start + sum over k of a[k][r] b[k][j], for R rows and `n` <= tile_cols columns.
/// Every element adds its products in the order of k, one after another: its value does not depend
/// on R, on its place in the tile or on where k is cut.
///
/// @param c     R pointers to the first column of the tile.
/// @param bias  [n], read if from == start::bias.
template <int R, class V>
void multiply_tile(std::int64_t k, V const* __restrict a, V const* __restrict b, V* const* c,
                   std::int64_t column, int n, start from, V const* bias) {
  constexpr int L = lanes<V>;
  constexpr int N = tile_cols<V>;
  simd<V> low[R], high[R];
  bool const whole = n == N;
  V edge[N] = {};
  if (from == start::current) {
    unroll<R>([&](auto i) {
      V const* source = c[i] + column;
      if (!whole) source = std::copy_n(source, n, edge) - n;
      low[i] = load(source);
      high[i] = load(source + L);
    });
  } else {
    if (from == start::bias) std::copy_n(bias, n, edge);
    unroll<R>([&](auto i) {
      low[i] = load(edge);
      high[i] = load(edge + L);
    });
  }
  for (; k > 0; --k, a += a_stride, b += N) {
    simd<V> const b0 = load(b), b1 = load(b + L);
    unroll<R>([&](auto i) {
      low[i] += a[i] * b0;
      high[i] += a[i] * b1;
    });
  }
  unroll<R>([&](auto i) {
    if (whole) {
      store(c[i] + column, low[i]);
      store(c[i] + column + L, high[i]);
    } else {
      store(edge, low[i]);
      store(edge + L, high[i]);
      std::copy_n(edge, n, c[i] + column);
    }
  });
}

/// Rows of B that one pass of `stream_tile` reads: that many sequential streams of memory.
inline constexpr int stream_depth = 8;

/// c[r][j] += sum over k of a[k][r] b[k][j] for R rows and W vectors of columns, with B where
/// it lies: no packing, each row of B is one stream. Order of k as in multiply_tile.
template <int R, int W, class V>
MOE_ALWAYS_INLINE void stream_tile(std::int64_t k, V const* a, V const* b, std::int64_t ldb, V* c,
                                   std::int64_t ldc) {
  constexpr int L = lanes<V>;
  simd<V> sum[R][W];
  unroll<R>([&](auto i) { unroll<W>([&](auto w) { sum[i][w] = load(c + i * ldc + w * L); }); });
  for (; k > 0; --k, a += a_stride, b += ldb)
    unroll<W>([&](auto w) {
      simd<V> const v = load(b + w * L);
      unroll<R>([&](auto i) { sum[i][w] += a[i] * v; });
    });
  unroll<R>([&](auto i) { unroll<W>([&](auto w) { store(c + i * ldc + w * L, sum[i][w]); }); });
}

/// out[i][j] = sum over k of a[i][k] b[j][k] for RA x RB rows, both along k: no packing.
/// Lanes add every L-th product, then each other.
template <int RA, int RB, class V>
MOE_ALWAYS_INLINE void dot_tile(std::int64_t k, V const* const (&a)[RA], V const* b,
                                std::int64_t ldb, V (&out)[RA][RB]) {
  constexpr int L = lanes<V>;
  simd<V> sum[RA][RB] = {};
  auto const add = [&](auto const& row_of_a, auto const& row_of_b) {
    simd<V> u[RA];
    unroll<RA>([&](auto i) { u[i] = row_of_a(i); });
    unroll<RB>([&](auto j) {
      simd<V> const v = row_of_b(j);
      unroll<RA>([&](auto i) { sum[i][j] += u[i] * v; });
    });
  };
  std::int64_t p = 0;
  for (; p + L <= k; p += L)
    add([&](auto i) { return load(a[i] + p); }, [&](auto j) { return load(b + j * ldb + p); });
  if (p < k) {
    auto const rest = [&](V const* from) {
      V padded[L] = {};
      std::copy_n(from + p, k - p, padded);
      return load(padded);
    };
    add([&](auto i) { return rest(a[i]); }, [&](auto j) { return rest(b + j * ldb); });
  }
  unroll<RA>([&](auto i) { unroll<RB>([&](auto j) { out[i][j] = sum_of_lanes<V>(sum[i][j]); }); });
}

}  // namespace moe::inline MOE_ABI::detail::gemm
