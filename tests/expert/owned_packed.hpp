// Packed weights in memory of their own, and the numbers that blocks of them stand for.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_weights.hpp>

namespace moe_test {

/// Packed weights that own their bytes, filled with garbage first.
template <class W>
struct owned_packed {
  moe::buffer bytes;
  moe::packed_weights<W> view;
  owned_packed(moe::ffn_shape const& shape, bool gated)
      : bytes(moe::packed_bytes<W>(shape, gated)), view(bytes.data(), bytes.size(), shape, gated) {
    std::fill_n(bytes.data(), bytes.size(), std::byte{0xff});
  }
};

/// What packed integers and their scales stand for, [in, out].
template <class W>
void read_numbers(moe::packed_weights<W> const& from, moe::ffn_weights<float> const& to) {
  namespace packed = moe::detail::packed;
  packed::each_column(moe::cpu{}, from, 0, from.shape().P,
                      [&](packed::part which, std::int64_t p, std::int64_t block,
                          std::int64_t column, W const* place, int c) {
                        auto const q = packed::read_column(place, c);
                        auto const& m = packed::matrix_of(to, which);
                        for (std::int64_t i = block * 32; i < block * 32 + 32; ++i)
                          if (column >= 0 && i < m.rows())
                            m[p](i, column) = q.scale * static_cast<float>(q.value[i % 32]);
                      });
}

}  // namespace moe_test
