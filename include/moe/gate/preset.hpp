// A preset: a gate with everything that follows it until tokens move, as one value and one call.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/route.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/routing/build_table.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/kept_weights.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {

/// On which side of the experts weights multiply; the difference shows with any non-linear expert.
enum class weights_apply : std::uint8_t {
  after_experts,  ///< combine(..., weights, ...).
  before_experts  ///< dispatch multiplies, combine adds up what was kept with weight 1.
};

/// Stands for the overflow rule that a preset's table rules name.
struct overflow_by_rules {};

/// A router as a whole: what a published system does between logits and the movement of tokens.
///
///     auto const router = moe::deepspeed_top2({.capacity_factor = 1.25});
///     moe::routing_buffer routing(T, router.gate.k(), E);
///     moe::table_buffer table(moe::preset_table_shape(router, T, E));
///     moe::buffer scratch(moe::preset_scratch(exec, router, T, E));
///     double const balance = moe::apply_preset(exec, router, logits, {.step = 7, .training = true},
///                                              {}, scratch, routing, table, weights);
///
/// and then `dispatch`, the experts and `combine` with `table` and `weights`. Any member may be
/// changed before use: `router.rules.rows = layout::padded`.
/// @tparam Overflow  A user's overflow_rule, used in place of rules.when_full.
template <class Gate, class Overflow = overflow_by_rules>
struct preset {
  Gate gate{};
  table_rules rules{};
  [[no_unique_address]] Overflow overflow{};
  /// overflow::random means position outside training, unless this is set.
  bool random_overflow_in_evaluation = false;
  kept_weights kept{};
  load_balance_rule loss{};
  weights_apply apply = weights_apply::after_experts;
  /// The caller multiplies the router's input by U(1 - x, 1 + x) in training: see `jitter`.
  float input_jitter = 0;

  /// What build_table is told.
  constexpr table_rules rules_when(bool training) const noexcept {
    table_rules now = rules;
    if (now.when_full == moe::overflow::random && !training && !random_overflow_in_evaluation)
      now.when_full = moe::overflow::position;
    return now;
  }

  /// The same preset with a user's overflow rule.
  template <class Rule>
  constexpr preset<Gate, Rule> with_overflow(Rule const& rule) const {
    return {gate, rules, rule, random_overflow_in_evaluation, kept, loss, apply, input_jitter};
  }
};

/// The bounds of the table that apply_preset fills, for at most T tokens and E experts.
template <class Gate, class Overflow>
constexpr table_shape preset_table_shape(preset<Gate, Overflow> const& p, std::int64_t T, int E,
                                         int P = 0, int sources = 1) {
  table_shape shape{.T = T, .K = p.gate.k(), .E = E, .P = P, .sources = sources};
  shape.max_rows = max_rows(p.rules, shape);
  return shape;
}

/// Bytes of scratch for apply_preset and apply_preset_backward: of the scores, [T,E], for the most part.
/// @param V  The routing's value type.
template <std::floating_point V = float, class Gate, class Overflow>
std::size_t preset_scratch(cpu const& exec, preset<Gate, Overflow> const& p, std::int64_t T, int E,
                           int P = 0, int sources = 1) {
  int const K = p.gate.k();
  memory_size scores, gradients;
  scores.add<V>(T * E);
  scores.add<double>(load_balance_sums(E));
  gradients.add<V>(T * K);
  gradients.add<V>(E);
  std::size_t const steps =
      std::max({route_scratch<Gate, V>(exec, E), load_balance_scratch(T, E),
                build_table_scratch(exec, preset_table_shape(p, T, E, P, sources))});
  return std::max(scores.bytes(), gradients.bytes()) + steps;
}

/// apply_preset, up to the sums that the load-balancing loss is made of.
///
/// @param loss_sums  [load_balance_sums(E)] out: added up over ranks, say, they make `load_balance` and its
///                   gradient those of the tokens of all of them.
/// @param scratch, others  As apply_preset takes them.
/// @throws precondition_error as apply_preset, or if loss_sums has another size.
template <class Gate, class Overflow, class L, std::floating_point V>
void apply_preset(cpu const& exec, preset<Gate, Overflow> const& p, matrix_view<L> logits,
                  batch const& tokens, expert_map const& map, memory scratch,
                  basic_routing<V>& routed, routing_table& table,
                  std::type_identity_t<vector_view<V>> weights, vector_view<double> loss_sums,
                  call_site site = call_site::here()) {
  std::int64_t const T = logits.rows();
  std::int64_t const E = logits.cols();
  expects(weights.size() == T * p.gate.k(), "apply_preset: weights is [T*K]", site,
          {{"size", weights.size()}, {"T", T}, {"K", p.gate.k()}});
  matrix_view const scores(
      scratch.take<V>(T * E, "apply_preset: scratch >= preset_scratch(exec, preset, T, E)", site),
      T, E);
  table_rules const rules = p.rules_when(tokens.training);

  route(exec, p.gate, logits, tokens, scratch, routed, scores, site);
  if constexpr (std::same_as<Overflow, overflow_by_rules>)
    build_table(exec, routed, rules, map, scratch, table, site);
  else
    build_table(exec, routed, rules, p.overflow, map, scratch, table, site);
  weigh_kept(exec, p.kept, table, routed.weight, weights.data(), site);
  sum_load_balance(exec, scores, routed, p.loss, scratch, loss_sums, site);
}

/// From logits to rows and weights: route, build_table, weigh_kept, load_balance.
///
/// @param logits   [T,E] in; -inf marks an expert that is not a candidate.
/// @param tokens   Ids, seed, step, mask, and whether this is training.
/// @param map      {}: every expert is physical, visible and computed.
/// @param scratch  preset_scratch(exec, p, T, E, P, sources) bytes.
/// @param routed   Arrays for T, K = p.gate.k() and E; out: what `route` writes.
/// @param table    Room for preset_table_shape(p, T, E, P, sources); out: what build_table writes.
/// @param weights  [T*K] out: what combine (or dispatch, see p.apply) multiplies with; 0 where a pair
///                 has no row.
/// @return The load-balancing loss, unscaled.
/// @throws precondition_error as those four do.
/// @note  Results do not depend on the number of threads. Allocates nothing.
/// @cost  That of the four; reads T*E logits once, writes and reads T*E scores once.
template <class Gate, class Overflow, class L, std::floating_point V>
double apply_preset(cpu const& exec, preset<Gate, Overflow> const& p, matrix_view<L> logits,
                    batch const& tokens, expert_map const& map, memory scratch,
                    basic_routing<V>& routed, routing_table& table,
                    std::type_identity_t<vector_view<V>> weights,
                    call_site site = call_site::here()) {
  char const* const enough = "apply_preset: scratch >= preset_scratch(exec, preset, T, E)";
  std::int64_t const n = load_balance_sums(static_cast<int>(logits.cols()));
  vector_view const sums(scratch.take<double>(n, enough, site), n);
  apply_preset(exec, p, logits, tokens, map, scratch, routed, table, weights, sums, site);
  return load_balance(routed, p.loss, sums, site);
}

namespace detail {

/// On any executor: it only calls what has an overload for each.
/// @param balance_backward  balance_backward(scratch, dscores): the gradient of the loss.
template <class Executor, class Gate, class Overflow, class L, class V, class BalanceBackward>
void apply_preset_backward(Executor const& exec, preset<Gate, Overflow> const& p,
                           matrix_view<L> logits, basic_routing<V> const& routed,
                           routing_table const& table, vector_view<V const> dweights,
                           BalanceBackward const& balance_backward, memory scratch,
                           matrix_view<V> dlogits, call_site site) {
  std::int64_t const pairs = routed.T * routed.K;
  expects(dweights.size() == pairs, "apply_preset_backward: dweights is [T*K]", site,
          {{"size", dweights.size()}, {"T", routed.T}, {"K", routed.K}});
  char const* const enough = "apply_preset_backward: scratch >= preset_scratch(exec, preset, T, E)";
  V* const dgate = scratch.take<V>(pairs, enough, site);  // [T,K]
  vector_view const dscores(scratch.take<V>(routed.E, enough, site), routed.E);

  weigh_kept_backward(exec, p.kept, table, routed.weight, dweights.data(), dgate, site);
  balance_backward(scratch, dscores);
  bool const masked = p.loss.masked == load_balance_rule::masked_tokens::scored;
  route_backward(exec, p.gate, logits, routed, {dgate, routed.T, routed.K},
                 {.expert = dscores, .reaches_masked = masked, .token = {}}, scratch, dlogits,
                 site);
}

}  // namespace detail

/// The gradient of apply_preset with respect to the logits.
///
/// @param logits    [T,E] in, as the forward saw them.
/// @param routed    As the forward left it.
/// @param table     As the forward left it.
/// @param dweights  [T*K] in: gradient with respect to the forward's weights.
/// @param dloss     Gradient with respect to the loss: its coefficient.
/// @param scratch   preset_scratch(exec, p, T, E, P, sources) bytes.
/// @param dlogits   [T,E] out.
/// @throws precondition_error as the steps do.
/// @note  Which expert, which row and what is dropped are constants. Does not depend on the number of
///        threads. Allocates nothing.
/// @cost  O(T E): scores are made again from the logits.
template <class Gate, class Overflow, class L, std::floating_point V>
void apply_preset_backward(cpu const& exec, preset<Gate, Overflow> const& p, matrix_view<L> logits,
                           basic_routing<V> const& routed, routing_table const& table,
                           std::type_identity_t<vector_view<V const>> dweights, double dloss,
                           memory scratch, std::type_identity_t<matrix_view<V>> dlogits,
                           call_site site = call_site::here()) {
  detail::apply_preset_backward(
      exec, p, logits, routed, table, dweights,
      [&](memory room, vector_view<V> dscores) {
        load_balance_backward(exec, routed, p.loss, dloss, room, dscores, site);
      },
      scratch, dlogits, site);
}

/// The same of a loss whose sums are given, say of the tokens of several ranks.
/// @param loss_sums  [load_balance_sums(E)].
template <class Gate, class Overflow, class L, std::floating_point V>
void apply_preset_backward(cpu const& exec, preset<Gate, Overflow> const& p, matrix_view<L> logits,
                           basic_routing<V> const& routed, routing_table const& table,
                           std::type_identity_t<vector_view<V const>> dweights,
                           vector_view<double const> loss_sums, double dloss, memory scratch,
                           std::type_identity_t<matrix_view<V>> dlogits,
                           call_site site = call_site::here()) {
  detail::apply_preset_backward(
      exec, p, logits, routed, table, dweights,
      [&](memory, vector_view<V> dscores) {
        load_balance_backward(routed, p.loss, loss_sums, dloss, dscores, site);
      },
      scratch, dlogits, site);
}

}  // namespace moe::inline MOE_ABI
