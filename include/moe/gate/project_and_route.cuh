// Project and route: logits of a few tokens and their gate in one launch, for decoding.
// SPDX-License-Identifier: MIT
#pragma once

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
#include <moe/gate/project_and_route_kernel.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

template <kernel_executor X>
inline constexpr int project_and_route_tile =
    threads_of<X>(256) / warp_size / router_split::parts * router_split::experts;

}  // namespace detail

/// Bytes of scratch for `project_and_route` of T tokens of width M.
template <kernel_executor X>
constexpr std::size_t project_and_route_scratch(X const&, std::int64_t T, std::int64_t E,
                                                std::int64_t M) noexcept {
  auto const split = router_split::of(E, M, detail::project_and_route_tile<X>);
  return memory_size{}.add<float>(split.splits * T * E).bytes();
}

/// logits = x * router^T, and `route` of them: one launch, for the few tokens of a decoding step.
///
/// @param x        [T,M] in, T <= 16, of float, bf16 or half. Faster if its rows and
///                 those of router lie at multiples of 16 bytes and M is one of 8.
/// @param router   [E,M] in, E <= 512: one row for each expert.
/// @param ids      As for `route`.
/// @param ticket   One counter in memory of the device, 0 before; left 0. Calls that may run at the
///                 same time have one each.
/// @param scratch  At least project_and_route_scratch(exec, T, E, M) bytes.
/// @param out      As for `route`.
/// @param logits   [T,E] out, or absent: for backward.
/// @param scores   [T,E] out, or absent; as for `route`.
/// @throws precondition_error unless T <= 16 and E <= 512, if the shapes disagree, outputs overlap, the
///         ticket is null, or scratch is too small.
/// @note   Deterministic. Sums are in float, in an order that depends on T, E and M alone (and on the
///         threads of a block).
/// @cost   Reads the router once, and x once for every 16 experts.
template <kernel_executor X, class Gate, class A, class W>
  requires token_gate<Gate, array_row<float>>
void project_and_route(X const& exec, Gate const& g, matrix_view<A> x, matrix_view<W> router,
                       batch const& ids, std::int32_t* ticket, memory scratch,
                       basic_routing<float>& out,
                       std::type_identity_t<matrix_view<float>> logits = {},
                       std::type_identity_t<matrix_view<float>> scores = {},
                       call_site site = call_site::here()) {
  std::int64_t const T = x.rows(), M = x.cols(), E = router.rows();
  expects(T >= 0 && T <= router_split::most_tokens && E >= 1 && E <= 512,
          "project_and_route: T <= 16, 1 <= E <= 512", site, {{"T", T}, {"E", E}});
  expects(M >= 1 && router.cols() == M && x.ld() >= M && router.ld() >= M &&
              (T == 0 || !x.absent()) && !router.absent(),
          "project_and_route: x is [T,M], router is [E,M], ld >= M", site,
          {{"M", M}, {"router's M", router.cols()}, {"ld", x.ld()}, {"router's ld", router.ld()}});
  expects(ticket != nullptr, "project_and_route: ticket is given", site);
  auto const split = router_split::of(E, M, detail::project_and_route_tile<X>);
  float* const partial = scratch.take<float>(
      split.splits * T * E,
      "project_and_route: scratch has project_and_route_scratch(exec, T, E, M) bytes", site);
  detail::check_route(Gate::max_k, g.k(), matrix_view(partial, T, E), out, scores, site);
  detail::expect_shape("project_and_route: logits are [T,E], ld >= E", logits, T, E, site);
  expects(!overlap(logits, x) && !overlap(logits, router) && !overlap(logits, scores),
          "project_and_route: logits overlap nothing else", site);
  out.token_begin = nullptr;
  out.tokens = ids;
  out.chunk_counts = {};
  if (T == 0) return;

  auto const is_aligned = [](auto view) {
    auto const bytes = static_cast<std::int64_t>(sizeof(*view.data()));
    return reinterpret_cast<std::uintptr_t>(view.data()) % 16 == 0 && view.ld() * bytes % 16 == 0;
  };
  auto const launch = [&]<class Home> {
    exec.launch("project_and_route", project_and_route_kernel<Gate, Home>{g},
                split.tiles * split.splits, site, matrix_view<std::remove_const_t<A> const>(x),
                matrix_view<std::remove_const_t<W> const>(router), split,
                M % router_split::elements == 0 && is_aligned(x) && is_aligned(router), partial,
                ticket, static_cast<basic_routing<float> const&>(out), logits, scores);
  };
  if (E <= 64)
    launch.template operator()<row_home<64, 32, threads_of<X>(256)>>();
  else if (E <= 256)
    launch.template operator()<row_home<256, 32, threads_of<X>(256), 65>>();
  else
    launch.template operator()<row_home<512, 32, threads_of<X>(256), 257>>();
}

}  // namespace moe::inline MOE_ABI
