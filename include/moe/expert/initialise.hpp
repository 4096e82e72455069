// First values of experts: counter-based, each expert different, the same for any number of ranks.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/random.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// How experts start. A value depends on (seed, layer, part, global expert, row, column) alone.
struct initialisation {
  enum class law : std::uint8_t {
    scaled_uniform,  ///< U(-1/sqrt(fan in), 1/sqrt(fan in)), biases too: a framework's Linear.
    normal           ///< N(0, std^2), biases 0.
  };
  law rule = law::scaled_uniform;
  double std = 0.02;    ///< normal: of up and gate, and of down unless down_std is given.
  double down_std = 0;  ///< normal: of down; 0 = std. (Megatron: std / sqrt(2 layers).)
  std::uint64_t seed = 0;
  std::uint32_t layer = 0;
  std::int64_t first_expert = 0;  ///< Global id of expert 0 of these views.
  std::int64_t first_hidden = 0;  ///< slice_range(...).first, if the views are a slice,
  std::int64_t hidden = 0;        ///< and the H of the whole; 0 = that of the views.
};

namespace detail {

/// Element (row, column) of a part of an expert, uniform in (-1, 1) or standard normal.
template <bool Normal>
double initial_value(initialisation const& rule, std::uint32_t part, std::int64_t expert,
                     std::int64_t row, std::int64_t column) noexcept {
  // Two elements share a block of four words: two for each.
  philox_block const block = philox(
      {{static_cast<std::uint32_t>(column >> 1), static_cast<std::uint32_t>(row),
        static_cast<std::uint32_t>(expert), (rule.layer << 3) | part}},
      static_cast<std::uint32_t>(rule.seed), static_cast<std::uint32_t>(rule.seed >> 32) ^ 0x5eedu);
  std::uint32_t const* const word = block.word + 2 * (column & 1);
  double const u = (word[0] + 0.5) * 0x1p-32;
  if constexpr (!Normal) return 2 * u - 1;
  return std::sqrt(-2 * std::log(u)) *
         std::cos(6.28318530717958647692 * ((word[1] + 0.5) * 0x1p-32));
}

}  // namespace detail

/// Fills the parameters. Two experts are never equal, nor two layers of different `layer`.
///
/// @throws precondition_error unless std, down_std >= 0, offsets >= 0 and layer < 2^29.
/// @cost   One Philox block for each element (and a logarithm and a cosine if normal).
template <class V>
void initialise(cpu const& exec, ffn_weights<V> const& weights, initialisation const& rule = {},
                call_site site = call_site::here()) {
  expects(rule.std >= 0 && rule.down_std >= 0 && rule.first_expert >= 0 && rule.first_hidden >= 0 &&
              rule.hidden >= 0 && rule.layer < (1u << 29),
          "initialise: std, down_std, first_expert, first_hidden, hidden >= 0, layer < 2^29", site,
          {{"std", rule.std},
           {"down_std", rule.down_std},
           {"first_expert", rule.first_expert},
           {"first_hidden", rule.first_hidden},
           {"layer", rule.layer}});
  bool const normal = rule.rule == initialisation::law::normal;
  std::int64_t const H = rule.hidden > 0 ? rule.hidden : weights.shape().H;
  auto const bound = [](std::int64_t n) {
    return n > 0 ? 1 / std::sqrt(static_cast<double>(n)) : 0;
  };
  double const in = normal ? rule.std : bound(weights.shape().M);
  double const out = normal ? (rule.down_std > 0 ? rule.down_std : rule.std) : bound(H);

  auto const fill = [&](std::uint32_t part, stacked_view<V> m, double scale, std::int64_t row0,
                        std::int64_t column0) {
    if (m.absent() || m.rows() == 0) return;
    exec.split(m.count() * m.rows(), 16, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t i = first; i < last; ++i) {
        std::int64_t const e = i / m.rows(), r = i % m.rows();
        for (std::int64_t c = 0; c < m.cols(); ++c) {
          std::int64_t const expert = rule.first_expert + e, row = row0 + r, column = column0 + c;
          double const value = normal
                                   ? detail::initial_value<true>(rule, part, expert, row, column)
                                   : detail::initial_value<false>(rule, part, expert, row, column);
          m[e](r, c) = static_cast<V>(scale * value);
        }
      }
    });
  };
  auto const bias = [&](std::uint32_t part, matrix_view<V> b, double scale, std::int64_t column0) {
    fill(part, {b.data(), b.rows(), 1, b.cols(), b.cols(), b.ld()}, normal ? 0 : scale, 0, column0);
  };
  fill(0, weights.up, in, 0, rule.first_hidden);
  fill(1, weights.gate, in, 0, rule.first_hidden);
  fill(2, weights.down, out, rule.first_hidden, 0);
  bias(3, weights.up_bias, in, rule.first_hidden);
  bias(4, weights.gate_bias, in, rule.first_hidden);
  bias(5, weights.down_bias, out, 0);
}

}  // namespace moe::inline MOE_ABI
