// The body of the kernel of jitter.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/jitter.hpp>

namespace moe::inline MOE_ABI {

/// Multiplies each element by a random number around 1. A thread has four neighbours at a time, which
/// share a block of random bits.
/// Never run on a GPU yet.
template <int Threads>
struct jitter_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  /// @param scale  0 copies.
  template <thread_block B, class V, class D>
  MOE_HOST_DEVICE void operator()(B& b, shared&, matrix_view<V> from, float scale, batch tokens,
                                  matrix_view<D> to) const {
    b.wait_for_previous();
    b.let_next_start();
    std::int64_t const M = from.cols(), quarters = (M + 3) / 4;
    std::int64_t const step = std::int64_t{Threads} * b.blocks();
    for (std::int64_t i = std::int64_t{Threads} * b.block() + b.thread();
         i < from.rows() * quarters; i += step) {
      std::int64_t const t = i / quarters;
      detail::jitter_quarter<V, D>(from.row(t), to.row(t), M, i % quarters, scale, tokens.at(t));
    }
  }
};

}  // namespace moe::inline MOE_ABI
