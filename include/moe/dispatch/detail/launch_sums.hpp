// The launch behind combine and the gradient of dispatch, and what all launches of their folder choose.
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

/// Calls f(integral constant): elements of S that a thread moves at once.
template <class S, class F>
void with_vector(bool whole, F const& f) {
  if (whole)
    f(std::integral_constant<int, vector_size<S>>{});
  else
    f(std::integral_constant<int, 1>{});
}

/// Warps that occupy a device: half of what fits. A guess, never timed.
template <kernel_executor X>
std::int64_t warps_of(X const& exec) noexcept {
  return 32 * std::int64_t(exec.processors());
}

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
  bool const whole = in_vectors(rows, tokens, out);
  with_vector<S>(whole, [&](auto vector) {
    if (vector() != 1 && pairs.K <= 2)
      launch(vector, std::integral_constant < int, vector() == 1 ? 8 : 2 > {});
    else
      launch(vector, std::integral_constant<int, 8>{});
  });
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
