// Dispatch: each token's vector goes to the rows that its choices were given.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/checks.hpp>
#include <moe/dispatch/detail/row_movement.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Both forms of dispatch; `weight` is null for the one without.
template <class S>
void dispatch(cpu const& exec, matrix_view<S const> tokens, routing_table const& table,
              vector_view<accumulate_t<S> const> const* weight, matrix_view<S> rows,
              call_site site) {
  movement_checks expected(exec, "dispatch", table, rows.cols(), site);
  expected.tokens(tokens, "tokens");
  if (weight != nullptr) expected.pairs(*weight, "weight");
  expected.rows(rows, "rows");
  spread_tokens<S>(exec, tokens, table, weight != nullptr ? weight->data() : nullptr, rows);
}

}  // namespace detail

/// Copies each token to the rows of its pairs: rows[r] = tokens[t] for pair_of[r] of token t.
///
/// @param tokens  [T,M] in.
/// @param table   Filled by build_table; N = table.counts->rows.
/// @param rows    [>= N, M] out. Padding rows are zeroed; rows at and after N are not touched.
/// @pre   tokens and rows do not overlap.
/// @throws precondition_error if a shape or @pre is wrong.
/// @note  Allocates nothing. The same for any number of threads.
/// @cost  Reads T * M, writes N * M elements.
/// Example: T = 2, K = 1, experts {1, 0}: tokens {a, b} give rows {b, a}.
template <scalar S>
void dispatch(cpu const& exec, matrix_view<std::type_identity_t<S> const> tokens,
              routing_table const& table, matrix_view<S> rows, call_site site = call_site::here()) {
  detail::dispatch<S>(exec, tokens, table, nullptr, rows, site);
}

/// The same with the weights applied before the expert: rows[r] = weight[i] * tokens[t] for pair i =
/// pair_of[r] of token t, rounded once. (Llama 4; Tutel's is_postscore = false.) Its combine is the
/// one without weights.
///
/// @param weight  One value for each pair: [T,K], or as token_begin says.
template <scalar S>
void dispatch(cpu const& exec, matrix_view<std::type_identity_t<S> const> tokens,
              routing_table const& table, vector_view<accumulate_t<S> const> weight,
              matrix_view<S> rows, call_site site = call_site::here()) {
  detail::dispatch<S>(exec, tokens, table, &weight, rows, site);
}

/// The gradient of dispatch: dtokens[t] = the sum of drows[row] over the rows of token t.
///
/// @param drows    [>= N, M] in; padding rows are not read.
/// @param dtokens  [T,M] out; a token without a row gets zeros.
/// @param mode     update::add adds to dtokens, for instance to the gradient that combine_backward
///                 left there for copy experts.
/// @pre   drows and dtokens do not overlap.
/// @throws precondition_error if a shape or @pre is wrong.
/// @note  Allocates nothing. Sums in accumulate_t<S> in the order of the pairs, rounded once.
/// @cost  Reads N * M, writes T * M elements.
template <scalar S>
void dispatch_backward(cpu const& exec, matrix_view<std::type_identity_t<S> const> drows,
                       routing_table const& table, matrix_view<S> dtokens,
                       update mode = update::assign, call_site site = call_site::here()) {
  detail::movement_checks expected(exec, "dispatch_backward", table, dtokens.cols(), site);
  expected.rows(drows, "drows");
  expected.tokens(dtokens, "dtokens");
  detail::sum_rows<S>(exec, {drows, table, nullptr, {}, dtokens, mode == update::add});
}

/// The gradient of dispatch with weights: dtokens[t] = the sum of weight[i] * drows[row of i] over
/// the pairs i of token t that have a row, and dweight[i] = dot(drows[row of i], tokens[t]).
///
/// @param tokens   [T,M] in: what was dispatched.
/// @param weight   One value for each pair.
/// @param dweight  Out: one value for each pair, 0 where it has no row.
/// @pre   No output overlaps another argument.
/// @cost  Reads N * M + T * M, writes T * M elements.
template <scalar S>
void dispatch_backward(cpu const& exec, matrix_view<std::type_identity_t<S> const> drows,
                       matrix_view<std::type_identity_t<S> const> tokens,
                       routing_table const& table, vector_view<accumulate_t<S> const> weight,
                       matrix_view<S> dtokens, vector_view<accumulate_t<S>> dweight,
                       update mode = update::assign, call_site site = call_site::here()) {
  std::int64_t const M = dtokens.cols();
  detail::movement_checks expected(exec, "dispatch_backward", table, M, site);
  expected.rows(drows, "drows");
  expected.tokens(tokens, "tokens");
  expected.pairs(weight, "weight");
  expected.tokens(dtokens, "dtokens");
  expected.pairs(dweight, "dweight");

  detail::row_sum<S> const sum{drows, table, weight.data(), {}, dtokens, mode == update::add};
  std::int64_t const bytes_each = detail::row_bytes(dtokens) * (2 + table.K);
  auto const range = [&](std::int64_t first, std::int64_t last) {
    std::int64_t const end = table.first_pair(last);
    for (std::int64_t t = first; t < last; ++t) {
      sum(t);
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
        std::int64_t const r = table.row_of[i];
        // Meanwhile a row that the sum of the next token reads.
        std::int64_t const next = i + table.K < end ? table.row_of[i + table.K] : -1;
        dweight[i] = r < 0 ? 0
                           : detail::dot<S>(drows.row(r), tokens.row(t), M,
                                            detail::row_or_null<S>(drows, next));
      }
    }
  };
  detail::for_ranges(exec, table.T, bytes_each, sum.past_cache, range);
}

}  // namespace moe::inline MOE_ABI
