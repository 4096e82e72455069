// Dispatch on a GPU: the functions of dispatch.hpp for what launches kernels.
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
#include <moe/dispatch/combine_kernel.hpp>
#include <moe/dispatch/detail/checks.hpp>
#include <moe/dispatch/detail/launch_sums.hpp>
#include <moe/dispatch/detail/padding.hpp>
#include <moe/dispatch/detail/slices.hpp>
#include <moe/dispatch/detail/token_pairs.hpp>
#include <moe/dispatch/dispatch.hpp>
#include <moe/dispatch/dispatch_kernel.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Both forms of dispatch; `weight` is null for the one without.
template <kernel_executor X, class S>
void dispatch(X const& exec, matrix_view<S const> tokens, routing_table const& table,
              vector_view<accumulate_t<S> const> const* weight, matrix_view<S> rows,
              call_site site) {
  movement_checks expected(exec, "dispatch", table, rows.cols(), site);
  expected.tokens(tokens, "tokens");
  if (weight != nullptr) expected.pairs(*weight, "weight");
  expected.rows(rows, "rows");

  token_pairs const pairs(table, weight != nullptr ? weight->size() : table.T * table.K);
  accumulate_t<S> const* const weights = weight != nullptr ? weight->data() : nullptr;
  std::int64_t const most = table.T * table.K;
  bool const streaming = is_past_l2(most < table.max_rows ? most : table.max_rows, rows);
  auto const launch = [&](auto vector, auto weighted) {
    using kernel = dispatch_kernel<S, vector(), weighted(), threads_of<X>(128)>;
    constexpr int warps = kernel::threads / warp_size;
    padding const empty(table, rows, vector(), kernel::threads, exec.processors());
    slices const cut = slice(table.T, rows.cols(), warp_size * vector(), warps_of(exec));
    exec.launch("dispatch", kernel{}, empty.blocks + blocks_for(table.T * cut.of_row, warps), site,
                tokens, pairs, weights, empty, cut, streaming, rows);
  };
  with_vector<S>(in_vectors(tokens, rows), [&](auto vector) {
    weight != nullptr ? launch(vector, std::true_type{}) : launch(vector, std::false_type{});
  });
}

}  // namespace detail

/// `dispatch` on a GPU: as there, but
/// @param rows  [>= max_rows, M] out, table.max_rows rows or more: N is known on the device only. Padding
///              rows below N are zeroed; rows at and after N are not touched.
/// @throws precondition_error if a shape or @pre is wrong; what `exec` throws at launch.
/// @note  One kernel. Rows that all start at multiples of 16 bytes, and are as long, move in vectors;
///        others element by element, some times slower.
/// Never run on a GPU yet.
template <kernel_executor X, scalar S>
void dispatch(X const& exec, matrix_view<std::type_identity_t<S> const> tokens,
              routing_table const& table, matrix_view<S> rows, call_site site = call_site::here()) {
  detail::dispatch<X, S>(exec, tokens, table, nullptr, rows, site);
}

/// The same with the weights applied before the expert.
/// @param weight  One value for each pair: T * K of them, or with token_begin 1 to T * K; pairs beyond
///                its end are taken for none.
template <kernel_executor X, scalar S>
void dispatch(X const& exec, matrix_view<std::type_identity_t<S> const> tokens,
              routing_table const& table, vector_view<accumulate_t<S> const> weight,
              matrix_view<S> rows, call_site site = call_site::here()) {
  detail::dispatch<X, S>(exec, tokens, table, &weight, rows, site);
}

/// The gradient of dispatch on a GPU: `dispatch_backward`, with table.max_rows rows or more in drows.
/// @note  One kernel, that of `combine`: bitwise equal to the CPU but for products that it contracts.
template <kernel_executor X, scalar S>
void dispatch_backward(X const& exec, matrix_view<std::type_identity_t<S> const> drows,
                       routing_table const& table, matrix_view<S> dtokens,
                       update mode = update::assign, call_site site = call_site::here()) {
  detail::movement_checks expected(exec, "dispatch_backward", table, dtokens.cols(), site);
  expected.rows(drows, "drows");
  expected.tokens(dtokens, "dtokens");
  detail::token_pairs const pairs(table, table.T * table.K);
  detail::launch_sums<S>(exec, "dispatch_backward", drows, pairs, nullptr, {}, dtokens, mode, site);
}

/// The gradient of dispatch with weights on a GPU.
/// @param weight, dweight  As `weight` of dispatch; values of dweight beyond the last pair are not
///                         touched.
/// @note  One kernel. The order of the dot products depends on M, the block (256 threads) and whether
///        the rows move in vectors: `detail::pair_dots`.
template <kernel_executor X, scalar S>
void dispatch_backward(X const& exec, matrix_view<std::type_identity_t<S> const> drows,
                       matrix_view<std::type_identity_t<S> const> tokens,
                       routing_table const& table, vector_view<accumulate_t<S> const> weight,
                       matrix_view<S> dtokens, vector_view<accumulate_t<S>> dweight,
                       update mode = update::assign, call_site site = call_site::here()) {
  detail::movement_checks expected(exec, "dispatch_backward", table, dtokens.cols(), site);
  expected.rows(drows, "drows");
  expected.tokens(tokens, "tokens");
  expected.pairs(weight, "weight");
  expected.tokens(dtokens, "dtokens");
  expected.pairs(dweight, "dweight");

  detail::token_pairs const pairs(table,
                                  weight.size() < dweight.size() ? weight.size() : dweight.size());
  bool const streaming = detail::is_past_l2(table.T, dtokens);
  detail::with_vector<S>(detail::in_vectors(drows, tokens, dtokens), [&](auto vector) {
    using kernel = dispatch_backward_kernel<S, vector(), threads_of<X>(256)>;
    exec.launch("dispatch_backward", kernel{}, table.T, site, drows, tokens, pairs, weight.data(),
                mode == update::add, streaming, dtokens, dweight.data());
  });
}

}  // namespace moe::inline MOE_ABI
