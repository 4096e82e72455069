// Combine: each token's output is the weighted sum of the rows that its choices were given.
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
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// All forms of combine; what a form does not take is null.
template <class S>
void combine(cpu const& exec, matrix_view<S const> rows, routing_table const& table,
             vector_view<accumulate_t<S> const> const* weight, matrix_view<S const> const* tokens,
             matrix_view<S> out, update mode, call_site site) {
  movement_checks expected(exec, "combine", table, out.cols(), site);
  expected.rows(rows, "rows");
  if (weight != nullptr) expected.pairs(*weight, "weight");
  if (tokens != nullptr) expected.tokens(*tokens, "tokens");
  expected.tokens(out, "out");
  if (tokens == nullptr) expected.all_computed();
  sum_rows<S>(exec,
              {rows, table, weight != nullptr ? weight->data() : nullptr,
               tokens != nullptr ? *tokens : matrix_view<S const>{}, out, mode == update::add});
}

}  // namespace detail

/// out[t] = the sum of weight[i] * rows[row of i] over the pairs i of token t that have a row, plus
/// weight[i] * tokens[t] for each pair at a copy expert.
///
/// Zero experts add nothing. Nor do constant and shared ones here: what they add is not a row of the
/// table; expert/ adds it to `out`.
///
/// @param rows    [>= N, M] in, N = table.counts->rows; padding rows are not read.
/// @param weight  One value for each pair: [T,K], or as token_begin says. Not rounded to S.
/// @param tokens  [T,M] in: what was dispatched.
/// @param out     [T,M] out; a token without any addend gets zeros. Each row is written once.
/// @param mode    update::add adds the sum to what out holds.
/// @pre   out overlaps no other argument.
/// @throws precondition_error if a shape or @pre is wrong.
/// @note  Allocates nothing. Sums in accumulate_t<S> in the order of the pairs and rounds once;
///        bitwise the same for any number of threads.
/// @cost  Reads N * M, writes T * M elements.
/// Example: pairs of one token at rows a and b with weights 0.75 and 0.25 give 0.75 a + 0.25 b.
template <scalar S>
void combine(cpu const& exec, matrix_view<std::type_identity_t<S> const> rows,
             routing_table const& table, vector_view<accumulate_t<S> const> weight,
             matrix_view<std::type_identity_t<S> const> tokens, matrix_view<S> out,
             update mode = update::assign, call_site site = call_site::here()) {
  detail::combine<S>(exec, rows, table, &weight, &tokens, out, mode, site);
}

/// The same for a table whose pairs are all at computed experts.
///
/// @throws precondition_error, too, if table.counts->uncomputed > 0: a copy expert might be among
///         them, and only the function above has the tokens.
template <scalar S>
void combine(cpu const& exec, matrix_view<std::type_identity_t<S> const> rows,
             routing_table const& table, vector_view<accumulate_t<S> const> weight,
             matrix_view<S> out, update mode = update::assign, call_site site = call_site::here()) {
  detail::combine<S>(exec, rows, table, &weight, nullptr, out, mode, site);
}

/// The same without weights, for rows that were weighted when they were dispatched. Its gradient
/// is `dispatch(exec, dout, table, drows)`.
template <scalar S>
void combine(cpu const& exec, matrix_view<std::type_identity_t<S> const> rows,
             routing_table const& table, matrix_view<S> out, update mode = update::assign,
             call_site site = call_site::here()) {
  detail::combine<S>(exec, rows, table, nullptr, nullptr, out, mode, site);
}

namespace detail {

/// Both forms of combine_backward; tokens and dtokens are null for the one without.
template <class S>
void combine_backward(cpu const& exec, matrix_view<S const> dout, matrix_view<S const> rows,
                      routing_table const& table, vector_view<accumulate_t<S> const> weight,
                      matrix_view<S const> const* tokens, matrix_view<S> drows,
                      vector_view<accumulate_t<S>> dweight, matrix_view<S> const* dtokens,
                      call_site site) {
  using A = accumulate_t<S>;
  std::int64_t const M = dout.cols();
  movement_checks expected(exec, "combine_backward", table, M, site);
  expected.tokens(dout, "dout");
  int const rows_argument = expected.rows(rows, "rows");
  expected.pairs(weight, "weight");
  if (tokens != nullptr) expected.tokens(*tokens, "tokens");
  expected.rows(drows, "drows", rows_argument);
  expected.pairs(dweight, "dweight");
  if (dtokens != nullptr) expected.tokens(*dtokens, "dtokens");
  if (tokens == nullptr) expected.all_computed();

  bool const past_cache = is_past_cache(drows, table.counts->rows);
  auto const range = [&](std::int64_t first, std::int64_t last) {
    std::int64_t const end = table.first_pair(last);
    for (std::int64_t t = first; t < last; ++t) {
      A copied = 0;
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
        std::int32_t const r = table.row_of[i];
        A const w = weight[i];
        if (r >= 0) {
          std::int64_t const next = i + 1 < end ? table.row_of[i + 1] : -1;
          dweight[i] = dot_and_scale(drows.row(r), rows.row(r), dout.row(t), w, M,
                                     row_or_null(rows, next), past_cache);
        } else if (r == no_row(expert_kind::copy) && tokens != nullptr) {
          dweight[i] = dot<S>(tokens->row(t), dout.row(t), M, nullptr);
          copied += w;
        } else {
          dweight[i] = 0;
        }
      }
      if (dtokens != nullptr) scale_row(dtokens->row(t), dout.row(t), copied, M, false);
    }
  };
  for_ranges(exec, table.T, row_bytes(dout) * (1 + 2 * table.K), past_cache, range);
  clear_padding(exec, table, drows);
}

}  // namespace detail

/// The gradient of combine: drows[r] = weight[i] * dout[t] for pair i = pair_of[r] of token t, and
/// dweight[i] = dot(rows[r], dout[t]). For a pair at a copy expert dweight[i] = dot(tokens[t],
/// dout[t]), and dtokens[t] is the sum of their weights times dout[t].
///
/// @param dout     [T,M] in.
/// @param rows     [>= N, M] in: what was combined.
/// @param drows    [>= N, M] out; padding rows are zeroed, rows at and after N not touched. It may be
///                 `rows` itself.
/// @param dweight  Out: one value for each pair, 0 for pairs that added nothing.
/// @param dtokens  [T,M] out: only what came by copy experts; `dispatch_backward` with update::add
///                 adds the rest.
/// @pre   Otherwise no output overlaps another argument.
/// @throws precondition_error if a shape or @pre is wrong.
/// @note  Allocates nothing. Dot products in accumulate_t<S>, in an order that M and the width of
///        vector registers fix.
/// @cost  Reads N * M + T * M, writes N * M (and T * M) elements.
template <scalar S>
void combine_backward(cpu const& exec, matrix_view<std::type_identity_t<S> const> dout,
                      matrix_view<std::type_identity_t<S> const> rows, routing_table const& table,
                      vector_view<accumulate_t<S> const> weight,
                      matrix_view<std::type_identity_t<S> const> tokens, matrix_view<S> drows,
                      vector_view<accumulate_t<S>> dweight, matrix_view<S> dtokens,
                      call_site site = call_site::here()) {
  detail::combine_backward<S>(exec, dout, rows, table, weight, &tokens, drows, dweight, &dtokens,
                              site);
}

/// The same for a table whose pairs are all at computed experts.
///
/// @throws precondition_error, too, if table.counts->uncomputed > 0.
template <scalar S>
void combine_backward(cpu const& exec, matrix_view<std::type_identity_t<S> const> dout,
                      matrix_view<std::type_identity_t<S> const> rows, routing_table const& table,
                      vector_view<accumulate_t<S> const> weight, matrix_view<S> drows,
                      vector_view<accumulate_t<S>> dweight, call_site site = call_site::here()) {
  detail::combine_backward<S>(exec, dout, rows, table, weight, nullptr, drows, dweight, nullptr,
                              site);
}

}  // namespace moe::inline MOE_ABI
