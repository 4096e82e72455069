// Packed weights of int8 with a scale for each row of a checkpoint's matrices, that is for each output.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// What outputs of P experts are multiplied by.
struct output_scales {
  matrix_view<float const> up;    ///< [P,H]
  matrix_view<float const> gate;  ///< [P,H]; absent unless the activation is gated
  matrix_view<float const> down;  ///< [P,M]
};

/// Packs weights of int8, -128 to 127, with a scale for each output ("per channel", "per row"): all blocks
/// of a column get the same one, rounded to half.
///
/// @param source  `[out, in]`: up and gate [P,H,M], down [P,M,H].
/// @throws precondition_error if shapes disagree, or a scale is NaN or beyond half's range.
inline void pack(cpu const& exec, ffn_weights<std::int8_t const> const& source,
                 output_scales const& scales, packed_weights<int8_blocks> const& weights,
                 std::int64_t first = 0, call_site site = call_site::here()) {
  using namespace detail::packed;
  expect_source(weights, source, orientation::out_in, first, site);
  auto const fits = [](matrix_view<float const> const& s,
                       stacked_view<std::int8_t const> const& of) {
    return of.absent() ? s.absent()
                       : s.rows() == of.count() && s.cols() == of.rows() && s.ld() >= s.cols();
  };
  expect_scales(scales, source, fits, "pack: scales are one for each output of up, gate and down",
                site);
  for (auto const* const part : {&scales.up, &scales.gate, &scales.down})
    for (std::int64_t p = 0; p < part->rows(); ++p)
      for (std::int64_t j = 0; j < part->cols(); ++j)
        expects(std::isfinite(static_cast<float>(static_cast<half>((*part)(p, j)))),
                "pack: scales fit half", site, {{"scale", (*part)(p, j)}, {"p", p}, {"output", j}});
  each_column(exec, weights, first, source.up.count(),
              [&](part which, std::int64_t p, std::int64_t block, std::int64_t column,
                  int8_blocks* place, int c) {
                quantised q;
                auto const& m = matrix_of(source, which);
                std::int64_t const live =
                    column < 0 ? 0 : std::clamp<std::int64_t>(m.cols() - block * 32, 0, 32);
                if (live > 0) {
                  auto const& of = which == part::up     ? scales.up
                                   : which == part::gate ? scales.gate
                                                         : scales.down;
                  q.scale = of(p, column);
                  std::copy_n(m[p].row(column) + block * 32, live, q.value);
                }
                write_column(place, c, q);
              });
}

}  // namespace moe::inline MOE_ABI
