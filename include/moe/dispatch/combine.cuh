// Combine on a GPU: the functions of combine.hpp for what launches kernels.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/combine_kernel.hpp>
#include <moe/dispatch/detail/checks.hpp>
#include <moe/dispatch/detail/launch_sums.hpp>
#include <moe/dispatch/detail/padding.hpp>
#include <moe/dispatch/detail/slices.hpp>
#include <moe/dispatch/detail/token_pairs.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// All forms of combine; what a form does not take is null.
template <kernel_executor X, class S>
void combine(X const& exec, matrix_view<S const> rows, routing_table const& table,
             vector_view<accumulate_t<S> const> const* weight, matrix_view<S const> const* tokens,
             matrix_view<S> out, update mode, call_site site) {
  movement_checks expected(exec, "combine", table, out.cols(), site);
  expected.rows(rows, "rows");
  if (weight != nullptr) expected.pairs(*weight, "weight");
  if (tokens != nullptr) expected.tokens(*tokens, "tokens");
  expected.tokens(out, "out");
  if (tokens == nullptr) expected.all_computed();
  token_pairs const pairs(table, weight != nullptr ? weight->size() : table.T * table.K);
  launch_sums<S>(exec, "combine", rows, pairs, weight != nullptr ? weight->data() : nullptr,
                 tokens != nullptr ? *tokens : matrix_view<S const>{}, out, mode, site);
}

}  // namespace detail

/// `combine` on a GPU: as there, but
/// @param rows    [>= max_rows, M] in, table.max_rows rows or more: N is known on the device only.
/// @param weight  One value for each pair: T * K of them, or with token_begin 1 to T * K; pairs beyond
///                its end are taken for none.
/// @throws precondition_error if a shape or @pre is wrong; what `exec` throws at launch.
/// @note  One kernel. Adds in the order of the pairs, as the CPU does, but multiplies and adds in one
///        rounding. Rows that all start at multiples of 16 bytes, and are as long, move in vectors;
///        others element by element, some times slower.
/// Never run on a GPU yet.
template <kernel_executor X, scalar S>
void combine(X const& exec, matrix_view<std::type_identity_t<S> const> rows,
             routing_table const& table, vector_view<accumulate_t<S> const> weight,
             matrix_view<std::type_identity_t<S> const> tokens, matrix_view<S> out,
             update mode = update::assign, call_site site = call_site::here()) {
  detail::combine<X, S>(exec, rows, table, &weight, &tokens, out, mode, site);
}

/// The same for a table whose pairs are all at computed experts.
/// @throws precondition_error, too, unless table.computed_only.
template <kernel_executor X, scalar S>
void combine(X const& exec, matrix_view<std::type_identity_t<S> const> rows,
             routing_table const& table, vector_view<accumulate_t<S> const> weight,
             matrix_view<S> out, update mode = update::assign, call_site site = call_site::here()) {
  detail::combine<X, S>(exec, rows, table, &weight, nullptr, out, mode, site);
}

/// The same without weights, for rows that were weighted when they were dispatched.
template <kernel_executor X, scalar S>
void combine(X const& exec, matrix_view<std::type_identity_t<S> const> rows,
             routing_table const& table, matrix_view<S> out, update mode = update::assign,
             call_site site = call_site::here()) {
  detail::combine<X, S>(exec, rows, table, nullptr, nullptr, out, mode, site);
}

namespace detail {

/// Both forms of combine_backward; tokens and dtokens are null for the one without.
template <kernel_executor X, class S>
void combine_backward(X const& exec, matrix_view<S const> dout, matrix_view<S const> rows,
                      routing_table const& table, vector_view<accumulate_t<S> const> weight,
                      matrix_view<S const> const* tokens, matrix_view<S> drows,
                      vector_view<accumulate_t<S>> dweight, matrix_view<S> const* dtokens,
                      call_site site) {
  movement_checks expected(exec, "combine_backward", table, dout.cols(), site);
  expected.tokens(dout, "dout");
  int const rows_argument = expected.rows(rows, "rows");
  expected.pairs(weight, "weight");
  if (tokens != nullptr) expected.tokens(*tokens, "tokens");
  expected.rows(drows, "drows", rows_argument);
  expected.pairs(dweight, "dweight");
  if (dtokens != nullptr) expected.tokens(*dtokens, "dtokens");
  if (tokens == nullptr) expected.all_computed();

  token_pairs const pairs(table, weight.size() < dweight.size() ? weight.size() : dweight.size());
  matrix_view<S const> const copied = tokens != nullptr ? *tokens : matrix_view<S const>{};
  matrix_view<S> const dcopied = dtokens != nullptr ? *dtokens : matrix_view<S>{};
  std::int64_t const most = table.T * table.K;
  bool const streaming = is_past_l2(most < table.max_rows ? most : table.max_rows, drows);
  with_vector<S>(in_vectors(dout, rows, copied, drows, dcopied), [&](auto vector) {
    using kernel = combine_backward_kernel<S, vector(), threads_of<X>(256)>;
    padding const empty(table, drows, vector(), kernel::threads, exec.processors());
    exec.launch("combine_backward", kernel{}, empty.blocks + table.T, site, dout, rows, pairs,
                weight.data(), copied, empty, streaming, drows, dweight.data(), dcopied);
  });
}

}  // namespace detail

/// The gradient of combine on a GPU: `combine_backward`, but
/// @param rows, drows      [>= max_rows, M], table.max_rows rows or more; drows may be `rows` itself.
/// @param weight, dweight  As `weight` of combine; values of dweight beyond the last pair are not
///                         touched.
/// @note  One kernel. The order of the dot products depends on M, the block (256 threads) and whether
///        the rows move in vectors: `detail::pair_dots`.
template <kernel_executor X, scalar S>
void combine_backward(X const& exec, matrix_view<std::type_identity_t<S> const> dout,
                      matrix_view<std::type_identity_t<S> const> rows, routing_table const& table,
                      vector_view<accumulate_t<S> const> weight,
                      matrix_view<std::type_identity_t<S> const> tokens, matrix_view<S> drows,
                      vector_view<accumulate_t<S>> dweight, matrix_view<S> dtokens,
                      call_site site = call_site::here()) {
  detail::combine_backward<X, S>(exec, dout, rows, table, weight, &tokens, drows, dweight, &dtokens,
                                 site);
}

/// The same for a table whose pairs are all at computed experts.
/// @throws precondition_error, too, unless table.computed_only.
template <kernel_executor X, scalar S>
void combine_backward(X const& exec, matrix_view<std::type_identity_t<S> const> dout,
                      matrix_view<std::type_identity_t<S> const> rows, routing_table const& table,
                      vector_view<accumulate_t<S> const> weight, matrix_view<S> drows,
                      vector_view<accumulate_t<S>> dweight, call_site site = call_site::here()) {
  detail::combine_backward<X, S>(exec, dout, rows, table, weight, nullptr, drows, dweight, nullptr,
                                 site);
}

}  // namespace moe::inline MOE_ABI
