// The sizes of packed weights and rows, and the tasks over them: the same for every instruction set.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>
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

/// Columns of a panel. Of a gated activation the first half are of gate, the others of up.
inline constexpr int panel_width = 32, half_width = panel_width / 2;

/// How a panel of weights W is stored: in blocks of `depth` rows, of `size` elements of W each.
template <class W>
struct format {
  static constexpr int depth = 1, size = panel_width;
};
/// For each column a word of two rows, the first in its lower half.
template <>
struct format<bf16> {
  static constexpr int depth = 2, size = 2 * panel_width;
};
/// A scale for each column, then for each four rows and each column a word of four bytes, one of each row.
template <>
struct format<int8_blocks> {
  using scale = half;
  static constexpr int depth = 32, scales = panel_width * 2, size = scales + 32 * panel_width;
};
template <>
struct format<fp8_blocks> {
  using scale = float;
  static constexpr int depth = 32, scales = panel_width * 4, size = scales + 32 * panel_width;
};
/// Scales, then for each eight rows and each column a word: the lower halves of its bytes are of the first
/// four rows, the upper of the others.
template <>
struct format<int4_blocks> {
  using scale = half;
  static constexpr int depth = 32, scales = panel_width * 2, size = scales + 16 * panel_width;
};

/// Widths and depths are padded with zeros to whole panels and blocks.
constexpr std::int64_t padded(std::int64_t n) noexcept {
  return (n + panel_width - 1) / panel_width * panel_width;
}
/// Elements of W of a panel of k rows.
template <class W>
constexpr std::int64_t panel_size(std::int64_t k) noexcept {
  return k / format<W>::depth * format<W>::size;
}

/// How packed rows are stored: as numbers; as pairs of bf16; or as integers of eight bits in blocks of 32, each of which has
/// for R rows: a scale (float), what all products with weights are too great by, and eight times a word
/// of four numbers.
template <class X>
struct row_layout {
  using element = float;
  static constexpr std::int64_t size(std::int64_t k) noexcept { return k; }
};
template <>
struct row_layout<int8_blocks> {
  using element = std::int32_t;
  static constexpr int block = 10;
  static constexpr std::int64_t size(std::int64_t k) noexcept { return k / 32 * block; }
};
/// Two numbers that follow one another in a word, the first in its lower half.
template <>
struct row_layout<bf16> {
  using element = std::uint32_t;
  static constexpr std::int64_t size(std::int64_t k) noexcept { return k / 2; }
};
template <class X>
using row_element = typename row_layout<X>::element;

/// What multiplies rows that are not float. Integers of eight bits: float, in which their sums are exact;
/// instructions that add two products of bytes in 16 bits (maddubs); or four in 32 bits (VNNI). bf16:
/// float; or instructions that add two products to a float (AVX512_BF16).
enum class dots : std::uint8_t { floats, pairs, quads };

/// Rows of one task, most.
inline constexpr std::int64_t most_rows = 252;
/// Bytes of a panel between which other rows have their turn, so that they stay in the first-level cache.
inline constexpr std::int64_t piece_bytes = 32 * 1024;
/// How far ahead of their products the weights of a single block of rows are asked for, in bytes. One stream
/// of addresses that are asked for so early gets all of the bandwidth that a core can have; left to the
/// hardware, two thirds.
inline constexpr std::int64_t bytes_ahead = 8 * 1024;
/// Weights that will be needed, and how many bytes of them a tile asks for in each step.
struct upcoming_weights {
  char const* from;
  std::int64_t share;
};
/// Rows of a block, most.
inline constexpr int most_block_rows = 12;
/// Elements of the sums of one task, and of 32 columns of its results before they become integers.
inline constexpr std::int64_t sum_elements = most_rows * panel_width;
inline constexpr std::int64_t pending_elements = most_rows * 32;

/// Rows of one block in the order in which tiles read them: [k][R].
/// @param a  k0 columns of R rows, 0 from there to k.
template <class X>
struct pack_task {
  float const* const* row;
  float const* scale;  ///< [R] factors of the rows, or null
  int R;
  std::int64_t k0, k;
  row_element<X>* to;
};

/// Some blocks of one expert's packed rows times some panels of its weights.
template <class W, class X>
struct panels_task {
  row_element<X> const* a;         ///< of the expert's first block
  W const* b;                      ///< of panel 0
  std::int64_t k;                  ///< padded depth
  gemm::even_blocks blocks{0, 1};  ///< of the expert's rows
  std::int64_t first_block, last_block;
  std::int64_t first_panel, last_panel;
  std::int64_t cols;        ///< true columns of the result
  float const* bias;        ///< [cols] or null; of a gated activation: of `up`
  float const* gate_bias;   ///< [cols] or null
  row_element<X>* hidden;   ///< packed rows out, of the expert's first block
  std::int64_t hidden_k;    ///< and their padded depth
  matrix_view<float> out;   ///< or rows out
  std::int32_t const* ids;  ///< and which, from first_block on
  float* sums;              ///< sum_elements
  float* pending;           ///< pending_elements
};

/// What one instruction set does with weights W and rows X.
template <class W, class X, class Activation>
struct kernels {
  int block_rows;  ///< Rows of a block, most.
  void (*pack)(pack_task<X> const&);
  void (*hidden)(panels_task<W, X> const&, Activation const&);
  void (*down)(panels_task<W, X> const&);
};

}  // namespace moe::inline MOE_ABI::detail::packed
