// Expert choice: each expert takes the tokens that score best with it. Mixture-of-Depths is the same
// with one expert. Not causal: whether a token is taken depends on tokens that come after it.
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
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/route_checks.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/row_copies.hpp>
#include <moe/gate/score.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/varying_routing.hpp>

namespace moe::inline MOE_ABI {

/// A gate in which experts choose: of the S tokens of a sequence, each expert takes the C that score
/// highest with it, ties to the lower token. A token has 0 to E experts; every expert has the same
/// load, so that no auxiliary loss is needed.
///
/// @tparam Score  A score_policy: from a token's logits to its scores, which are the weights.
/// Source: Zhou et al., "Mixture-of-experts with expert choice routing", 2022.
/// Example: softmax scores of 3 tokens and 2 experts (0.9, 0.1), (0.6, 0.4), (0.2, 0.8), C = 1: expert
/// 0 takes token 0 with weight 0.9, expert 1 token 2 with weight 0.8, and token 1 has no expert.
template <class Score = softmax>
struct expert_choice {
  double capacity_factor = 2;  ///< C = factor * S / E, rounded down, at least 1, at most S.
  std::int64_t sequence = 0;   ///< S: rows [i S, (i + 1) S) compete with each other. 0: all T rows.
  [[no_unique_address]] Score score{};

  /// S of a batch of T tokens.
  constexpr std::int64_t S(std::int64_t T) const noexcept { return sequence == 0 ? T : sequence; }
  /// C of a batch of T tokens.
  constexpr std::int64_t C(std::int64_t T, int E) const noexcept {
    double const rows = capacity_factor * static_cast<double>(S(T)) / E;
    if (rows >= static_cast<double>(S(T))) return S(T);
    return rows < 1 ? 1 : static_cast<std::int64_t>(rows);
  }
  /// The most pairs of a batch of T tokens: E C for each sequence, and one for each invalid token.
  constexpr std::int64_t pairs(std::int64_t T, int E) const noexcept {
    if (T == 0) return 0;
    std::int64_t const taken = T / S(T) * C(T, E) * E;
    return taken + T < T * E ? taken + T : T * E;
  }
  /// The bounds of a table of it: dropless and packed, it drops nothing.
  constexpr table_shape shape(std::int64_t T, int E) const noexcept {
    return {.T = T, .K = E, .E = E, .max_rows = T == 0 ? 0 : T / S(T) * C(T, E) * E};
  }
};

struct mixture_of_depths_options {
  double capacity = 0.125;  ///< The share of a sequence's tokens that go through the block.
  std::int64_t sequence = 0;
};

/// Mixture-of-Depths: of each sequence, the C tokens of highest router output r go through a block f;
/// the logits are r, [T,1]. out = x + r f(x) for these and x for the others: tokens plus what a layer
/// of one expert gives. For causal decoding see `above`.
/// Source: Raposo et al., "Mixture-of-depths", 2024.
constexpr expert_choice<identity> mixture_of_depths(mixture_of_depths_options options = {}) {
  return {.capacity_factor = options.capacity, .sequence = options.sequence};
}

namespace detail {

/// A token that an expert may take.
template <class V>
struct candidate {
  V score;
  std::int32_t token;

  friend constexpr bool operator<(candidate const& a, candidate const& b) noexcept {
    return a.score > b.score || (a.score == b.score && a.token < b.token);  // the best first
  }
};

template <class Score, class V>
constexpr std::int64_t scored_room(std::int64_t E) noexcept {
  constexpr std::int64_t line = memory::alignment / sizeof(V);
  return ((2 + row_copies<Score>)*E + line - 1) / line * line;
}

template <class Score, class L>
void check_expert_choice(char const* shape, expert_choice<Score> const& g, matrix_view<L> logits,
                         call_site site) {
  expect_logits(shape, logits, 1, site);
  std::int64_t const T = logits.rows();
  expects(g.capacity_factor > 0 && g.capacity_factor <= 1e9,
          "expert_choice: 0 < capacity_factor <= 1e9", site,
          {{"capacity_factor", g.capacity_factor}});
  expects(g.sequence >= 0 && (g.sequence == 0 || T % g.sequence == 0),
          "expert_choice: T is a multiple of sequence, or sequence is 0", site,
          {{"T", T}, {"sequence", g.sequence}});
}

/// Writes pair i.
template <class V>
void put(basic_routing<V> const& out, std::int64_t i, std::int32_t expert, V weight) noexcept {
  out.expert[i] = expert;
  out.weight[i] = out.score[i] = weight;
}

/// The tokens of sequence q that expert e takes, in any order; -1 behind the last.
/// @param all    [S] room. @param taken  [C] out.
template <class V>
void take_best(basic_routing<V> const& routed, matrix_view<V const> scores, std::int64_t q, int e,
               std::int64_t S, std::int64_t C, candidate<V>* all, std::int32_t* taken) {
  std::int64_t n = 0;
  for (std::int64_t t = q * S; t < (q + 1) * S; ++t)
    if (routed.tokens.is_live(t) && is_candidate(scores(t, e)))
      all[n++] = {scores(t, e), static_cast<std::int32_t>(t)};
  std::int64_t const kept = std::min(n, C);
  if (kept < n) std::nth_element(all, all + kept, all + n);
  for (std::int64_t i = 0; i < C; ++i) taken[i] = i < kept ? all[i].token : -1;
}

}  // namespace detail

/// Bytes of scratch for `route` of T tokens, and for `route_backward`.
/// @param V  The routing's value type.
template <std::floating_point V = float, class Score>
std::size_t route_scratch(cpu const& exec, expert_choice<Score> const& g, std::int64_t T, int E) {
  return memory_size()
      .add<V>(exec.threads() * detail::scored_room<Score, V>(E))
      .template add<V>(T * E)
      .template add<detail::candidate<V>>(exec.threads() * g.S(T))
      .template add<std::int32_t>(T == 0 ? 0 : T / g.S(T) * g.C(T, E) * E)
      .bytes();
}

/// Lets each expert take its tokens.
///
/// A token's pairs are its experts by rising id. A masked token has none; one whose logits hold NaN or
/// +inf has one pair with expert = invalid_token, so that build_table counts it; an -inf logit is no
/// candidate. C is that of S whatever the mask says.
///
/// @param logits   [T,E] in, of V or of anything that converts to it.
/// @param scratch  route_scratch<V>(exec, g, T, E) bytes.
/// @param out      T and E of the logits, room for g.pairs(T, E). Out: begin, K = the most pairs of any
///                 token (at least 1), expert, weight = score.
/// @param scores   [T,E] out, or absent: as for the other `route`.
/// @throws precondition_error if a shape or an option is out of range, or scratch is too small.
/// @note  Results do not depend on threads. Allocates nothing. Not causal.
/// @cost  O(T E) on average.
template <class Score, class L, std::floating_point V>
  requires score_policy<Score, array_row<V>>
void route(cpu const& exec, expert_choice<Score> const& g, matrix_view<L> logits,
           batch const& tokens, memory scratch, varying_routing<V>& out,
           std::type_identity_t<matrix_view<V>> scores = {}, call_site site = call_site::here()) {
  std::int64_t const T = logits.rows();
  int const E = static_cast<int>(logits.cols());
  detail::check_expert_choice("route: logits are [T,E], E >= 1, ld >= E", g, logits, site);
  expects(out.T == T && out.E == E && out.begin != nullptr && out.token_begin == out.begin &&
              out.room >= g.pairs(T, E),
          "route: the routing has the T and E of the logits and room for pairs(T, E)", site,
          {{"routing's T", out.T},
           {"T", T},
           {"routing's E", out.E},
           {"E", E},
           {"room", out.room},
           {"pairs", g.pairs(T, E)}});
  detail::expect_shape("route: scores are [T,E], ld >= E", scores, T, E, site);
  expects(!overlap(scores, logits), "route: scores do not overlap the logits", site);

  char const* const enough = "route: scratch has route_scratch<V>(exec, g, T, E) bytes";
  std::int64_t const S = g.S(T), C = g.C(T, E), sequences = T == 0 ? 0 : T / S;
  std::int64_t const room = detail::scored_room<Score, V>(E);
  V* const rooms = scratch.take<V>(exec.threads() * room, enough, site);
  if (scores.absent()) scores = {scratch.take<V>(T * E, enough, site), T, E};
  auto* const all = scratch.take<detail::candidate<V>>(exec.threads() * S, enough, site);
  auto* const taken = scratch.take<std::int32_t>(sequences * C * E, enough, site);
  out.tokens = tokens;
  out.chunk_counts = {};

  // begin[t] = -1 for invalid tokens, and counts the experts of others below.
  exec.split(T, detail::route_grain, [&](std::int64_t first, std::int64_t last, int member) {
    for (std::int64_t t = first; t < last; ++t) {
      row_room<V> copies{rooms + member * room, row_copies<Score>};
      array_row<V> row(scores.row(t), E, &copies);
      bool const valid = detail::load_logits(logits.row(t), E, row.data());
      if (valid)
        g.score(row, tokens.at(t));
      else
        std::fill_n(row.data(), E, no_score<V>);
      out.begin[t] = !valid && tokens.is_live(t) ? -1 : 0;
    }
  });
  exec.each(sequences * E, [&](std::int64_t i, int member) {
    detail::take_best<V>(out, scores, i / E, static_cast<int>(i % E), S, C, all + member * S,
                         taken + i * C);
  });

  std::int64_t const places = sequences * E * C;
  for (std::int64_t i = 0; i < places; ++i)
    if (taken[i] >= 0) ++out.begin[taken[i]];
  std::int32_t pairs = 0;
  out.K = 1;
  for (std::int64_t t = 0; t < T; ++t) {
    bool const invalid = out.begin[t] < 0;
    out.K = std::max(out.K, out.begin[t]);
    pairs += invalid ? 1 : out.begin[t];
    out.begin[t] = pairs;  // the end; from there backwards to the begin
    if (invalid) detail::put(out, --out.begin[t], invalid_token, V(0));
  }
  out.begin[T] = pairs;
  for (std::int64_t i = places - 1; i >= 0; --i) {
    if (taken[i] < 0) continue;
    std::int64_t const t = taken[i], e = i / C % E;
    detail::put(out, --out.begin[t], static_cast<std::int32_t>(e), scores(t, e));
  }
}

/// The gradient of `route`: d/dweight to d/dlogits. Which tokens are taken is a constant.
///
/// @param logits   [T,E] in, as the forward saw them.
/// @param chosen   The routing that `route` made with this gate.
/// @param dweight  One value for each pair: gradient with respect to chosen.weight.
/// @param scratch  route_scratch<V>(exec, g, T, E) bytes.
/// @param dlogits  [T,E] out: written everywhere; 0 for tokens without an expert and -inf logits.
/// @throws precondition_error if a shape is wrong or scratch is too small.
/// @note  Results do not depend on threads. Allocates nothing.
/// @cost  O(T E).
template <class Score, class L, std::floating_point V, class D>
  requires score_policy<Score, array_row<V>>
void route_backward(cpu const& exec, expert_choice<Score> const& g, matrix_view<L> logits,
                    basic_routing<V> const& chosen,
                    std::type_identity_t<vector_view<V const>> dweight, memory scratch,
                    matrix_view<D> dlogits, call_site site = call_site::here()) {
  std::int64_t const T = logits.rows();
  int const E = static_cast<int>(logits.cols());
  detail::check_expert_choice("route_backward: logits are [T,E], E >= 1, ld >= E", g, logits, site);
  expects(chosen.T == T && chosen.E == E && chosen.token_begin != nullptr,
          "route_backward: the routing is one that route made of these logits", site,
          {{"routing's T", chosen.T}, {"T", T}, {"routing's E", chosen.E}, {"E", E}});
  expects(dweight.size() == chosen.pairs(), "route_backward: dweight has one value for each pair",
          site, {{"size", dweight.size()}, {"pairs", chosen.pairs()}});
  expects(T == 0 || !dlogits.absent(), "route_backward: dlogits is given", site);
  detail::expect_shape("route_backward: dlogits is [T,E], ld >= E", dlogits, T, E, site);
  expects(!overlap(dlogits, logits) &&
              !overlap(dlogits, matrix_view(dweight.data(), 1, dweight.size())),
          "route_backward: dlogits overlaps no input", site);
  std::int64_t const room = detail::scored_room<Score, V>(E);
  V* const rooms =
      scratch.take<V>(exec.threads() * room,
                      "route_backward: scratch has route_scratch<V>(exec, g, T, E) bytes", site);
  exec.split(T, detail::route_grain, [&](std::int64_t first, std::int64_t last, int member) {
    V* const own = rooms + member * room;
    for (std::int64_t t = first; t < last; ++t) {
      D* const dl = dlogits.row(t);  // [E]
      std::int64_t const i0 = chosen.first_pair(t), i1 = chosen.first_pair(t + 1);
      if (i0 == i1 || chosen.expert[i0] < 0 || !detail::load_logits(logits.row(t), E, own)) {
        for (int e = 0; e < E; ++e) dl[e] = static_cast<D>(V(0));
        continue;
      }
      row_room<V> copies{own + 2 * E, row_copies<Score>};
      array_row<V> row(own, E, &copies), grad(own + E, E, &copies);
      g.score(row, chosen.tokens.at(t));
      std::fill_n(grad.data(), E, V(0));
      for (std::int64_t i = i0; i < i1; ++i) grad.add(chosen.expert[i], dweight[i]);
      copies = {own + 2 * E, row_copies<Score>};
      g.score.backward(row, grad, chosen.tokens.at(t));
      for (int e = 0; e < E; ++e) dl[e] = static_cast<D>(grad.at(e));
    }
  });
}

}  // namespace moe::inline MOE_ABI
