// One task of a grouped product: a block of C from packed, streamed or dotted operands.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/detail/gemm_kernel.hpp>
#include <moe/expert/detail/gemm_pack.hpp>
#include <moe/expert/detail/simd.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

// Packed B, depth x panel_cols, takes half of a 512 KiB second-level cache. Measured on Zen 3 with
// 1024 x 2816 weights out of cache: depth 128 x 512 columns against 256 x 256 is 1.05 at 128 rows.
inline constexpr std::int64_t depth = 128;
template <class V>
inline constexpr std::int64_t panel_cols = 32 * tile_cols<V>;
/// With few rows memory is the bound, and the next block of B must fit beside the packed one (24
/// rows: 1.2 over no prefetch).
inline constexpr std::int64_t thin_depth = 64, thin_rows = 48;
/// Rows of one task: packing B costs less than 1 % of the products of this many rows.
inline constexpr std::int64_t chunk_rows = 480;

/// Elements of V that one thread needs: packed B, then packed A.
template <class V>
inline constexpr std::int64_t room_elements = depth * (panel_cols<V> + a_stride);

/// Cuts m rows into blocks of almost equal height, at most `most` each: 7 rows are 4 + 3, not 6 + 1.
struct even_blocks {
  std::int64_t m, blocks;
  constexpr even_blocks(std::int64_t rows, std::int64_t most) noexcept
      : m(rows), blocks((rows + most - 1) / most) {}
  constexpr std::int64_t first(std::int64_t b) const noexcept { return m * b / blocks; }
};

template <class V, int... R>
constexpr auto tile_for(int rows, std::integer_sequence<int, R...>) noexcept {
  using tile =
      void (*)(std::int64_t, V const*, V const*, V* const*, std::int64_t, int, start, V const*);
  constexpr tile of_height[] = {&multiply_tile<R + 1, V>...};
  return of_height[rows - 1];
}

/// C [m,n] = start + A [m,k] B [k,n], n <= panel_cols, with both operands packed.
///
/// @param pack_b  pack_b(k0, kc, to): panels of rows [k0, k0 + kc) of B; called once for each k0.
/// @param pack_a  pack_a(i0, rows, k0, kc, to): as [kc][a_stride].
/// @param c_row   c_row(i): first of the n columns in row i of C.
/// @param touch   touch(k0, k1, j0, j1): prefetches that part of B, which will be packed next.
template <class V, class PackA, class PackB, class Touch, class RowOfC>
void multiply_packed(std::int64_t m, std::int64_t n, std::int64_t k, PackA const& pack_a,
                     PackB const& pack_b, Touch const& touch, RowOfC const& c_row, start from,
                     V const* bias, V* room) {
  constexpr int N = tile_cols<V>;
  V* const b = room;                          // [panels][kc][N]
  V* const a = room + depth * panel_cols<V>;  // [kc][a_stride]
  even_blocks const blocks(m, tile_rows);
  std::int64_t const most = m <= thin_rows ? thin_depth : depth;
  std::int64_t k0 = 0;
  do {
    std::int64_t const kc = std::min(most, k - k0), next = std::min(most, k - k0 - kc);
    pack_b(k0, kc, b);
    for (std::int64_t block = 0; block < blocks.blocks; ++block) {
      std::int64_t const i0 = blocks.first(block);
      int const rows = static_cast<int>(blocks.first(block + 1) - i0);
      pack_a(i0, rows, k0, kc, a);
      V* c[tile_rows];
      for (int i = 0; i < rows; ++i) c[i] = c_row(i0 + i);
      auto const tile = tile_for<V>(rows, std::make_integer_sequence<int, tile_rows>{});
      for (std::int64_t j = 0; j < n; j += N) {
        // Each tile asks for its share of the next block of B, so that memory is busy meanwhile.
        touch(k0 + kc + next * block / blocks.blocks, k0 + kc + next * (block + 1) / blocks.blocks,
              j, std::min(j + N, n));
        tile(kc, a, b + j * kc, c, j, static_cast<int>(std::min<std::int64_t>(N, n - j)),
             k0 == 0 ? from : start::current, bias + (from == start::bias ? j : 0));
      }
    }
    k0 += kc;
  } while (k0 < k);
}

/// Columns that streaming works on at a time.
template <class V>
inline constexpr int strip_cols = 8 * lanes<V>;

template <int R, class V>
void stream_strip(std::int64_t k, V const* a, V const* b, std::int64_t ldb, V* c,
                  std::int64_t ldc) {
  // Few rows need more columns, so that enough sums are in flight to hide the latency of adding.
  constexpr int W = R == 1 ? 8 : (R <= 3 ? 4 : 2);
  for (int w = 0; w < 8; w += W)
    stream_tile<R, W>(k, a, b + w * lanes<V>, ldb, c + w * lanes<V>, ldc);
}

template <class V, int... R>
constexpr auto strip_for(int rows, std::integer_sequence<int, R...>) noexcept {
  using strip = void (*)(std::int64_t, V const*, V const*, std::int64_t, V*, std::int64_t);
  constexpr strip of_height[] = {&stream_strip<R + 1, V>...};
  return of_height[rows - 1];
}

/// Most rows that read B where it lies: for more, packing it pays.
inline constexpr std::int64_t streamed_rows = tile_rows;

/// C [m,n] = bias + A [m,k] B [k,n] for m <= streamed_rows, n <= panel_cols: B is read once, in rows.
/// @param a_row, c_row  Pointers to rows, as in multiply_packed.
template <class V, class RowOfA, class RowOfC>
void multiply_streamed(std::int64_t m, std::int64_t n, std::int64_t k, RowOfA const& a_row,
                       matrix_view<V const> b, RowOfC const& c_row, V const* bias, V* room) {
  constexpr std::int64_t S = strip_cols<V>;
  static_assert(panel_cols<V> % S == 0 && streamed_rows <= depth);
  std::int64_t const ldc = panel_cols<V>;
  V* const c = room;  // [m][ldc]
  for (std::int64_t i = 0; i < m; ++i) {
    V* const to = c + i * ldc;
    if (bias != nullptr)
      std::fill(std::copy_n(bias, n, to), to + ldc, V(0));
    else
      std::fill_n(to, ldc, V(0));
  }
  even_blocks const blocks(m, tile_rows);
  for (std::int64_t k0 = 0; k0 < k; k0 += stream_depth) {
    std::int64_t const kc = std::min<std::int64_t>(stream_depth, k - k0);
    V a[streamed_rows / tile_rows][stream_depth * a_stride] = {};
    for (std::int64_t block = 0; block < blocks.blocks; ++block)
      for (std::int64_t i = blocks.first(block); i < blocks.first(block + 1); ++i) {
        V const* const from = a_row(i) + k0;
        V* const to = a[block] + (i - blocks.first(block));
        for (std::int64_t p = 0; p < kc; ++p) to[p * a_stride] = from[p];
      }
    for (std::int64_t j = 0; j < n; j += S) {
      V const* strip = b.row(k0) + j;
      std::int64_t ld = b.ld();
      V edge[stream_depth * S];
      if (n - j < S) {
        for (std::int64_t p = 0; p < kc; ++p)
          std::fill(std::copy_n(strip + p * ld, n - j, edge + p * S), edge + (p + 1) * S, V(0));
        strip = edge;
        ld = S;
      }
      for (std::int64_t block = 0; block < blocks.blocks; ++block) {
        std::int64_t const i0 = blocks.first(block);
        int const rows = static_cast<int>(blocks.first(block + 1) - i0);
        strip_for<V>(rows, std::make_integer_sequence<int, tile_rows>{})(kc, a[block], strip, ld,
                                                                         c + i0 * ldc + j, ldc);
      }
    }
  }
  for (std::int64_t i = 0; i < m; ++i) std::copy_n(c + i * ldc, n, c_row(i));
}

/// Most rows that dot B's rows where they lie: for more, transposing it pays.
inline constexpr std::int64_t dotted_rows = 9;

/// C [m,n] (+)= A [m,k] B^T, B [n,k], by dot products of rows.
template <class V, class RowOfA, class RowOfC>
void multiply_dotted(std::int64_t m, std::int64_t k, RowOfA const& a_row, matrix_view<V const> b,
                     RowOfC const& c_row, bool add) {
  even_blocks const blocks(m, 3);
  auto const run = [&]<int RA, int RB>(std::integral_constant<int, RA>,
                                       std::integral_constant<int, RB>, std::int64_t i0,
                                       std::int64_t j0) {
    V const* a[RA];
    for (int i = 0; i < RA; ++i) a[i] = a_row(i0 + i);
    V out[RA][RB];
    dot_tile<RA, RB>(k, a, b.row(j0), b.ld(), out);
    for (int i = 0; i < RA; ++i) {
      V* const c = c_row(i0 + i) + j0;
      for (int j = 0; j < RB; ++j) c[j] = add ? c[j] + out[i][j] : out[i][j];
    }
  };
  auto const tiles = [&]<int RA>(std::integral_constant<int, RA> ra, std::int64_t i0,
                                 std::int64_t j0, std::int64_t j1) {
    std::int64_t j = j0;
    for (; j + 4 <= j1; j += 4) run(ra, std::integral_constant<int, 4>{}, i0, j);
    for (; j < j1; ++j) run(ra, std::integral_constant<int, 1>{}, i0, j);
  };
  constexpr std::int64_t width = 8;  // rows of B that stay near while all rows of A pass
  for (std::int64_t j0 = 0; j0 < b.rows(); j0 += width) {
    std::int64_t const j1 = std::min(j0 + width, b.rows());
    for (std::int64_t block = 0; block < blocks.blocks; ++block) {
      std::int64_t const i0 = blocks.first(block);
      switch (blocks.first(block + 1) - i0) {
        case 1: {
          if (j1 - j0 == width)
            run(std::integral_constant<int, 1>{}, std::integral_constant<int, 8>{}, i0, j0);
          else
            tiles(std::integral_constant<int, 1>{}, i0, j0, j1);
          break;
        }
        case 2:
          tiles(std::integral_constant<int, 2>{}, i0, j0, j1);
          break;
        default:
          tiles(std::integral_constant<int, 3>{}, i0, j0, j1);
          break;
      }
    }
  }
}

}  // namespace moe::inline MOE_ABI::detail::gemm
