// The router z-loss on a GPU.
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
#include <moe/loss/z_loss.hpp>
#include <moe/loss/z_loss_kernel.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch for z_loss and z_loss_backward on an executor of kernels.
template <kernel_executor X>
constexpr std::size_t z_loss_scratch(X const&, std::int64_t T) noexcept {
  return detail::block_sums_scratch(T, 2);
}

/// z_loss on a GPU: the same value but for the order of the sums, in
/// double.
/// @param loss  [1] out, on the device.
/// @note  Two kernels, deterministic. Does not wait.
template <kernel_executor X, class T>
void z_loss(X const& exec, matrix_view<T> logits, batch const& tokens, memory scratch, double* loss,
            call_site site = call_site::here()) {
  detail::check_z_loss(logits, site);
  expects(loss != nullptr, "z_loss: loss is given", site);
  detail::block_summation const sums(exec, "z_loss", "z_loss: scratch >= z_loss_scratch(exec, T)",
                                     logits.rows(), 2, scratch, site);
  sums.add(z_sums_kernel<detail::loss_threads<X>>{}, logits, tokens);
  sums.finish(detail::finish_z_loss{loss});
}

/// z_loss_backward on a GPU.
/// @note  Two kernels, deterministic. Does not wait.
template <kernel_executor X, class T, class V = std::remove_const_t<T>>
void z_loss_backward(X const& exec, matrix_view<T> logits, batch const& tokens, double dloss,
                     memory scratch, std::type_identity_t<matrix_view<V>> dlogits,
                     call_site site = call_site::here()) {
  detail::check_z_loss_backward(logits, dlogits, site);
  detail::block_summation const sums(exec, "z_loss_backward",
                                     "z_loss_backward: scratch >= z_loss_scratch(exec, T)",
                                     logits.rows(), 2, scratch, site);
  sums.add(z_sums_kernel<detail::loss_threads<X>>{}, logits, tokens);
  exec.launch("z_loss_backward", z_backward_kernel<detail::loss_threads<X>>{},
              detail::block_sums(logits.rows()), site, logits, tokens, dloss, dlogits,
              detail::block_sums(logits.rows()), static_cast<double const*>(sums.sums));
}

}  // namespace moe::inline MOE_ABI
