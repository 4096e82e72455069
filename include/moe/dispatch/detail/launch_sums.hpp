// The launch behind combine and the gradient of dispatch.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/combine_kernel.hpp>
#include <moe/dispatch/detail/slices.hpp>
#include <moe/dispatch/detail/token_pairs.hpp>
#include <moe/dispatch/update.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// out[t] (=|+=) the sum of what the pairs of token t add; see combine_kernel.
template <class S, kernel_executor X>
void launch_sums(X const& exec, char const* function, matrix_view<S const> rows,
                 token_pairs const& pairs, accumulate_t<S> const* weight,
                 matrix_view<S const> tokens, matrix_view<S> out, update mode, call_site site) {
  bool const streaming = is_past_l2(pairs.T, out);
  auto const launch = [&](auto vector, auto batch) {
    using kernel = combine_kernel<S, vector(), batch(), threads_of<X>(128)>;
    slices const cut = slice(pairs.T, out.cols(), kernel::step, warps_of(exec));
    exec.launch(function, kernel{}, blocks_for(pairs.T * cut.of_row, kernel::threads / warp_size),
                site, rows, pairs, weight, tokens, cut, mode == update::add, streaming, out);
  };
  with_vector<S>(in_vectors(rows, tokens, out), [&](auto vector) {
    if constexpr (vector() != 1)
      if (pairs.K <= 2) return launch(vector, std::integral_constant<int, 2>{});
    launch(vector, std::integral_constant<int, 8>{});
  });
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
