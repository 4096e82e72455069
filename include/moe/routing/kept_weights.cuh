// Weights after the table is built, on a GPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/routing/kept_weights.hpp>
#include <moe/routing/kept_weights_kernel.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// As for `cpu`, bitwise. Of a table that refused its token_begin, tokens whose pairs are nowhere are
/// left out.
/// @throws precondition_error if T > 0 and an array is null.
/// @note   One kernel.
template <kernel_executor X, std::floating_point V>
void weigh_kept(X const& exec, kept_weights rule, routing_table const& table, V const* weight,
                V* out, call_site site = call_site::here()) {
  detail::check_weigh_kept(table.T * table.K, table, weight, out, site);
  constexpr int threads = threads_of<X>(256);
  exec.launch("weigh_kept", weigh_kept_kernel<V, threads>{}, (table.T + threads - 1) / threads,
              site, rule, table, weight, out);
}

/// As for `cpu`, but for the rounding of sums of products: a GPU fuses them.
/// @throws precondition_error if T > 0 and an array is null.
/// @note   One kernel.
template <kernel_executor X, std::floating_point V>
void weigh_kept_backward(X const& exec, kept_weights rule, routing_table const& table,
                         V const* weight, V const* dout, V* dweight,
                         call_site site = call_site::here()) {
  detail::check_weigh_kept_backward(table.T * table.K, table, weight, dout, dweight, site);
  constexpr int threads = threads_of<X>(256);
  exec.launch("weigh_kept_backward", weigh_kept_backward_kernel<V, threads>{},
              (table.T + threads - 1) / threads, site, rule, table, weight, dout, dweight);
}

}  // namespace moe::inline MOE_ABI
