// The load-balancing loss of GShard, Switch and DeepSpeed: it falls as tokens spread over experts.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_tokens.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// What the variants of the load-balancing loss differ in.
///
/// | original                              | choices | masked  |
/// |---------------------------------------|---------|---------|
/// | GShard, Switch, Tutel, DeepSpeed top-2 | first   | left_out |
/// | DeepSpeed top-1                       | first   | scored  |
/// | DeepSpeed top-k, Megatron             | all     | left_out |
struct load_balance_rule {
  /// Which choices load an expert. Capacity plays no part: dropped ones count, too.
  enum class counted : std::uint8_t { first, all };
  /// What a token with live = 0 does: nothing, or its scores enter the mean and only its choices do not.
  enum class masked_tokens : std::uint8_t { left_out, scored };

  counted choices = counted::first;
  masked_tokens masked = masked_tokens::left_out;

  friend constexpr bool operator==(load_balance_rule const&, load_balance_rule const&) = default;
};

namespace detail {

/// A score, or 0 where there is no candidate.
template <class V>
MOE_HOST_DEVICE constexpr V score_or_zero(V s) noexcept {
  return where(is_candidate(s), s, V(0));
}

/// Adds four rows of scores to sum [E]: the sums are loaded and stored once for four rows.
template <class V>
void add_scores(V const* const* rows, std::int64_t E, double* sum) noexcept {
  V const *const a = rows[0], *const b = rows[1], *const c = rows[2], *const d = rows[3];
  for (std::int64_t e = 0; e < E; ++e)
    sum[e] +=
        (static_cast<double>(score_or_zero(a[e])) + static_cast<double>(score_or_zero(b[e]))) +
        (static_cast<double>(score_or_zero(c[e])) + static_cast<double>(score_or_zero(d[e])));
}

/// What load_balance_sums(E) counts, in scratch; the sums of scores are zeros if there are none.
template <class V>
vector_view<double const> sum_load(cpu const& exec, matrix_view<V const> scores,
                                   basic_routing<V> const& routed, load_balance_rule const& rule,
                                   memory scratch, call_site site) {
  using masked = load_balance_rule::masked_tokens;
  std::int64_t const E = routed.E;
  double const* const sums = sum_tokens(
      exec, routed.T, 2 * E + 1, scratch, "load_balance: scratch >= load_balance_scratch(T, E)",
      site, [&](std::int64_t first, std::int64_t last, double* sum) {
        double* const load = sum + E;
        V const* rows[4];
        int held = 0;
        for (std::int64_t t = first; t < last; ++t) {
          std::int64_t const begin = routed.first_pair(t);
          std::int64_t const end = routed.first_pair(t + 1);
          if (begin < end && routed.expert[begin] == invalid_token) continue;
          bool const live = routed.tokens.is_live(t);
          if (!live && rule.masked == masked::left_out) continue;
          sum[2 * E] += 1;
          if (!scores.absent()) {
            rows[held++] = scores.row(t);
            if (held == 4) add_scores(rows, E, sum);
            held %= 4;
          }
          if (!live || begin == end) continue;
          bool const one = rule.choices == load_balance_rule::counted::first;
          for (std::int64_t i = begin; i < (one ? begin + 1 : end); ++i) {
            std::int32_t const e = routed.expert[i];
            if (e >= 0 && e < E) load[e] += 1;
          }
        }
        for (int n = 0; n < held; ++n)
          for (std::int64_t e = 0; e < E; ++e)
            sum[e] += static_cast<double>(score_or_zero(rows[n][e]));
      });
  return {sums, 2 * E + 1};
}

/// E / n, n = choices counted of each token: the loss of perfectly balanced tokens is 1.
template <class V>
MOE_HOST_DEVICE constexpr double load_balance_scale(basic_routing<V> const& routed,
                                                    load_balance_rule const& rule) noexcept {
  return rule.choices == load_balance_rule::counted::all
             ? static_cast<double>(routed.E) / static_cast<double>(routed.K)
             : static_cast<double>(routed.E);
}

template <class V>
void check_load_balance(matrix_view<V const> scores, basic_routing<V> const& routed,
                        std::int64_t pairs, call_site site) {
  expects(routed.E >= 1 && routed.K >= 1, "load_balance: routing has E >= 1 and K >= 1", site,
          {{"E", routed.E}, {"K", routed.K}});
  expects(routed.expert != nullptr || pairs == 0, "load_balance: the routing's expert is given",
          site);
  expects(scores.rows() == routed.T && scores.cols() == routed.E && scores.ld() >= scores.cols() &&
              (routed.T == 0 || !scores.absent()),
          "load_balance: scores is [T,E]", site,
          {{"rows", scores.rows()},
           {"cols", scores.cols()},
           {"ld", scores.ld()},
           {"T", routed.T},
           {"E", routed.E}});
}

template <class V>
void check_load_balance_backward(basic_routing<V> const& routed, vector_view<V> dscores,
                                 std::int64_t pairs, call_site site) {
  expects(routed.E >= 1 && routed.K >= 1, "load_balance_backward: routing has E >= 1 and K >= 1",
          site, {{"E", routed.E}, {"K", routed.K}});
  expects(routed.expert != nullptr || pairs == 0,
          "load_balance_backward: the routing's expert is given", site);
  expects(dscores.size() == routed.E, "load_balance_backward: dscores is [E]", site,
          {{"size", dscores.size()}, {"E", routed.E}});
}

inline void check_load_sums(vector_view<double const> sums, int E, call_site site) {
  expects(sums.size() == 2 * std::int64_t{E} + 1, "load_balance: sums is [2E + 1]", site,
          {{"size", sums.size()}, {"E", E}});
}

}  // namespace detail

/// Bytes of scratch for load_balance and load_balance_backward.
constexpr std::size_t load_balance_scratch(std::int64_t T, int E) noexcept {
  memory_size size;
  return detail::add_sum_tokens(size, T, 2 * std::int64_t{E} + 1).bytes();
}

/// How many sums over tokens the loss is made of: of the scores of each expert, of its choices, and of
/// the tokens that count.
constexpr std::int64_t load_balance_sums(int E) noexcept {
  return 2 * std::int64_t{E} + 1;
}

/// The first step of load_balance: its sums. Those of several batches, or of the tokens of several ranks,
/// may be added up before the second.
///
/// @param scores, routed, scratch  As load_balance takes them.
/// @param sums  [load_balance_sums(E)] out.
/// @throws precondition_error as load_balance, or if sums has another size.
template <class V>
void sum_load_balance(cpu const& exec, std::type_identity_t<matrix_view<V const>> scores,
                      basic_routing<V> const& routed, load_balance_rule const& rule, memory scratch,
                      vector_view<double> sums, call_site site = call_site::here()) {
  detail::check_load_balance(scores, routed, routed.pairs(), site);
  detail::check_load_sums(sums, routed.E, site);
  auto const found = detail::sum_load(exec, scores, routed, rule, scratch, site);
  std::copy(found.begin(), found.end(), sums.begin());
}

/// The second step: the loss of the tokens that were summed.
/// @param routed  Its E and K alone matter.
/// @throws precondition_error unless sums is [2E + 1].
template <class V>
double load_balance(basic_routing<V> const& routed, load_balance_rule const& rule,
                    vector_view<double const> sums, call_site site = call_site::here()) {
  int const E = routed.E;
  detail::check_load_sums(sums, E, site);
  double const tokens = sums[2 * E];
  if (tokens == 0) return 0;
  double total = 0;
  for (int e = 0; e < E; ++e) total += sums[e] * sums[E + e];
  return detail::load_balance_scale(routed, rule) * total / (tokens * tokens);
}

/// The gradient of the loss of all tokens that were summed with respect to the scores of those of this
/// routing: see below. Reads no tokens.
template <class V>
void load_balance_backward(basic_routing<V> const& routed, load_balance_rule const& rule,
                           vector_view<double const> sums, double dloss,
                           std::type_identity_t<vector_view<V>> dscores,
                           call_site site = call_site::here()) {
  detail::check_load_balance_backward(routed, dscores, 0, site);
  detail::check_load_sums(sums, routed.E, site);
  double const scale = detail::load_balance_scale(routed, rule) * dloss;
  int const E = routed.E;
  double const tokens = sums[2 * E];
  for (int e = 0; e < E; ++e)
    dscores[e] = tokens == 0 ? V(0) : static_cast<V>(scale * sums[E + e] / (tokens * tokens));
}

/// E / n * sum over e of me[e] * ce[e].
///
/// me[e] is the mean score of expert e over the tokens that count, ce[e] the choices of e divided by
/// the same number of tokens, n the choices counted of each token (1 or K). 1 if the load is even and
/// scores add up to 1. A token counts unless its logits were invalid, or it is masked and the rule
/// leaves those out. Multiply by a coefficient (0.01 is usual) and add over layers.
///
/// @param scores   [T,E] in. What the gate's score policy made, without noise unless the original
///                 adds it; -inf counts as 0.
/// @param routed   [T,K] in: `expert` as it was before anything was dropped, and the token mask.
/// @param scratch  load_balance_scratch(T, E) bytes.
/// @return The loss, unscaled; 0 if no token counts.
/// @throws precondition_error if the shapes disagree, ids are not given, or scratch is short.
/// @note  Sums are in double and do not depend on the number of threads. Allocates nothing.
/// @cost  Reads T*E scores and T*K ids.
/// Example: T = 2, E = 2, scores {{0.8, 0.2}, {0.6, 0.4}}, both tokens choose expert 0:
///          2 * (0.7 * 1 + 0.3 * 0) = 1.4.
/// Source: Lepikhin et al., "GShard", 2020, algorithm 1; Fedus et al., "Switch transformers", 2021,
///         equation 4.
template <class V>
double load_balance(cpu const& exec, std::type_identity_t<matrix_view<V const>> scores,
                    basic_routing<V> const& routed, load_balance_rule const& rule, memory scratch,
                    call_site site = call_site::here()) {
  detail::check_load_balance(scores, routed, routed.pairs(), site);
  auto const sums = detail::sum_load(exec, scores, routed, rule, scratch, site);
  return load_balance(routed, rule, sums, site);
}

/// The gradient of load_balance with respect to the scores: the same for every token that counts,
/// because ce carries none (it is a count).
///
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dscores  [E] out: d objective / d scores(t, e), for any token t that counts; 0 if none does.
/// @throws precondition_error if the shapes disagree, ids are not given, or scratch is short.
/// @note  Deterministic for any number of threads. Allocates nothing.
/// @cost  Reads T*K ids.
template <class V>
void load_balance_backward(cpu const& exec, basic_routing<V> const& routed,
                           load_balance_rule const& rule, double dloss, memory scratch,
                           std::type_identity_t<vector_view<V>> dscores,
                           call_site site = call_site::here()) {
  detail::check_load_balance_backward(routed, dscores, routed.pairs(), site);
  auto const sums = detail::sum_load(exec, matrix_view<V const>{}, routed, rule, scratch, site);
  load_balance_backward(routed, rule, sums, dloss, dscores, site);
}

}  // namespace moe::inline MOE_ABI
