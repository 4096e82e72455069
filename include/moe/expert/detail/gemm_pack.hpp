// Copies blocks of matrices into the order in which register tiles read them.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/expert/detail/gemm_kernel.hpp>
#include <moe/expert/detail/simd.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

/// to[p][i] = row[i][p] for i < rows and p < k, as [k][stride]; the rest of each group of lanes is 0.
/// @param row  `row(i)` points to element 0 of row i.
template <class V, class Row>
void pack_transposed(Row const& row, int rows, std::int64_t k, int stride, V* __restrict to) {
  constexpr int L = lanes<V>;
  for (int group = 0; group < stride; group += L) {
    int const live = std::clamp(rows - group, 0, L);
    V const* from[L];
    for (int i = 0; i < live; ++i) from[i] = row(group + i);
    std::int64_t p = 0;
    if (live == 0) {
      for (; p < k; ++p) store(to + p * stride + group, simd<V>{});
      continue;
    }
    for (int i = live; i < L; ++i) from[i] = from[0];  // read, never used
    for (; p + L <= k; p += L) {
      simd<V> block[L];
      unroll<L>([&](auto i) { block[i] = load(from[i] + p); });
      transpose<V>(block);
      unroll<L>([&](auto i) { store(to + (p + i) * stride + group, block[i]); });
    }
    for (; p < k; ++p)
      for (int i = 0; i < L; ++i) to[p * stride + group + i] = from[i][p];
  }
}

/// to[p][i] = row[p][i] for i < columns and p < k, as [k][stride]; the rest is 0.
/// @param row  `row(p)` points to the first of the columns in row p.
template <class V, class Row>
void pack_copied(Row const& row, int columns, std::int64_t k, int stride, V* __restrict to) {
  if (columns == stride) {
    for (std::int64_t p = 0; p < k; ++p, to += stride) std::copy_n(row(p), stride, to);
    return;
  }
  for (std::int64_t p = 0; p < k; ++p, to += stride)
    std::fill(std::copy_n(row(p), columns, to), to + stride, V(0));
}

/// Asks for n elements that will be read soon.
template <class V>
MOE_ALWAYS_INLINE void prefetch(V const* from, std::int64_t n) noexcept {
  for (std::int64_t i = 0; i < n; i += 64 / static_cast<int>(sizeof(V)))
    __builtin_prefetch(from + i);
}
inline constexpr std::int64_t ahead = 8;

/// Panels of B from rows along n: to[panel][p][j] = row(p)[panel * tile_cols + j]; columns beyond n are 0.
template <class V, class Row>
void pack_panels_copied(Row const& row, std::int64_t n, std::int64_t k, V* __restrict to) {
  constexpr int N = tile_cols<V>;
  for (std::int64_t p = 0; p < k; ++p) {
    // Rows are short and far apart: too little for the hardware to see a stream.
    if (p + ahead < k) prefetch(row(p + ahead), n);
    V const* from = row(p);
    V* panel = to + p * N;
    std::int64_t j = 0;
    for (; j + N <= n; j += N, panel += k * N) {
      store(panel, load(from + j));
      store(panel + N / 2, load(from + j + N / 2));
    }
    if (j < n) std::fill(std::copy_n(from + j, n - j, panel), panel + N, V(0));
  }
}

/// Panels of B from rows along k: to[panel][p][j] = row(panel * tile_cols + j)[p].
template <class V, class Row>
void pack_panels_transposed(Row const& row, std::int64_t n, std::int64_t k, V* __restrict to) {
  constexpr int N = tile_cols<V>;
  for (std::int64_t j = 0; j < n; j += N, to += k * N)
    pack_transposed<V>([&](int i) { return row(j + i); },
                       static_cast<int>(std::min<std::int64_t>(N, n - j)), k, N, to);
}

}  // namespace moe::inline MOE_ABI::detail::gemm
