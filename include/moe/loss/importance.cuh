// The importance-and-load loss on a GPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_kernels.hpp>
#include <moe/loss/importance.hpp>
#include <moe/loss/importance_kernel.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch for importance_and_load and its backward on an executor of kernels.
template <kernel_executor X>
constexpr std::size_t importance_and_load_scratch(X const&, std::int64_t T, int E) noexcept {
  return detail::block_sums_scratch(T, 2 * std::int64_t{E});
}

/// importance_and_load on a GPU: the same value but for the order of the sums, in double.
/// @param loss  [1] out, on the device.
/// @note  Two kernels, deterministic. Does not wait.
template <kernel_executor X, class T, class V = std::remove_const_t<T>>
void importance_and_load(X const& exec, matrix_view<T> scores,
                         std::type_identity_t<vector_view<V const>> threshold, double gate_noise,
                         batch const& tokens, memory scratch, double* loss,
                         call_site site = call_site::here()) {
  detail::check_importance<V>(scores, threshold, gate_noise, site);
  expects(loss != nullptr, "importance_and_load: loss is given", site);
  int const E = static_cast<int>(scores.cols());
  detail::block_summation const sums(
      exec, "importance_and_load",
      "importance_and_load: scratch >= importance_and_load_scratch(exec, T, E)", scores.rows(),
      2 * std::int64_t{E}, scratch, site);
  sums.add(importance_sums_kernel<detail::loss_threads<X>>{}, matrix_view<V const>(scores),
           threshold, gate_noise / E, tokens);
  sums.finish(detail::finish_importance{E, loss});
}

/// importance_and_load_backward on a GPU.
/// @note  Three kernels, deterministic. Does not wait.
template <kernel_executor X, class T, class V = std::remove_const_t<T>>
void importance_and_load_backward(X const& exec, matrix_view<T> scores,
                                  std::type_identity_t<vector_view<V const>> threshold,
                                  double gate_noise, batch const& tokens, double dloss,
                                  memory scratch, std::type_identity_t<matrix_view<V>> dscores,
                                  std::type_identity_t<vector_view<V>> dthreshold,
                                  call_site site = call_site::here()) {
  detail::check_importance_backward<V>(scores, threshold, gate_noise, dscores, dthreshold, site);
  int const E = static_cast<int>(scores.cols());
  char const* const name = "importance_and_load_backward";
  matrix_view<V const> const in(scores);
  constexpr int threads = detail::loss_threads<X>;
  detail::block_summation const sums(
      exec, name,
      "importance_and_load_backward: scratch >= importance_and_load_scratch(exec, T, E)",
      scores.rows(), 2 * std::int64_t{E}, scratch, site);
  sums.add(importance_sums_kernel<threads>{}, in, threshold, gate_noise / E, tokens);
  sums.finish(detail::finish_importance_backward{E, dloss});
  exec.launch(name, importance_backward_kernel<threads>{}, detail::block_sums(scores.rows()), site,
              in, threshold, gate_noise / E, tokens, dscores, dthreshold,
              static_cast<double const*>(sums.sums));
}

}  // namespace moe::inline MOE_ABI
