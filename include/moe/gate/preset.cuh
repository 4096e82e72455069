// Presets on a GPU: from logits to rows, weights and the loss, and back.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/gate/preset.hpp>
#include <moe/gate/route.cuh>
#include <moe/loss/gate_losses.cuh>
#include <moe/loss/load_balance.cuh>
#include <moe/routing/build_table.cuh>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/kept_weights.cuh>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch for apply_preset and apply_preset_backward on an executor of kernels.
template <kernel_executor X, class Gate, class Overflow>
std::size_t preset_scratch(X const& exec, preset<Gate, Overflow> const& p, std::int64_t T, int E,
                           int P = 0, int sources = 1) {
  memory_size gradients;
  gradients.add<float>(T * p.gate.k());
  gradients.add<float>(E);
  return std::max(
      gradients.bytes() + load_balance_scratch(exec, T, E),
      gate_sums_bytes(T, E) + build_table_scratch(exec, preset_table_shape(p, T, E, P, sources)));
}

/// apply_preset on a GPU: route, build_table, weigh_kept, load_balance.
///
/// As on a CPU, but scores [T,E] are never stored: the gate sums what table and loss need on its way.
/// @param loss  [1] of the device, out; null if not wanted.
/// @throws precondition_error as those four do.
/// @note  Four to six kernels for overflow by position, deterministic. Does not wait.
template <kernel_executor X, class Gate, class Overflow, class L>
void apply_preset(X const& exec, preset<Gate, Overflow> const& p, matrix_view<L> logits,
                  batch const& tokens, expert_map const& map, memory scratch,
                  basic_routing<float>& routed, routing_table& table,
                  std::type_identity_t<vector_view<float>> weights, double* loss,
                  call_site site = call_site::here()) {
  expects(weights.size() == logits.rows() * p.gate.k(), "apply_preset: weights is [T*K]", site,
          {{"size", weights.size()}, {"T", logits.rows()}, {"K", p.gate.k()}});
  gate_sums sums = carve_gate_sums(scratch, logits.rows(), logits.cols(), site);
  sums.z = nullptr;
  sums.scores_masked = p.loss.masked == load_balance_rule::masked_tokens::scored;
  if (loss == nullptr || p.loss.choices == load_balance_rule::counted::all) sums.first = nullptr;
  if (loss == nullptr) sums.score = nullptr;

  table_rules const rules = p.rules_when(tokens.training);
  route(exec, p.gate, logits, tokens, scratch, routed, {}, sums, site);
  if constexpr (std::same_as<Overflow, overflow_by_rules>)
    build_table(exec, routed, rules, map, scratch, table, site);
  else
    build_table(exec, routed, rules, p.overflow, map, scratch, table, site);
  weigh_kept(exec, p.kept, table, routed.weight, weights.data(), site);
  if (loss != nullptr) load_balance(exec, sums, routed, p.loss, 0, loss, {}, site);
  routed.chunk_counts = {};  // they lie in the scratch
}

/// apply_preset_backward on a GPU.
/// @throws precondition_error as the steps do.
/// @note  Four kernels, deterministic. Does not wait.
template <kernel_executor X, class Gate, class Overflow, class L>
void apply_preset_backward(X const& exec, preset<Gate, Overflow> const& p, matrix_view<L> logits,
                           basic_routing<float> const& routed, routing_table const& table,
                           std::type_identity_t<vector_view<float const>> dweights, double dloss,
                           memory scratch, std::type_identity_t<matrix_view<float>> dlogits,
                           call_site site = call_site::here()) {
  detail::apply_preset_backward(
      exec, p, logits, routed, table, dweights,
      [&](memory room, vector_view<float> dscores) {
        load_balance_backward(exec, routed, p.loss, dloss, room, dscores, site);
      },
      scratch, dlogits, site);
}

}  // namespace moe::inline MOE_ABI
