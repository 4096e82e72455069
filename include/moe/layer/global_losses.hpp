// Auxiliary losses of the tokens of all ranks: a hook of layers.
// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>

#include <moe/comm/collectives.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/layer/layer_types.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/z_loss.hpp>

namespace moe::inline MOE_ABI {

/// A hook that adds up what the losses are made of over all ranks of a communicator:
///
///     moe::global_losses balance(comm, layer.shape());
///     auto losses = layer.forward(exec, parameters, tokens, ids, out, saved, scratch, balance);
///
/// Then losses are those of one rank with all tokens, the same bits on all ranks, and backward gives what
/// the tokens of this rank have of their gradient: the sum over all ranks is the whole. A mean of losses
/// that each rank makes of its own tokens is another loss, because the balance is no mean over tokens; it
/// wants every few tokens to be balanced. With `reduce_gradients` and a scale of 1 / R the coefficients of
/// global losses are to be multiplied by R, as they are no means over the rank's tokens.
/// Source. Qiu et al., "Demons in the detail: on implementing load balancing loss", 2025 (arXiv
/// 2501.11873).
template <communicator C>
class global_losses {
 public:
  /// @param comm     Of all ranks that have tokens, all of which call forward. Must outlive this.
  /// @param shape    Of the layer.
  /// @param timeout  Of each forward.
  global_losses(C& comm, layer_shape const& shape,
                std::chrono::nanoseconds timeout = std::chrono::seconds(60))
      : comm_(&comm),
        timeout_(timeout),
        scratch_(
            all_reduce_scratch<double>(load_balance_sums(shape.E) + z_loss_sums, comm.size())) {}

  /// @throws exchange_error if it ends otherwise than well.
  void loss_sums(vector_view<double> sums) {
    outcome const end = all_reduce(*comm_, sums, scratch_, within(timeout_));
    if (!end) detail::throw_exchange_error("global_losses: all_reduce", end);
  }

 private:
  C* comm_;
  std::chrono::nanoseconds timeout_;
  buffer scratch_;
};

}  // namespace moe::inline MOE_ABI
