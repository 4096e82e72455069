// Sinkhorn: tokens are assigned by a matrix whose rows and columns have been made to sum alike.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/assign_checks.hpp>
#include <moe/gate/route.hpp>

namespace moe::inline MOE_ABI {

/// How far to go.
struct sinkhorn {
  int k = 1;                 ///< Experts of a token, at most 16.
  double tolerance = 1e-4;   ///< Mean change of a column's factor in the last pass.
  int most_passes = 10'000;  ///< So that nothing hangs.
};

/// What became of it.
struct sinkhorn_result {
  int passes = 0;
  double error = 0;  ///< Mean change of a column's factor in the last pass.
  bool converged = true;
};

namespace detail {

inline constexpr std::int64_t sinkhorn_block = 64;  // tokens whose sums are added up apart

inline constexpr char const* sinkhorn_rule =
    "assign_by_sinkhorn: scratch has sinkhorn_scratch<V>(exec, T, E) bytes";

/// One pass: each row is scaled to 1/T, then each column to 1/E.
/// @param cost    [T,E] exp of logits less the row's greatest; a row of zeros takes no part.
/// @param factor  [E] of columns, in and out.
/// @param part    [blocks,E] room.
/// @return The mean change of a factor.
template <class V>
double scale_rows_and_columns(cpu const& exec, matrix_view<V const> cost, std::int64_t live,
                              double* factor, double* part) {
  constexpr double eps = 1e-8;
  std::int64_t const T = cost.rows(), E = cost.cols();
  std::int64_t const blocks = (T + sinkhorn_block - 1) / sinkhorn_block;
  exec.each(blocks, [&](std::int64_t b, int) {
    double* const sum = part + b * E;
    std::fill_n(sum, E, 0.0);
    for (std::int64_t t = b * sinkhorn_block; t < std::min(T, (b + 1) * sinkhorn_block); ++t) {
      V const* const c = cost.row(t);
      double total = 0;
      for (std::int64_t e = 0; e < E; ++e) total += factor[e] * static_cast<double>(c[e]);
      double const row = 1 / (static_cast<double>(live) * (total + eps));
      for (std::int64_t e = 0; e < E; ++e) sum[e] += row * static_cast<double>(c[e]);
    }
  });
  double change = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    double sum = 0;
    for (std::int64_t b = 0; b < blocks; ++b) sum += part[b * E + e];
    double const now = 1 / (static_cast<double>(E) * (sum + eps));
    change += std::abs(now - factor[e]);
    factor[e] = now;
  }
  return change / static_cast<double>(E);
}

}  // namespace detail

/// Bytes of scratch for assign_by_sinkhorn: of [T,E] values, for the most part.
template <std::floating_point V = float>
std::size_t sinkhorn_scratch(cpu const& exec, std::int64_t T, int E) noexcept {
  std::int64_t const blocks = (T + detail::sinkhorn_block - 1) / detail::sinkhorn_block;
  return memory_size()
      .add<V>(T * E)
      .template add<V>(exec.threads() * static_cast<std::int64_t>(E))
      .template add<double>(E)
      .template add<double>(blocks * E)
      .bytes();
}

/// The experts of each token in training: the top k of exp(logits), after rows and columns have been
/// scaled in turn until each row sums to 1/T and each column to 1/E. Outside training, the top k of the
/// logits. Ties go to the lower id.
///
/// No gradient flows. The weights are those of a gate that is told the ids: sigmoid for one choice, softmax
/// for more,
///
///     moe::assign_by_sinkhorn(exec, {.k = 2}, logits, tokens, scratch, ids);
///     moe::gate<moe::softmax, moe::replayed<2>, moe::as_scored> const gate{
///         {}, moe::replayed<2>(ids.data(), 2, ids.ld()), {}};
///     moe::route(exec, gate, logits, tokens, scratch, routing);
///
/// whose route_backward is the gradient. Scaling a row does not change which of its elements is the
/// greatest, so the factors of columns alone select: their logarithms are a bias on the logits.
///
/// @param logits   [T,E] in, E >= k; -inf = no candidate.
/// @param tokens   Masked tokens, and those with NaN or +inf, take no part and get no_candidate.
/// @param scratch  sinkhorn_scratch<V>(exec, T, E) bytes.
/// @param ids      [T,k] out.
/// @throws precondition_error if a shape or an option is out of range, or scratch is too small.
/// @note  Sums in double over blocks of 64 tokens: the same for any number of threads. Allocates nothing.
///        Not causal in training.
/// @cost  O(T E) for each pass.
/// Source: Megatron-LM, megatron/core/transformer/moe, `sinkhorn` and its load balancing.
template <std::floating_point V = float, class L>
sinkhorn_result assign_by_sinkhorn(cpu const& exec, sinkhorn const& rule, matrix_view<L> logits,
                                   batch const& tokens, memory scratch,
                                   matrix_view<std::int32_t> ids,
                                   call_site site = call_site::here()) {
  expects(rule.k >= 1 && rule.k <= max_choices && rule.tolerance > 0 && rule.most_passes >= 1,
          "assign_by_sinkhorn: 1 <= k <= 16, tolerance > 0, most_passes >= 1", site,
          {{"k", rule.k}, {"tolerance", rule.tolerance}, {"most_passes", rule.most_passes}});
  detail::check_assign("assign_by_sinkhorn: logits are [T,E], E >= k, ld >= E",
                       "assign_by_sinkhorn: ids are [T,k], ld >= k, and do not overlap the logits",
                       logits, ids, rule.k, site);
  std::int64_t const T = logits.rows();
  int const E = static_cast<int>(logits.cols());
  std::int64_t const blocks = (T + detail::sinkhorn_block - 1) / detail::sinkhorn_block;
  char const* const enough = detail::sinkhorn_rule;
  matrix_view<V> const cost(scratch.take<V>(T * E, enough, site), T, E);
  V* const keys = scratch.take<V>(exec.threads() * static_cast<std::int64_t>(E), enough, site);
  double* const factor = scratch.take<double>(E, enough, site);
  double* const part = scratch.take<double>(blocks * E, enough, site);

  // ids(t, 0) says for now whether t takes part.
  exec.split(T, detail::route_grain, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      array_row<V> row(cost.row(t), E);
      bool const valid = detail::load_logits(logits.row(t), E, row.data());
      V const highest = row.max(0, E);
      bool const live = valid && tokens.is_live(t) && is_candidate(highest);
      row.transform([=](int, V l) {
        return live && is_candidate(l) ? static_cast<V>(std::exp(l - highest)) : V(0);
      });
      ids(t, 0) = live ? 0 : no_candidate;
    }
  });
  std::fill_n(factor, E, 1.0);
  sinkhorn_result result;
  if (tokens.training) {
    std::int64_t live = 0;
    for (std::int64_t t = 0; t < T; ++t) live += ids(t, 0) == 0;
    result.converged = live == 0;
    while (!result.converged && result.passes < rule.most_passes) {
      ++result.passes;
      result.error = detail::scale_rows_and_columns<V>(exec, cost, live, factor, part);
      result.converged = result.error <= rule.tolerance;
    }
  }
  for (int e = 0; e < E; ++e) factor[e] = std::log(factor[e]);
  exec.split(T, detail::route_grain, [&](std::int64_t first, std::int64_t last, int member) {
    for (std::int64_t t = first; t < last; ++t) {
      bool const live = ids(t, 0) == 0;
      array_row<V> row(keys + member * static_cast<std::int64_t>(E), E);
      detail::load_logits(logits.row(t), E, row.data());
      row.transform([=](int e, V l) { return l + static_cast<V>(factor[e]); });
      for (int j = 0; j < rule.k; ++j)
        ids(t, j) = live ? row.pop_max(0, E).expert : static_cast<int>(no_candidate);
    }
  });
  return result;
}

}  // namespace moe::inline MOE_ABI
