// What a router does to its experts, measured on a GPU: results stay in its memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/statistics.hpp>
#include <moe/routing/statistics_kernel.hpp>

namespace moe::inline MOE_ABI {

/// As for `cpu`.
/// @note  One kernel.
template <kernel_executor X>
void physical_loads(X const& exec, routing_table const& table, vector_view<std::int32_t> loads,
                    call_site site = call_site::here()) {
  detail::check_physical_loads(table, loads, site);
  constexpr int threads = threads_of<X>(128);
  exec.launch("physical_loads", physical_loads_kernel<threads>{},
              detail::blocks_for(table.P, threads), site, table, loads.data());
}

/// As for `cpu`, but for the order of the sums in double.
/// @param out  [1] out, on the device.
/// @note  One kernel, of one block. Deterministic.
template <kernel_executor X>
void measure_load(X const& exec, vector_view<std::int32_t const> loads, load_statistics* out,
                  call_site site = call_site::here()) {
  exec.launch("measure_load", measure_load_kernel<threads_of<X>(256)>{}, 1, site, loads.data(),
              loads.size(), out);
}

/// Bytes of scratch that measure_scores needs for T tokens.
template <kernel_executor X>
std::size_t measure_scores_scratch(X const&, std::int64_t T) noexcept {
  using kernel = measure_scores_kernel<float, threads_of<X>(256)>;
  return memory_size().add<detail::score_sums>(detail::blocks_for(T, kernel::tokens)).bytes();
}

/// As for `cpu`, but for the order of the sums in double.
/// @param out  [1] out, on the device.
/// @note  Two kernels. Deterministic.
template <kernel_executor X, std::floating_point V>
void measure_scores(X const& exec, basic_routing<V> const& in,
                    std::type_identity_t<matrix_view<V const>> scores, memory scratch,
                    score_statistics* out, call_site site = call_site::here()) {
  detail::check_scores<V>(in, scores, site);
  expects(in.K <= max_choices, "measure_scores: K <= 16", site, {{"K", in.K}});
  constexpr int threads = threads_of<X>(256);
  measure_scores_kernel<V, threads> const kernel{};
  std::int64_t const chunks = detail::blocks_for(in.T, kernel.tokens);
  auto* const part = scratch.take<detail::score_sums>(
      chunks, "measure_scores: scratch of measure_scores_scratch(exec, T) bytes", site);
  exec.launch("measure_scores", kernel, chunks, site, in, scores, part);
  exec.launch("measure_scores", mean_scores_kernel<threads>{}, 1, site,
              static_cast<detail::score_sums const*>(part), chunks, out);
}

/// As for `cpu`.
/// @note  One kernel, which adds by integer atomics.
template <kernel_executor X, class V>
void count_co_activation(X const& exec, basic_routing<V> const& in,
                         matrix_view<std::int64_t> counts, call_site site = call_site::here()) {
  detail::check_co_activation(in, counts, site);
  expects(in.K >= 1, "count_co_activation: K >= 1", site, {{"K", in.K}});
  constexpr int threads = threads_of<X>(256);
  exec.launch("count_co_activation", count_co_activation_kernel<V, threads>{},
              detail::blocks_for(in.T * in.K, threads), site, in, counts);
}

}  // namespace moe::inline MOE_ABI
