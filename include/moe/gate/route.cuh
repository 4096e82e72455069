// Route on a GPU: the overloads of route.hpp for executors of kernels.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/route_checks.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/gate/route_backward_kernel.hpp>
#include <moe/gate/route_kernel.hpp>
#include <moe/gate/score_gradient.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Calls f.template operator()<Home>() for the `row_home` of E experts.
///
/// A thread, a warp or a block to a token. Parts of a warp are left out: tokens that share a warp make
/// each of its shuffles wait for lanes that may have parted, and a warp has one instruction for the
/// highest of all lanes. Steps of two in E waste at most half of the arithmetic, and there are six
/// kernels of a gate to compile, not nine.
template <kernel_executor X, class F>
void with_row_home(char const* limit, std::int64_t E, call_site site, F const& f) {
  constexpr int few = threads_of<X>(64), some = threads_of<X>(256), many = threads_of<X>(512);
  if (E <= 8)
    f.template operator()<row_home<8, 1, few>>();
  else if (E <= 64)
    f.template operator()<row_home<64, 32, many>>();
  else if (E <= 128)
    f.template operator()<row_home<128, 32, many, 65>>();
  else if (E <= 256)
    f.template operator()<row_home<256, 32, many, 129>>();
  else if (E <= 512)
    f.template operator()<row_home<512, 32, some, 257>>();
  else {
    expects(E <= 4096, limit, site, {{"E", E}});
    f.template operator()<row_home<4096, some, some, 513>>();
  }
}

}  // namespace detail

/// Bytes of scratch for `route` and `route_backward` of one gate, any T: none.
template <class Gate, std::same_as<float> V = float, kernel_executor X>
std::size_t route_scratch(X const&, std::int64_t) noexcept {
  return 0;
}

/// Runs a gate on every token, and sums what tables and losses need.
///
/// As `route` on a CPU, with these differences: values are float and E is at most 4096; ids are
/// the same as there except where two scores differ by less than the last bits of an exponential.
///
/// @param scratch  Not used.
/// @param out      As there. chunk_counts out: the pairs that `sums` counts, if it does.
/// @param sums     Arrays out; from `carve_gate_sums`, some of them set to null, or with a chunk of the
///                 caller's own.
/// @throws precondition_error as there, if E > 4096, or if chunks of `sums` are not those of T tokens.
/// @note   One kernel. Deterministic: the sums, too, as they depend on the chunk, not on the device.
template <kernel_executor X, class Gate, class L>
  requires token_gate<Gate, array_row<float>>
void route(X const& exec, Gate const& g, matrix_view<L> logits, batch const& tokens, memory,
           basic_routing<float>& out, std::type_identity_t<matrix_view<float>> scores,
           gate_sums const& sums, call_site site = call_site::here()) {
  std::int64_t const T = logits.rows(), E = logits.cols();
  detail::check_route(Gate::max_k, g.k(), logits, out, scores, site);
  expects(sums.chunk >= 1 && sums.chunk <= gate_sums::most_tokens &&
              sums.chunks == detail::chunks_of(T, sums.chunk),
          "route: sums has T / chunk chunks, 1 <= chunk < 2^15", site,
          {{"chunk", sums.chunk}, {"chunks", sums.chunks}, {"T", T}});
  detail::with_row_home<X>("route: on a GPU, E <= 4096", E, site, [&]<class Home> {
    out.token_begin = nullptr;
    out.tokens = tokens;
    out.chunk_counts = {};
    if (sums.pairs != nullptr) out.chunk_counts = {sums.chunk, sums.chunks, sums.pairs};
    exec.launch("route", route_kernel<Gate, Home>{g}, sums.chunks, site,
                matrix_view<std::remove_const_t<L> const>(logits), sums.chunk,
                static_cast<basic_routing<float> const&>(out), scores, sums);
  });
}

/// As above, without the sums.
template <kernel_executor X, class Gate, class L>
  requires token_gate<Gate, array_row<float>>
void route(X const& exec, Gate const& g, matrix_view<L> logits, batch const& tokens, memory scratch,
           basic_routing<float>& out, std::type_identity_t<matrix_view<float>> scores = {},
           call_site site = call_site::here()) {
  gate_sums sums;
  sums.chunk = detail::tokens_per_chunk(logits.rows(), logits.cols());
  sums.chunks = detail::chunks_of(logits.rows(), sums.chunk);
  route(exec, g, logits, tokens, scratch, out, scores, sums, site);
}

/// The gradient of `route`, as on a CPU; values are float and E is at most 4096.
/// @param scratch  Not used.
/// @throws precondition_error as there, or if E > 4096.
/// @note   One kernel. Deterministic.
template <kernel_executor X, class Gate, class L, class D>
  requires token_gate<Gate, array_row<float>>
void route_backward(X const& exec, Gate const& g, matrix_view<L> logits,
                    basic_routing<float> const& chosen,
                    std::type_identity_t<matrix_view<float const>> dweight,
                    std::type_identity_t<score_gradient<float>> const& dscores, memory,
                    matrix_view<D> dlogits, call_site site = call_site::here()) {
  std::int64_t const T = logits.rows(), E = logits.cols();
  detail::check_route_backward(Gate::max_k, g.k(), logits, chosen, dweight, dscores, dlogits, site);
  std::int64_t const chunk = detail::tokens_per_chunk(T, E);
  detail::with_row_home<X>("route_backward: on a GPU, E <= 4096", E, site, [&]<class Home> {
    exec.launch("route_backward", route_backward_kernel<Gate, Home>{g}, detail::chunks_of(T, chunk),
                site, matrix_view<std::remove_const_t<L> const>(logits), chunk,
                static_cast<basic_routing<float> const&>(chosen), dweight, dscores, dlogits);
  });
}

}  // namespace moe::inline MOE_ABI
