// Route: run a gate over the logits of all tokens, and its gradient back to them.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/route_checks.hpp>
#include <moe/gate/score_gradient.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

inline constexpr std::int64_t route_grain = 32;  // tokens: some microseconds of work; a guess

/// Row copies that a gate makes; 2 is what the concept allows a gate that declares none.
template <class Gate>
inline constexpr int gate_copies = [] {
  if constexpr (requires { Gate::copies; })
    return static_cast<int>(Gate::copies);
  else
    return 2;
}();

/// Elements that one member works in: a token's row, its gradient, and the copies of the gate.
template <class Gate, class V>
constexpr std::int64_t route_room(std::int64_t E) noexcept {
  constexpr std::int64_t line = memory::alignment / sizeof(V);
  return ((2 + gate_copies<Gate>)*E + line - 1) / line * line;
}

/// Copies a token's logits into `row`, converted. False if one of them is NaN or +inf.
template <class L, class V>
bool load_logits(L const* logits, int E, V* row) noexcept {
  int invalid = 0;
  for (int e = 0; e < E; ++e) {
    V const l = static_cast<V>(logits[e]);
    row[e] = l;
    invalid |= static_cast<int>(is_invalid_logit(l));
  }
  return invalid == 0;
}

}  // namespace detail

/// Bytes of scratch for `route` and `route_backward` of one gate, any T.
/// @param V  The routing's value type.
template <class Gate, std::floating_point V = float>
std::size_t route_scratch(cpu const& exec, std::int64_t E) {
  return memory_size{}.add<V>(exec.threads() * detail::route_room<Gate, V>(E)).bytes();
}

/// Runs a gate on every token.
///
/// A masked token (tokens.live = 0) gets expert = no_candidate and weight 0 for all its choices; a
/// token whose logits hold NaN or +inf gets expert = invalid_token and weight 0, and the gate is not
/// evaluated for it. build_table counts both.
///
/// @param logits   [T,E] in, of V or of anything that converts to it; -inf marks an expert that is
///                 not a candidate.
/// @param tokens   Ids, seed, mask of the T tokens; copied to out.tokens, its arrays are not.
/// @param scratch  At least route_scratch<Gate, V>(exec, E) bytes.
/// @param out      Arrays for T tokens, K = g.k() choices and E experts, and those three extents
///                 set. Out: expert, weight, score (before weighing; not if null), tokens.
/// @param scores   [T,E] out, or absent: the scores of every valid token, masked ones included
///                 (losses read them), -inf where there is no candidate; invalid tokens: all -inf.
/// @pre   1 <= g.k() <= E; leading dimensions >= E; no output overlaps logits or another output.
/// @throws precondition_error if @pre fails or scratch is too small.
/// @note  Tokens are independent: results do not depend on threads, and on the batch split only
///        through token ids. Allocates nothing.
/// @cost  O(T E K) at worst; reads T E logits once.
template <class Gate, class L, std::floating_point V>
  requires token_gate<Gate, array_row<V>>
void route(cpu const& exec, Gate const& g, matrix_view<L> logits, batch const& tokens,
           memory scratch, basic_routing<V>& out, std::type_identity_t<matrix_view<V>> scores = {},
           call_site site = call_site::here()) {
  std::int64_t const T = logits.rows();
  int const E = static_cast<int>(logits.cols());
  int const K = g.k();
  detail::check_route(Gate::max_k, K, logits, out, scores, site);
  std::int64_t const room = detail::route_room<Gate, V>(E);
  V* const rooms = scratch.take<V>(
      exec.threads() * room, "route: scratch has route_scratch<Gate, V>(exec, E) bytes", site);
  out.token_begin = nullptr;
  out.tokens = tokens;
  out.chunk_counts = {};

  exec.split(T, detail::route_grain, [&](std::int64_t first, std::int64_t last, int member) {
    V* const own = rooms + member * room;
    for (std::int64_t t = first; t < last; ++t) {
      bool const live = tokens.is_live(t);
      choices<Gate::max_k, V> chosen;
      row_room<V> copies{own + E, detail::gate_copies<Gate>};
      array_row<V> row(scores.absent() ? own : scores.row(t), E, &copies);
      bool const valid = detail::load_logits(logits.row(t), E, row.data());
      if (!valid)
        std::fill_n(row.data(), E, no_score<V>);
      else if (live || !scores.absent())
        g(row, chosen, tokens.at(t));

      int const nowhere = live ? invalid_token : no_candidate;
      for (int j = 0; j < K; ++j) {
        std::int64_t const i = t * K + j;
        int const expert = valid && live ? chosen.expert[j] : nowhere;
        out.expert[i] = expert;
        out.weight[i] = expert < 0 ? V(0) : chosen.weight[j];
        if (out.score != nullptr) out.score[i] = expert < 0 ? V(0) : row.at(expert);
      }
    }
  });
}

/// The gradient of `route`: d/dweights and d/dscores to d/dlogits.
///
/// Scores are made again from the logits, so that nothing of size T E is saved. Noise is drawn again
/// and counts as constant.
///
/// @param logits   [T,E] in, as the forward saw them.
/// @param chosen   The routing that `route` made with this gate: experts and tokens are read, not
///                 the weights. Choices without an expert take no part.
/// @param dweight  [T,K] in, or absent = 0: gradient with respect to chosen.weight; that of masked
///                 tokens is not read.
/// @param dscores  Gradients that reach the scores directly.
/// @param scratch  At least route_scratch<Gate, V>(exec, E) bytes.
/// @param dlogits  [T,E] out: written everywhere, 0 for invalid tokens and for -inf logits.
/// @pre   Shapes as above; leading dimensions at least the columns; dlogits overlaps no input.
/// @throws precondition_error if @pre fails or scratch is too small.
/// @note  Results do not depend on threads. Allocates nothing.
/// @cost  O(T E); reads T E logits and writes as many gradients.
template <class Gate, class L, std::floating_point V, class D>
  requires token_gate<Gate, array_row<V>>
void route_backward(cpu const& exec, Gate const& g, matrix_view<L> logits,
                    basic_routing<V> const& chosen,
                    std::type_identity_t<matrix_view<V const>> dweight,
                    std::type_identity_t<score_gradient<V>> const& dscores, memory scratch,
                    matrix_view<D> dlogits, call_site site = call_site::here()) {
  std::int64_t const T = logits.rows();
  int const E = static_cast<int>(logits.cols());
  int const K = g.k();
  detail::check_route_backward(Gate::max_k, K, logits, chosen, dweight, dscores, dlogits, site);

  std::int64_t const room = detail::route_room<Gate, V>(E);
  V* const rooms =
      scratch.take<V>(exec.threads() * room,
                      "route_backward: scratch has route_scratch<Gate, V>(exec, E) bytes", site);

  exec.split(T, detail::route_grain, [&](std::int64_t first, std::int64_t last, int member) {
    V* const own = rooms + member * room;
    for (std::int64_t t = first; t < last; ++t) {
      token const id = chosen.tokens.at(t);
      bool const live = chosen.tokens.is_live(t);
      D* const dl = dlogits.row(t);  // [E]
      std::int32_t const* const expert = chosen.expert + t * K;
      if (expert[0] == invalid_token || !detail::load_logits(logits.row(t), E, own)) {
        for (int e = 0; e < E; ++e) dl[e] = static_cast<D>(V(0));
        continue;
      }

      row_room<V> copies{own + 2 * E, detail::gate_copies<Gate>};
      array_row<V> row(own, E, &copies);
      choices<Gate::max_k, V> made;
      made.k = K;
      for (int j = 0; j < K; ++j) made.expert[j] = expert[j] < E ? expert[j] : -1;
      if constexpr (requires { g.rescore(row, made, id); })
        g.rescore(row, made, id);
      else
        g(row, made, id);
      choices<Gate::max_k, V> dmade;
      dmade.k = K;
      if (live && !dweight.absent())
        for (int j = 0; j < K; ++j) dmade.weight[j] = dweight(t, j);

      copies = {own + 2 * E, detail::gate_copies<Gate>};
      array_row<V> grad(own + E, E, &copies);
      V const* const dexpert = live || dscores.reaches_masked ? dscores.expert.data() : nullptr;
      V const* const dtoken = dscores.token.absent() ? nullptr : dscores.token.row(t);
      for (int e = 0; e < E; ++e) grad.data()[e] = dexpert == nullptr ? V(0) : dexpert[e];
      if (dtoken != nullptr)
        for (int e = 0; e < E; ++e) grad.data()[e] += dtoken[e];
      g.backward(row, made, dmade, grad, id);
      for (int e = 0; e < E; ++e) dl[e] = static_cast<D>(grad.at(e));
    }
  });
}

}  // namespace moe::inline MOE_ABI
