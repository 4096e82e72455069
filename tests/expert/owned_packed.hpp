// Packed weights in memory of their own.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>

#include <moe/core/memory.hpp>
#include <moe/expert/ffn_weights.hpp>
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

}  // namespace moe_test
