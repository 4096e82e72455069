// The bodies of the kernels that weigh kept pairs: a thread for each token.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/kept_weights.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// As `weigh_kept`. @pre  At least T threads in all blocks together.
template <class V, int Threads>
struct weigh_kept_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, kept_weights rule, routing_table table,
                                  V const* weight, V* out) const {
    std::int64_t const t = std::int64_t{b.block()} * Threads + b.thread();
    b.wait_for_previous();
    b.let_next_start();
    if (t < table.T) detail::weigh_kept_token(rule, table, weight, out, detail::pairs_of(table, t));
  }
};

/// As `weigh_kept_backward`. @pre  As above.
template <class V, int Threads>
struct weigh_kept_backward_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, kept_weights rule, routing_table table,
                                  V const* weight, V const* dout, V* dweight) const {
    std::int64_t const t = std::int64_t{b.block()} * Threads + b.thread();
    b.wait_for_previous();
    b.let_next_start();
    if (t < table.T)
      detail::weigh_kept_token_backward(rule, table, weight, dout, dweight,
                                        detail::pairs_of(table, t));
  }
};

}  // namespace moe::inline MOE_ABI
