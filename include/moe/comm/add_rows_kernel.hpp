// The body of the kernel that adds rows to others, where a plan sums what came.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/comm/detail/row_format.hpp>
#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/dispatch/detail/chunk.hpp>

namespace moe::inline MOE_ABI {

/// to[i] += from[i] for i < n, each rounded once.
/// @tparam Vector  Elements that a thread has at once: 16 bytes, of which n is a multiple and both arrays
///                 begin at one; or 1.
/// Never run on a GPU yet.
template <class T, int Vector, int Threads>
struct add_rows_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, T const* from, std::int64_t n, T* to) const {
    b.wait_for_previous();
    b.let_next_start();
    std::int64_t const step = std::int64_t{Threads} * b.blocks() * Vector;
    for (std::int64_t i = (std::int64_t{Threads} * b.block() + b.thread()) * Vector; i < n;
         i += step) {
      if constexpr (Vector == 1) {
        to[i] = detail::add_elements(to[i], from[i]);
      } else {
        using chunk = detail::chunk<T, Vector>;
        accumulate_t<T> sum[Vector], more[Vector];
        detail::widen(sum, detail::load<chunk>(to + i));
        detail::widen(more, detail::load<chunk>(from + i));
        MOE_UNROLL
        for (int v = 0; v < Vector; ++v) sum[v] += more[v];
        detail::store(to + i, detail::narrow<T>(sum), false);
      }
    }
  }
};

}  // namespace moe::inline MOE_ABI
