// What a router does to its experts: loads, drops, confidence, and which experts work together.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// How evenly n experts are loaded.
struct load_statistics {
  std::int64_t total = 0;
  std::int64_t least = 0;
  std::int64_t greatest = 0;
  std::int64_t idle = 0;  ///< Experts without load.
  double imbalance = 1;   ///< Greatest load / mean load; 1 is even.
  double variation = 0;   ///< Standard deviation / mean; 0 is even.
  double entropy = 0;     ///< Of the loads as shares, in nats; log(n) is even.
};

/// @param loads  [n]: table.wanted for what the router asked for, physical_loads for what ran.
/// @return All defaults if there is no load at all, but for `idle`.
/// @cost   O(n).
inline load_statistics measure_load(vector_view<std::int32_t const> loads) noexcept {
  load_statistics s;
  if (loads.empty()) return s;
  s.least = s.greatest = loads[0];
  for (std::int32_t load : loads) {
    s.total += load;
    s.least = std::min<std::int64_t>(s.least, load);
    s.greatest = std::max<std::int64_t>(s.greatest, load);
    s.idle += load == 0;
  }
  if (s.total == 0) return s;
  double const mean = static_cast<double>(s.total) / static_cast<double>(loads.size());
  double squares = 0;
  for (std::int32_t load : loads) {
    squares += (load - mean) * (load - mean);
    if (load > 0) {
      double const share = load / static_cast<double>(s.total);
      s.entropy -= share * std::log(share);
    }
  }
  s.imbalance = static_cast<double>(s.greatest) / mean;
  s.variation = std::sqrt(squares / static_cast<double>(loads.size())) / mean;
  return s;
}

/// The same; a GPU has an overload of its own.
/// @param out  [1] out.
inline void measure_load(cpu const&, vector_view<std::int32_t const> loads, load_statistics* out,
                         call_site = call_site::here()) noexcept {
  *out = measure_load(loads);
}

namespace detail {

inline void check_physical_loads(routing_table const& table, vector_view<std::int32_t> loads,
                                 call_site site) {
  expects(loads.size() >= table.P, "physical_loads: loads has P elements", site,
          {{"size", loads.size()}, {"P", table.P}});
}

MOE_HOST_DEVICE constexpr std::int32_t physical_load(routing_table const& table, int p) noexcept {
  std::int32_t load = 0;
  for (int s = 0; s < table.sources; ++s)
    load += table.used[static_cast<std::int64_t>(p) * table.sources + s];
  return load;
}

}  // namespace detail

/// Rows that each physical expert was given, padding not included.
/// @param loads  [P] out.
/// @throws precondition_error if loads.size() < P.
/// @cost   O(P sources).
inline void physical_loads(routing_table const& table, vector_view<std::int32_t> loads,
                           call_site site = call_site::here()) {
  detail::check_physical_loads(table, loads, site);
  for (int p = 0; p < table.P; ++p) loads[p] = detail::physical_load(table, p);
}

/// The same; a GPU has an overload of its own.
inline void physical_loads(cpu const&, routing_table const& table, vector_view<std::int32_t> loads,
                           call_site site = call_site::here()) {
  physical_loads(table, loads, site);
}

/// The part of the pairs that wanted a computed expert and got no row; 0 if there were none.
constexpr double drop_fraction(table_counts const& counts) noexcept {
  std::int64_t const lost = counts.dropped + counts.beyond_max_rows;
  return lost == 0 ? 0.0 : static_cast<double>(lost) / static_cast<double>(lost + counts.kept);
}

/// How sure a router is of its choices, on average.
struct score_statistics {
  std::int64_t tokens = 0;   ///< Tokens that took part and had a positive score.
  double entropy = 0;        ///< Mean entropy of a token's scores as shares, in nats.
  std::int64_t margins = 0;  ///< Tokens with all K choices and a candidate that was not chosen.
  double margin = 0;         ///< Mean of (score of the last choice - best score not chosen).
};

namespace detail {

/// Tokens whose sums are added up apart, so that no sum depends on the number of threads.
inline constexpr std::int64_t statistics_block = 256;

template <class V>
void check_scores(basic_routing<V> const& in, matrix_view<V const> scores, call_site site) {
  expects(scores.rows() == in.T && scores.cols() == in.E && scores.ld() >= in.E,
          "measure_scores: scores is [T,E]", site,
          {{"rows", scores.rows()}, {"cols", scores.cols()}, {"T", in.T}, {"E", in.E}});
}

template <class V>
void check_co_activation(basic_routing<V> const& in, matrix_view<std::int64_t> counts,
                         call_site site) {
  expects(counts.rows() == in.E && counts.cols() == in.E && counts.ld() >= in.E,
          "count_co_activation: counts is [E,E]", site,
          {{"rows", counts.rows()}, {"cols", counts.cols()}, {"E", in.E}});
}

/// Adds the sums of other tokens.
template <class Sums>
MOE_HOST_DEVICE constexpr void add_sums(Sums& sum, Sums const& part) noexcept {
  sum.tokens += part.tokens;
  sum.entropy += part.entropy;
  sum.margins += part.margins;
  sum.margin += part.margin;
}
/// From sums to means.
MOE_HOST_DEVICE constexpr score_statistics mean_of(score_statistics sum) noexcept {
  if (sum.tokens > 0) sum.entropy /= static_cast<double>(sum.tokens);
  if (sum.margins > 0) sum.margin /= static_cast<double>(sum.margins);
  return sum;
}

template <class V>
void add_score_statistics(basic_routing<V> const& in, V const* score, std::int64_t t,
                          score_statistics& s) noexcept {
  std::int64_t const i0 = in.first_pair(t), i1 = in.first_pair(t + 1);
  if (!in.tokens.is_live(t) || i0 == i1 || in.expert[i0] == invalid_token) return;

  double total = 0, weighted = 0;
  for (int e = 0; e < in.E; ++e)
    if (score[e] > 0) {
      double const x = static_cast<double>(score[e]);
      total += x;
      weighted += x * std::log(x);
    }
  if (total > 0 && total < std::numeric_limits<double>::infinity()) {
    ++s.tokens;
    s.entropy += std::log(total) - weighted / total;
  }

  for (std::int64_t i = i0; i < i1; ++i)
    if (in.expert[i] < 0 || in.expert[i] >= in.E) return;
  V best = no_score<V>;
  for (int e = 0; e < in.E; ++e)
    if (score[e] > best && std::find(in.expert + i0, in.expert + i1, e) == in.expert + i1)
      best = score[e];
  V const last = score[in.expert[i1 - 1]];
  if (is_candidate(best) && is_candidate(last)) {
    ++s.margins;
    s.margin += static_cast<double>(last) - static_cast<double>(best);
  }
}

}  // namespace detail

/// Bytes of scratch that measure_scores needs for T tokens.
constexpr std::size_t measure_scores_scratch(std::int64_t T) noexcept {
  std::int64_t const blocks = (T + detail::statistics_block - 1) / detail::statistics_block;
  return memory_size().add<score_statistics>(blocks).bytes();
}

/// Mean entropy and mean margin of a router's scores.
///
/// @param in      The routing made from the scores. Masked and invalid tokens are left out.
/// @param scores  [T,E] in: not negative where they are to count as shares; -inf = no candidate.
/// @throws precondition_error if scores is not [T,E] or scratch is too small.
/// @note   Sums in double over blocks of 256 tokens: bitwise the same for any number of threads.
///         Allocates nothing.
/// @cost   O(T E).
template <std::floating_point V>
score_statistics measure_scores(cpu const& exec, basic_routing<V> const& in,
                                std::type_identity_t<matrix_view<V const>> scores, memory scratch,
                                call_site site = call_site::here()) {
  detail::check_scores<V>(in, scores, site);
  constexpr std::int64_t block = detail::statistics_block;
  std::int64_t const blocks = (in.T + block - 1) / block;
  auto* const part = scratch.take<score_statistics>(
      blocks, "measure_scores: scratch of measure_scores_scratch(T) bytes", site);
  exec.each(blocks, [&](std::int64_t b, int) {
    score_statistics sum;
    for (std::int64_t t = b * block; t < std::min(in.T, (b + 1) * block); ++t)
      detail::add_score_statistics(in, scores.row(t), t, sum);
    part[b] = sum;
  });
  score_statistics sum;
  for (std::int64_t b = 0; b < blocks; ++b) detail::add_sums(sum, part[b]);
  return detail::mean_of(sum);
}

/// The same; a GPU has overloads of its own.
constexpr std::size_t measure_scores_scratch(cpu const&, std::int64_t T) noexcept {
  return measure_scores_scratch(T);
}
/// @param out  [1] out.
template <std::floating_point V>
void measure_scores(cpu const& exec, basic_routing<V> const& in,
                    std::type_identity_t<matrix_view<V const>> scores, memory scratch,
                    score_statistics* out, call_site site = call_site::here()) {
  *out = measure_scores(exec, in, scores, scratch, site);
}

/// Adds up how often two experts were chosen by the same token: what placement by affinity reads.
///
/// @param counts  [E,E] in and out: counts(a, b) and counts(b, a) grow by 1 for each two choices
///                a != b of one token, counts(a, a) by 1 for each choice a. Start from zeros.
/// @throws precondition_error if counts is not [E,E].
/// @note   Integers: the same for any number of threads. Allocates nothing.
/// @cost   O(T K^2).
template <class V>
void count_co_activation(cpu const& exec, basic_routing<V> const& in,
                         matrix_view<std::int64_t> counts, call_site site = call_site::here()) {
  detail::check_co_activation(in, counts, site);
  exec.split(in.T, 256, [&](std::int64_t first, std::int64_t last, int) {
    auto const is_id = [&](std::int32_t e) { return e >= 0 && e < in.E; };
    for (std::int64_t t = first; t < last; ++t) {
      std::int64_t const i0 = in.first_pair(t), i1 = in.first_pair(t + 1);
      if (!in.tokens.is_live(t) || i0 == i1 || in.expert[i0] == invalid_token) continue;
      for (std::int64_t i = i0; i < i1; ++i)
        for (std::int64_t j = i0; j < i1; ++j) {
          std::int32_t const a = in.expert[i], b = in.expert[j];
          if (is_id(a) && is_id(b) && (a != b || i == j))
            std::atomic_ref(counts(a, b)).fetch_add(1, std::memory_order_relaxed);
        }
    }
  });
}

/// Adds up how much each expert counts: the weights of the pairs that chose it. What pruning and growing of
/// experts, or of their ranks, read.
///
/// @param importance  [E] in and out: grows by the weights of the tokens of `in`. Start from zeros.
/// @throws precondition_error if importance is not [E].
/// @note   In double, in the order of the pairs. Allocates nothing.
/// @cost   O(T K), on the calling thread.
template <class V>
void count_importance(basic_routing<V> const& in, vector_view<double> importance,
                      call_site site = call_site::here()) {
  expects(importance.size() == in.E, "count_importance: importance is [E]", site,
          {{"size", importance.size()}, {"E", in.E}});
  for (std::int64_t t = 0; t < in.T; ++t)
    for (std::int64_t i = in.first_pair(t); i < in.first_pair(t + 1) && in.tokens.is_live(t); ++i)
      if (in.expert[i] >= 0 && in.expert[i] < in.E)
        importance[in.expert[i]] += static_cast<double>(in.weight[i]);
}

}  // namespace moe::inline MOE_ABI
