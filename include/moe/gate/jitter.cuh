// Jitter on a GPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/jitter.hpp>
#include <moe/gate/jitter_kernel.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

template <kernel_executor X, class V, class D>
void jitter(X const& exec, char const* function, jitter_rules const& rules, matrix_view<V> from,
            float eps, batch const& tokens, matrix_view<D> to, call_site site) {
  check_jitter(rules, from, eps, to, site);
  constexpr int threads = threads_of<X>(256);
  std::int64_t const groups = from.rows() * ((from.cols() + 3) / 4);
  std::int64_t const blocks =
      std::min<std::int64_t>(blocks_for(groups, threads), std::int64_t{16} * exec.processors());
  exec.launch(function, jitter_kernel<threads>{}, blocks, site, from, tokens.training ? eps : 0.0f,
              tokens, to);
}

}  // namespace detail

/// jitter on a GPU: the same draws. Does not wait.
template <kernel_executor X, class V, class D>
void jitter(X const& exec, matrix_view<V> tokens, float eps, batch const& ids, matrix_view<D> out,
            call_site site = call_site::here()) {
  detail::jitter(exec, "jitter", detail::jitter_forward, tokens, eps, ids, out, site);
}

/// jitter_backward on a GPU. Does not wait.
template <kernel_executor X, class V, class D>
void jitter_backward(X const& exec, matrix_view<V> dout, float eps, batch const& ids,
                     matrix_view<D> dtokens, call_site site = call_site::here()) {
  detail::jitter(exec, "jitter_backward", detail::jitter_gradient, dout, eps, ids, dtokens, site);
}

}  // namespace moe::inline MOE_ABI
