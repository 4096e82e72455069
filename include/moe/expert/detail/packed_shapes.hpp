// The sizes of packed weights and rows, and the tasks over them: the same for every instruction set.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/detail/gemm_shapes.hpp>

namespace moe::inline MOE_ABI {

/// Names weights of eight bits, -127 to 127, with a scale for each 32 of a column: ggml's q8_0.
struct int8_blocks {
  std::uint8_t bits;
};
/// Names weights of four bits, -8 to 7, with a scale for each 32 of a column: ggml's q4_0.
struct int4_blocks {
  std::uint8_t bits;
};
/// Names weights of eight bits, fp8 e4m3, with a scale for each 128 x 128 of a matrix: DeepSeek-V3's.
struct fp8_blocks {
  std::uint8_t bits;
};

}  // namespace moe::inline MOE_ABI

namespace moe::inline MOE_ABI::detail::packed {

/// Columns of a panel: a line of float.
inline constexpr int panel_width = 16;
/// Parts of the depth that a tile walks side by side: one stream of addresses for each core leaves half of
/// the memory's bandwidth unused.
inline constexpr int streams = 4;

/// How a panel of weights W is stored: in blocks of `depth` rows, of `size` elements of W each. Widths
/// and depths are padded with zeros to multiples of `unit`: to whole units of panels, and to streams of
/// whole vectors and blocks.
template <class W>
struct format {
  static constexpr int depth = 1, size = panel_width;
  static constexpr std::int64_t unit = 64;
};
/// 16 scales of float, then a line for each four rows: for each column four bytes, one of each row.
template <>
struct format<int8_blocks> {
  static constexpr int depth = 32, size = 64 + 32 * panel_width;
  static constexpr std::int64_t unit = 128;
};
template <>
struct format<fp8_blocks> : format<int8_blocks> {};
/// 16 scales, then a line for each eight rows: for each column eight times four bits, from the lowest on.
template <>
struct format<int4_blocks> {
  static constexpr int depth = 32, size = 64 + 32 * panel_width / 2;
  static constexpr std::int64_t unit = 128;
};

template <class W>
constexpr std::int64_t padded(std::int64_t n) noexcept {
  return (n + format<W>::unit - 1) / format<W>::unit * format<W>::unit;
}
/// Elements of W of a panel of k rows.
template <class W>
constexpr std::int64_t panel_size(std::int64_t k) noexcept {
  return k / format<W>::depth * format<W>::size;
}

/// Rows of one task, most; and depth of the products between which other rows have their turn, so that a
/// panel stays in the first-level cache.
inline constexpr std::int64_t most_rows = 252, panel_depth = 512;
/// Panels that a tile multiplies at once, most; of many rows, half of that.
inline constexpr int most_panels = 4;
/// Rows of a block, most.
inline constexpr int most_block_rows = 12;
/// Elements of the sums of one task.
inline constexpr std::int64_t sum_elements = most_rows * most_panels / 2 * panel_width;

/// Rows of one block in the order in which tiles read them: [k / streams][streams][R].
/// @param a  k0 columns of R rows, 0 from there to k.
struct pack_task {
  float const* const* row;
  float const* scale;  ///< [R] factors of the rows, or null
  int R;
  std::int64_t k0, k;
  float* to;
};

/// Some blocks of one expert's packed rows times some panels of its weights.
template <class W>
struct panels_task {
  float const* a;                  ///< of the expert's first block
  W const* b;                      ///< of panel 0
  std::int64_t k;                  ///< padded depth
  gemm::even_blocks blocks{0, 1};  ///< of the expert's rows
  std::int64_t first_block, last_block;
  std::int64_t first_panel, last_panel;
  std::int64_t cols;        ///< true columns of the result
  float const* bias;        ///< [cols] or null; of a gated activation: of `up`
  float const* gate_bias;   ///< [cols] or null
  float* hidden;            ///< packed rows out, of the expert's first block
  std::int64_t hidden_k;    ///< and their padded depth
  matrix_view<float> out;   ///< or rows out
  std::int32_t const* ids;  ///< and which, from first_block on
  float* sums;              ///< sum_elements
};

/// What one instruction set does with weights W.
template <class W, class Activation>
struct kernels {
  int block_rows;  ///< Rows of a block, most.
  void (*pack)(pack_task const&);
  void (*hidden)(panels_task<W> const&, Activation const&);
  void (*down)(panels_task<W> const&);
};

}  // namespace moe::inline MOE_ABI::detail::packed
