// Losses on a GPU from the sums that a gate made on its way through the tokens.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/loss/gate_losses_kernel.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// The load-balancing loss and its gradient, as `load_balance` and `load_balance_backward` on a CPU,
/// but from the sums of a gate: neither scores nor ids are read again.
///
/// @param sums     As `route` wrote them, with pairs, score, and first unless rule.choices is all.
/// @param routed   The routing that was made with them: T, K and E are read, no array.
/// @param rule     rule.masked is what sums.scores_masked says.
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param loss     One number of the device, out; null if not wanted.
/// @param dscores  [E] of the device, out, for score_gradient::expert; absent if not wanted.
/// @throws precondition_error if an array or what it stands for does not fit.
/// @note   One kernel of one block. Sums are in double, in a fixed order, of scores that `route` added up
///         in float within each chunk. Deterministic.
/// @cost   Reads 2 E numbers of each chunk.
template <kernel_executor X>
void load_balance(X const& exec, gate_sums const& sums, basic_routing<float> const& routed,
                  load_balance_rule const& rule, double dloss, double* loss,
                  vector_view<float> dscores, call_site site = call_site::here()) {
  bool const all = rule.choices == load_balance_rule::counted::all;
  expects(sums.chunk >= 1 && sums.chunks == detail::chunks_of(routed.T, sums.chunk) &&
              routed.E >= 1 && routed.K >= 1,
          "load_balance: sums are of the routing's tokens", site,
          {{"chunk", sums.chunk}, {"chunks", sums.chunks}, {"T", routed.T}, {"E", routed.E}});
  expects(sums.chunks == 0 ||
              (sums.pairs != nullptr && sums.score != nullptr && (all || sums.first != nullptr)),
          "load_balance: sums have pairs, scores, and the first choices if the rule counts them",
          site);
  expects(sums.scores_masked == (rule.masked == load_balance_rule::masked_tokens::scored),
          "load_balance: sums.scores_masked is what the rule says of masked tokens", site);
  expects(dscores.data() == nullptr || dscores.size() == routed.E,
          "load_balance: dscores is [E], or absent", site,
          {{"size", dscores.size()}, {"E", routed.E}});
  exec.launch("load_balance", gate_balance_kernel<threads_of<X>(512)>{}, 1, site, sums, routed.T,
              routed.E, all, detail::load_balance_scale(routed, rule), dloss, loss, dscores.data());
}

/// The z-loss, as `z_loss` on a CPU but with float logarithms, from the sums of a gate.
///
/// @param sums  As `route` wrote them, with z.
/// @param loss  One number of the device, out.
/// @throws precondition_error if either is missing.
/// @note   One kernel of one warp. Deterministic.
template <kernel_executor X>
void z_loss(X const& exec, gate_sums const& sums, double* loss,
            call_site site = call_site::here()) {
  expects((sums.chunks == 0 || sums.z != nullptr) && loss != nullptr,
          "z_loss: sums have z, and loss is given", site);
  exec.launch("z_loss", gate_z_kernel{}, 1, site, sums, loss);
}

}  // namespace moe::inline MOE_ABI
