// DeepSeek-V3's loss: it falls as the choices of each sequence, by itself, spread over experts.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// How many sums the loss of S sequences is made of: for each those of the scores of each expert, of its
/// choices, and of the tokens that count.
constexpr std::int64_t sequence_balance_sums(std::int64_t sequences, int E) noexcept {
  return sequences * load_balance_sums(E);
}

namespace detail {

template <class V>
void check_sequence_balance(matrix_view<V const> scores, basic_routing<V> const& routed,
                            vector_view<std::int64_t const> begin, std::int64_t sums,
                            call_site site) {
  check_load_balance(scores, routed, routed.pairs(), site);
  expects(
      begin.size() >= 1 && begin[0] == 0 && begin[begin.size() - 1] == routed.T &&
          sums == sequence_balance_sums(begin.size() - 1, routed.E),
      "sequence_balance: begin is [S + 1], from 0 to T; sums is [S (2E + 1)]", site,
      {{"size of begin", begin.size()}, {"T", routed.T}, {"size of sums", sums}, {"E", routed.E}});
}

template <class V>
bool takes_part(basic_routing<V> const& routed, std::int64_t t) noexcept {
  std::int64_t const begin = routed.first_pair(t);
  bool const invalid = begin < routed.first_pair(t + 1) && routed.expert[begin] == invalid_token;
  return !invalid && routed.tokens.is_live(t);
}

/// The sum of a token's scores, or 1 if they are not to be divided by it.
template <class V>
double score_divisor(V const* s, int E, bool normalise) noexcept {
  if (!normalise) return 1;
  double total = 0;
  for (int e = 0; e < E; ++e) total += static_cast<double>(score_or_zero(s[e]));
  return total;
}

/// Calls f(sums of sequence s) for those in which a token counts; returns how many there are.
template <class F>
std::int64_t each_sequence(vector_view<double const> sums, int E, F const& f) {
  std::int64_t const width = load_balance_sums(E);
  std::int64_t used = 0;
  for (std::int64_t s = 0; s < sums.size() / width; ++s)
    if (sums[s * width + 2 * E] > 0) {
      f(sums.data() + s * width);
      ++used;
    }
  return used;
}

}  // namespace detail

/// The first step of sequence_balance: the sums of each sequence.
///
/// @param scores     [T,E] in, as the gate's score policy made them; -inf counts as 0.
/// @param routed     [T,K] in: `expert` before anything was dropped, and the token mask.
/// @param begin      [S+1] in, not falling: sequence s has tokens [begin[s], begin[s + 1]).
/// @param normalise  Each token's scores are divided by their sum: for scores that do not add up to 1.
/// @param sums       [sequence_balance_sums(S, E)] out.
/// @throws precondition_error if the shapes disagree.
/// @note  A sequence is added up by one thread, in double. Allocates nothing.
template <class V>
void sum_sequence_balance(cpu const& exec, std::type_identity_t<matrix_view<V const>> scores,
                          basic_routing<V> const& routed, vector_view<std::int64_t const> begin,
                          bool normalise, vector_view<double> sums,
                          call_site site = call_site::here()) {
  detail::check_sequence_balance(scores, routed, begin, sums.size(), site);
  int const E = routed.E;
  std::int64_t const width = load_balance_sums(E);
  exec.split(begin.size() - 1, 1, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t s = first; s < last; ++s) {
      double* const sum = sums.data() + s * width;
      std::fill_n(sum, width, 0.0);
      std::int64_t const end = std::min(begin[s + 1], routed.T);
      for (std::int64_t t = std::max(begin[s], std::int64_t{0}); t < end; ++t) {
        if (!detail::takes_part(routed, t)) continue;
        sum[2 * E] += 1;
        double const by = detail::score_divisor(scores.row(t), E, normalise);
        for (int e = 0; e < E && by > 0; ++e)
          sum[e] += static_cast<double>(detail::score_or_zero(scores(t, e))) / by;
        for (std::int64_t i = routed.first_pair(t); i < routed.first_pair(t + 1); ++i)
          if (routed.expert[i] >= 0 && routed.expert[i] < E) sum[E + routed.expert[i]] += 1;
      }
    }
  });
}

/// The mean over sequences of the sum over experts of f[e] P[e].
///
/// Within a sequence of n tokens that count, f[e] = E / (K n) * choices of e, which carries no gradient, and
/// P[e] is the mean of the scores of e, divided by the token's sum of them if so summed. A sequence without
/// a token that counts is left out. 1 if every sequence is even.
///
/// @param routed  Its E and K alone matter.
/// @param sums    [S (2E + 1)].
/// @return The loss, unscaled; DeepSeek-V3 multiplies by 1e-4.
/// Example: E = 2, K = 1, sequences of one token each with s = {0.9, 0.3}, to expert 0 and to expert 1: P =
///          {0.75, 0.25} in both, the mean of 2 * 0.75 and 2 * 0.25 is 1. As one sequence: 1, too.
/// Source: "DeepSeek-V3", 2024, equations 17 to 20; DeepSeek-V2's seq_aux without normalisation.
template <class V>
double sequence_balance(basic_routing<V> const& routed, vector_view<double const> sums,
                        call_site site = call_site::here()) {
  int const E = routed.E;
  expects(E >= 1 && routed.K >= 1 && sums.size() % load_balance_sums(E) == 0,
          "sequence_balance: sums is [S (2E + 1)]", site, {{"size", sums.size()}, {"E", E}});
  double total = 0;
  auto const used = detail::each_sequence(sums, E, [&](double const* sum) {
    double one = 0;
    for (int e = 0; e < E; ++e) one += sum[e] * sum[E + e];
    total += one / (sum[2 * E] * sum[2 * E]);
  });
  return used == 0 ? 0 : E / static_cast<double>(routed.K) * total / static_cast<double>(used);
}

/// The gradient of sequence_balance.
///
/// @param scores, routed, begin, normalise, sums  As sum_sequence_balance was given and left them.
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dscores  [T,E] out: for score_gradient::token; 0 for tokens that do not count.
/// @throws precondition_error if the shapes disagree.
/// @note  Deterministic for any number of threads. Allocates nothing.
template <class V>
void sequence_balance_backward(cpu const& exec, std::type_identity_t<matrix_view<V const>> scores,
                               basic_routing<V> const& routed,
                               vector_view<std::int64_t const> begin, bool normalise,
                               vector_view<double const> sums, double dloss,
                               std::type_identity_t<matrix_view<V>> dscores,
                               call_site site = call_site::here()) {
  detail::check_sequence_balance(scores, routed, begin, sums.size(), site);
  expects(dscores.rows() == routed.T && dscores.cols() == routed.E,
          "sequence_balance_backward: dscores is [T,E]", site,
          {{"rows", dscores.rows()}, {"cols", dscores.cols()}});
  int const E = routed.E;
  std::int64_t const width = load_balance_sums(E);
  auto const used = static_cast<double>(detail::each_sequence(sums, E, [](double const*) {}));
  exec.split(begin.size() - 1, 1, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t s = first; s < last; ++s) {
      double const* const load = sums.data() + s * width + E;
      double const tokens = load[E];
      double const scale = dloss * E / (routed.K * used * tokens * tokens);
      std::int64_t const end = std::min(begin[s + 1], routed.T);
      for (std::int64_t t = std::max(begin[s], std::int64_t{0}); t < end; ++t) {
        double const by = detail::score_divisor(scores.row(t), E, normalise);
        bool const any = detail::takes_part(routed, t) && by > 0;
        double mean = 0;  // of load, by the shares of the scores
        for (int e = 0; e < E && any && normalise; ++e)
          mean += load[e] * static_cast<double>(detail::score_or_zero(scores(t, e))) / by;
        for (int e = 0; e < E; ++e)
          dscores(t, e) = any && is_candidate(scores(t, e))
                              ? static_cast<V>(scale * (load[e] - mean) / by)
                              : V(0);
      }
    }
  });
}

}  // namespace moe::inline MOE_ABI
