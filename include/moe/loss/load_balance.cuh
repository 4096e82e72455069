// The load-balancing loss on a GPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_kernels.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/load_balance_kernel.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch for load_balance and load_balance_backward on an executor of kernels.
template <kernel_executor X>
constexpr std::size_t load_balance_scratch(X const&, std::int64_t T, int E) noexcept {
  return detail::block_sums_scratch(T, 2 * std::int64_t{E} + 1);
}

/// load_balance on a GPU: the same value but for the order of the sums, in double.
/// @param loss  [1] out, on the device.
/// @note  Two kernels, deterministic. Does not wait.
template <kernel_executor X, class V>
void load_balance(X const& exec, std::type_identity_t<matrix_view<V const>> scores,
                  basic_routing<V> const& routed, load_balance_rule const& rule, memory scratch,
                  double* loss, call_site site = call_site::here()) {
  detail::check_load_balance(scores, routed, routed.T, site);
  expects(loss != nullptr, "load_balance: loss is given", site);
  detail::block_summation const sums(exec, "load_balance",
                                     "load_balance: scratch >= load_balance_scratch(exec, T, E)",
                                     routed.T, 2 * std::int64_t{routed.E} + 1, scratch, site);
  sums.add(load_sums_kernel<detail::loss_threads<X>>{}, scores, routed, rule);
  sums.finish(
      detail::finish_load_balance{routed.E, detail::load_balance_scale(routed, rule), loss});
}

/// load_balance_backward on a GPU.
/// @note  Two kernels, deterministic. Does not wait.
template <kernel_executor X, class V>
void load_balance_backward(X const& exec, basic_routing<V> const& routed,
                           load_balance_rule const& rule, double dloss, memory scratch,
                           std::type_identity_t<vector_view<V>> dscores,
                           call_site site = call_site::here()) {
  detail::check_load_balance_backward(routed, dscores, routed.T, site);
  detail::block_summation const sums(
      exec, "load_balance_backward",
      "load_balance_backward: scratch >= load_balance_scratch(exec, T, E)", routed.T,
      2 * std::int64_t{routed.E} + 1, scratch, site);
  sums.add(load_sums_kernel<detail::loss_threads<X>>{}, matrix_view<V const>{}, routed, rule);
  sums.finish(detail::finish_load_balance_backward<V>{
      routed.E, detail::load_balance_scale(routed, rule) * dloss, dscores.data()});
}

}  // namespace moe::inline MOE_ABI
