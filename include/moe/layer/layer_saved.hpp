// What a layer keeps from forward to backward.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/z_loss.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// What a layer keeps from forward to backward, in memory that `moe_layer::carve_saved` was given.
/// After a forward: what the router chose, the table, and the weights that were combined with.
template <class V>
struct layer_saved {
  matrix_view<V> logits;    ///< [T,E]
  basic_routing<V> routed;  ///< What `route` wrote.
  routing_table table;
  V* weights = nullptr;  ///< [T,K]: 0 where a pair was dropped.
  vector_view<double>
      loss_sums;          ///< What the losses are made of: balance_sums, z_sums if asked for.
  memory experts;         ///< What the experts keep.
  std::int64_t room = 0;  ///< Most tokens: the layer's T.
  bool filled = false;    ///< A forward that saves has run.

  /// As sum_load_balance makes them, and the hook of the forward.
  vector_view<double> balance_sums() const noexcept {
    return {loss_sums.data(), load_balance_sums(static_cast<int>(logits.cols()))};
  }
  /// As sum_z_loss makes them. @pre layer_shape::z_loss.
  vector_view<double> z_sums() const noexcept {
    return {loss_sums.data() + balance_sums().size(), z_loss_sums};
  }
};

}  // namespace moe::inline MOE_ABI
