// Packed weights of eight and four bits in blocks of 32 with a scale: quantised here, or ggml's.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/scalar.hpp>
#include <moe/expert/detail/packed_shapes.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/packed_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// 32 weights along the depth as ggml stores them, type q8_0: scale * value[i].
struct q8_0 {
  half scale;
  std::int8_t value[32];
};
/// The same, type q4_0: scale * (n - 8), n the lower half of pair[i] for weight i, the upper for i + 16.
struct q4_0 {
  half scale;
  std::uint8_t pair[16];
};
static_assert(sizeof(q8_0) == 34 && sizeof(q4_0) == 18);

namespace detail::packed {

/// 32 weights of a column.
struct quantised {
  float scale = 0;
  std::int8_t value[32] = {};
};

template <class W>
struct blocks_of;
template <>
struct blocks_of<int8_blocks> {
  using ggml = q8_0;
  static constexpr int bits = 8;

  static quantised read(q8_0 const& from) noexcept {
    quantised q;
    q.scale = static_cast<float>(from.scale);
    std::copy_n(from.value, 32, q.value);
    return q;
  }
  static void write(quantised const& q, q8_0& to) noexcept {
    to.scale = static_cast<half>(q.scale);
    std::copy_n(q.value, 32, to.value);
  }
  /// The scale that takes the greatest weight to 127.
  static float scale(float const (&x)[32]) noexcept {
    float most = 0;
    for (float v : x) most = std::max(most, std::fabs(v));
    return most / 127;
  }
  static constexpr float lowest = -127, highest = 127;
};
template <>
struct blocks_of<int4_blocks> {
  using ggml = q4_0;
  static constexpr int bits = 4;

  static quantised read(q4_0 const& from) noexcept {
    quantised q;
    q.scale = static_cast<float>(from.scale);
    for (int i = 0; i < 16; ++i) {
      q.value[i] = static_cast<std::int8_t>((from.pair[i] & 15) - 8);
      q.value[i + 16] = static_cast<std::int8_t>((from.pair[i] >> 4) - 8);
    }
    return q;
  }
  static void write(quantised const& q, q4_0& to) noexcept {
    to.scale = static_cast<half>(q.scale);
    for (int i = 0; i < 16; ++i)
      to.pair[i] = static_cast<std::uint8_t>((q.value[i] + 8) | (q.value[i + 16] + 8) << 4);
  }
  /// The scale, of either sign, that takes the greatest weight to -8: there is no 8.
  static float scale(float const (&x)[32]) noexcept {
    float most = 0;
    for (float v : x)
      if (std::fabs(v) > std::fabs(most)) most = v;
    return most / -8;
  }
  static constexpr float lowest = -8, highest = 7;
};

/// Rounds to the nearest; the scale is one that a half can hold.
template <class W>
quantised quantise(float const (&x)[32]) noexcept {
  using blocks = blocks_of<W>;
  quantised q;
  q.scale = static_cast<float>(static_cast<half>(blocks::scale(x)));
  if (q.scale == 0) return q;
  for (int i = 0; i < 32; ++i)
    q.value[i] = static_cast<std::int8_t>(
        std::clamp(std::nearbyint(x[i] / q.scale), blocks::lowest, blocks::highest));
  return q;
}

/// Where the bits of row j are in its word of a line.
template <class W>
constexpr int shift_of(int j) noexcept {
  return j % 4 * 8 + (blocks_of<W>::bits == 4 ? j % 8 / 4 * 4 : 0);
}
/// Where the words of column c are that hold row j of a block of a panel.
template <class W>
constexpr int word_of(int j, int c) noexcept {
  return format<W>::scales + (j / (32 / blocks_of<W>::bits) * panel_width + c) * 4;
}
/// Column c of a block of a panel: its scale, rounded to format<W>::scale, and its words.
template <class W>
void write_column(W* block, int c, quantised const& q) noexcept {
  using scale = typename format<W>::scale;
  constexpr int bits = blocks_of<W>::bits, in_word = 32 / bits;
  auto const of_column = static_cast<scale>(q.scale);
  std::memcpy(block + c * static_cast<int>(sizeof(scale)), &of_column, sizeof(scale));
  for (int j = 0; j < 32; j += in_word) {
    std::uint32_t word = 0;
    for (int i = 0; i < in_word; ++i)
      word |= (static_cast<std::uint32_t>(q.value[j + i]) & ((1u << bits) - 1)) << shift_of<W>(i);
    std::memcpy(block + word_of<W>(j, c), &word, 4);
  }
}
template <class W>
quantised read_column(W const* block, int c) noexcept {
  using scale = typename format<W>::scale;
  constexpr int bits = blocks_of<W>::bits;
  quantised q;
  scale of_column;
  std::memcpy(&of_column, block + c * static_cast<int>(sizeof(scale)), sizeof(scale));
  q.scale = static_cast<float>(of_column);
  for (int j = 0; j < 32; ++j) {
    std::uint32_t word = 0;
    std::memcpy(&word, block + word_of<W>(j, c), 4);
    auto const top = static_cast<std::int32_t>(word << (32 - bits - shift_of<W>(j)));
    q.value[j] = static_cast<std::int8_t>(top >> (32 - bits));
  }
  return q;
}

enum class part : std::uint8_t { up, gate, down };

/// Calls f(part, expert, block, column, place, c) for column `c` of each block of the experts
/// [first, first + count); `column` is that of the part, -1 beyond its width, `block` counts along its depth.
template <class W, class F>
void each_column(cpu const& exec, packed_weights<W> const& weights, std::int64_t first,
                 std::int64_t count, F const& f) {
  using V = std::remove_const_t<W>;
  expert_layout<V> const layout(weights.shape(), weights.gated());
  bool const gated = weights.gated();
  std::int64_t const panels = layout.input_panels + layout.M / panel_width;
  exec.each(count * panels, [&](std::int64_t task, int) {
    std::int64_t const p = task / panels, panel = task % panels;
    bool const input = panel < layout.input_panels;
    std::int64_t const depth = input ? layout.M : layout.H;
    std::int64_t const width = input ? weights.shape().H : weights.shape().M;
    W* place = weights.expert(first + p) +
               (input ? panel * panel_size<V>(depth)
                      : layout.input_size + (panel - layout.input_panels) * panel_size<V>(depth));
    for (std::int64_t block = 0; block < depth / 32; ++block, place += format<V>::size)
      for (int c = 0; c < panel_width; ++c) {
        std::int64_t column = panel * panel_width + c;
        part which = part::up;
        if (!input) {
          which = part::down;
          column -= layout.input_panels * panel_width;
        } else if (gated) {
          which = c < half_width ? part::gate : part::up;
          column = panel * half_width + c % half_width;
        }
        f(which, p, block, column < width ? column : -1, place, c);
      }
  });
}

template <class S>
stacked_view<S> const& matrix_of(ffn_weights<S> const& all, part which) noexcept {
  return which == part::up ? all.up : which == part::gate ? all.gate : all.down;
}

/// Checks that scales belong to the parts of a source: fits(scales of a part, part).
template <class Scales, class S, class Fits>
void expect_scales(Scales const& scales, ffn_weights<S> const& source, Fits const& fits,
                   char const* rule, call_site site) {
  expects(fits(scales.up, source.up) && fits(scales.gate, source.gate) &&
              fits(scales.down, source.down),
          rule, site,
          {{"up.rows", scales.up.rows()},
           {"up.cols", scales.up.cols()},
           {"down.rows", scales.down.rows()},
           {"down.cols", scales.down.cols()}});
}

/// Checks a source of ggml's blocks: [out, in / 32].
template <class W, class S>
void expect_blocks(packed_weights<W> const& weights, ffn_weights<S> const& source,
                   std::int64_t first, call_site site) {
  auto const [P, M, H] = weights.shape();
  auto const fits = [&](stacked_view<S> const& m, std::int64_t in, std::int64_t out) {
    return in % 32 == 0 && m.count() == source.up.count() && m.rows() == out &&
           m.cols() == in / 32 && m.ld() >= m.cols();
  };
  expects(fits(source.up, M, H) && fits(source.down, H, M) &&
              (weights.gated() ? fits(source.gate, M, H) : source.gate.absent()),
          "pack: blocks are [P,H,M/32], of down [P,M,H/32], and M and H multiples of 32", site,
          {{"up.rows", source.up.rows()},
           {"up.cols", source.up.cols()},
           {"down.rows", source.down.rows()},
           {"down.cols", source.down.cols()},
           {"M", M},
           {"H", H}});
  expects(first >= 0 && first + source.up.count() <= P,
          "pack: experts [first, first + experts of the source) are among P", site,
          {{"first", first}, {"experts", source.up.count()}, {"P", P}});
}

}  // namespace detail::packed

/// Quantises experts of row-major weights, as the `pack` of numbers packs them: 32 weights that follow
/// one another along the depth share a scale, which is a half. Values are rounded to the nearest.
///
/// @param source  Of float, bf16 or half; finite.
template <weight_blocks W, weight_number S>
void pack(cpu const& exec, ffn_weights<S> const& source, orientation order,
          packed_weights<W> const& weights, std::int64_t first = 0,
          call_site site = call_site::here()) {
  using namespace detail::packed;
  expect_source(weights, source, order, first, site);
  each_column(
      exec, weights, first, source.up.count(),
      [&](part which, std::int64_t p, std::int64_t block, std::int64_t column, W* place, int c) {
        float x[32] = {};
        if (column >= 0) {
          auto const m = matrix_of(source, which)[p];
          bool const turned = order == orientation::out_in;
          std::int64_t const depth = turned ? m.cols() : m.rows();
          for (std::int64_t i = 0; i < 32 && block * 32 + i < depth; ++i)
            x[i] =
                static_cast<float>(turned ? m(column, block * 32 + i) : m(block * 32 + i, column));
        }
        write_column(place, c, quantise<W>(x));
      });
}

/// Packs ggml's blocks, q8_0 as int8_blocks and q4_0 as int4_blocks: the same numbers in another order.
///
/// @param source  up and gate [P,H,M/32], down [P,M,H/32]: `[out, in]` in blocks along `in`.
/// @throws precondition_error if shapes disagree, or M or H is no multiple of 32.
template <weight_blocks W, class S>
  requires std::same_as<std::remove_const_t<S>, typename detail::packed::blocks_of<W>::ggml>
void pack(cpu const& exec, ffn_weights<S> const& source, packed_weights<W> const& weights,
          std::int64_t first = 0, call_site site = call_site::here()) {
  using namespace detail::packed;
  expect_blocks(weights, source, first, site);
  each_column(
      exec, weights, first, source.up.count(),
      [&](part which, std::int64_t p, std::int64_t block, std::int64_t column, W* place, int c) {
        auto const& m = matrix_of(source, which);
        bool const live = column >= 0 && block < m.cols();
        write_column(place, c, live ? blocks_of<W>::read(m[p](column, block)) : quantised{});
      });
}

/// The inverse of the pack of ggml's blocks: exact.
template <class W, class S>
  requires std::same_as<S, typename detail::packed::blocks_of<std::remove_const_t<W>>::ggml>
void unpack(cpu const& exec, packed_weights<W> const& weights, ffn_weights<S> const& out,
            std::int64_t first = 0, call_site site = call_site::here()) {
  using namespace detail::packed;
  expect_blocks(weights, out, first, site);
  each_column(exec, weights, first, out.up.count(),
              [&](part which, std::int64_t p, std::int64_t block, std::int64_t column,
                  W const* place, int c) {
                auto const& m = matrix_of(out, which);
                if (column >= 0 && block < m.cols())
                  blocks_of<std::remove_const_t<W>>::write(read_column(place, c),
                                                           m[p](column, block));
              });
}

}  // namespace moe::inline MOE_ABI
