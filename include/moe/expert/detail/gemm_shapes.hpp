// The sizes of grouped products, and one task of each kind: the same for every instruction set.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

// Packed B, depth x panel_cols, takes half of a 512 KiB second-level cache. Measured on Zen 3 with
// 1024 x 2816 weights out of cache: depth 128 x 512 columns against 256 x 256 is 1.05 at 128 rows.
inline constexpr std::int64_t depth = 128;
template <class V>
inline constexpr std::int64_t panel_cols = 2048 / static_cast<int>(sizeof(V));
/// With few rows memory is the bound, and the next block of B must fit beside the packed one (24
/// rows: 1.2 over no prefetch).
inline constexpr std::int64_t thin_depth = 64, thin_rows = 48;
/// Rows of one task: packing B costs less than 1 % of the products of this many rows.
inline constexpr std::int64_t chunk_rows = 480;
/// No instruction set packs A in longer rows.
inline constexpr int most_a_stride = 16;

/// Elements of V that one thread needs: packed B, then packed A.
template <class V>
inline constexpr std::int64_t room_elements = depth * (panel_cols<V> + most_a_stride);

/// Cuts m rows into blocks of almost equal height, at most `most` each: 7 rows are 4 + 3, not 6 + 1.
struct even_blocks {
  std::int64_t m, blocks;
  constexpr even_blocks(std::int64_t rows, std::int64_t most) noexcept
      : m(rows), blocks((rows + most - 1) / most) {}
  constexpr std::int64_t first(std::int64_t b) const noexcept { return m * b / blocks; }
};

/// What a tile of C holds before the first product is added.
enum class start : std::uint8_t { zero, bias, current };

/// m rows of one expert, `ids` of them, and n <= panel_cols columns of the result from `column`.
template <class V>
struct rows_task {
  matrix_view<V const> a;  ///< [N,k]
  matrix_view<V const> b;  ///< forward: [k,n]; input gradient: [n,k]
  matrix_view<V> c;        ///< [N, >= column + n]
  std::int32_t const* ids;
  std::int64_t m, column, n;
  V const* bias;  ///< [n] or null; of forward alone
  update how;     ///< of the input gradient alone
  V* room;        ///< room_elements
};

/// Rows [first, last) of one expert's weight gradient, and n <= panel_cols columns from `column`.
template <class V>
struct weights_task {
  matrix_view<V const> a, dc;
  matrix_view<V> db;
  row_segments const& segments;
  int expert;
  std::int64_t first, last, column, n;
  update how;
  V* room;
};

/// The products of one instruction set.
template <class V>
struct gemm_kernels {
  void (*forward)(rows_task<V> const&);
  void (*input_gradient)(rows_task<V> const&);
  void (*weight_gradient)(weights_task<V> const&);
  std::int64_t narrowest;  ///< Columns that a task should have at least.
};

}  // namespace moe::inline MOE_ABI::detail::gemm
