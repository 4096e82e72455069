// Packed weights of fp8 with a scale for each 128 x 128 of a matrix, as DeepSeek-V3 stores them.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/expert/detail/packed_shapes.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

template <>
struct detail::packed::blocks_of<fp8_blocks> {
  static constexpr int bits = 8;
};

/// A number of eight bits: sign, four of exponent, three of precision (e4m3, without infinities). All ones
/// behind the sign are a NaN.
struct fp8_e4m3 {
  std::uint8_t bits;
};

/// Packs fp8 weights with a scale for each block of 128 x 128, as DeepSeek-V3's checkpoints have them.
///
/// A NaN among the weights makes all results of its column NaN, as in any product: its block of 32 is given a
/// scale that is NaN, so that kernels need not look for it.
///
/// @param source  `[out, in]`: up and gate [P,H,M], down [P,M,H].
/// @param scales  What blocks are multiplied by ("scale_inv"): up and gate [P, H/128, M/128], down [P,
///                M/128, H/128], rounded up.
/// @throws precondition_error if shapes disagree.
inline void pack(cpu const& exec, ffn_weights<fp8_e4m3 const> const& source,
                 ffn_weights<float const> const& scales, packed_weights<fp8_blocks> const& weights,
                 std::int64_t first = 0, call_site site = call_site::here()) {
  using namespace detail::packed;
  expect_source(weights, source, orientation::out_in, first, site);
  auto const fits = [&](stacked_view<float const> const& s,
                        stacked_view<fp8_e4m3 const> const& of) {
    return s.count() == of.count() && s.rows() == (of.rows() + 127) / 128 &&
           s.cols() == (of.cols() + 127) / 128 && s.ld() >= s.cols();
  };
  expect_scales(scales, source, fits,
                "pack: scales are one for each 128 x 128 of up, gate and down", site);
  each_column(exec, weights, first, source.up.count(),
              [&](part which, std::int64_t p, std::int64_t block, std::int64_t column,
                  fp8_blocks* place, int c) {
                quantised q;
                auto const& m = matrix_of(source, which);
                if (column >= 0 && block * 32 < m.cols()) {
                  q.scale = matrix_of(scales, which)[p](column / 128, block / 4);
                  for (std::int64_t i = 0; i < 32 && block * 32 + i < m.cols(); ++i) {
                    std::uint8_t const bits = m[p](column, block * 32 + i).bits;
                    if ((bits & 0x7f) == 0x7f) q.scale = std::numeric_limits<float>::quiet_NaN();
                    q.value[i] = static_cast<std::int8_t>(bits);
                  }
                }
                write_column(place, c, q);
              });
}

}  // namespace moe::inline MOE_ABI
