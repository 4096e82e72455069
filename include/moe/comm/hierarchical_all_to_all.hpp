// All-to-all of equal blocks by a strategy, as one function.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// @return Bytes of a block, of R in all.
template <class T>
std::int64_t expect_equal_blocks(std::int64_t in, std::int64_t out, std::int64_t R,
                                 call_site site) {
  expects(in == out && in % R == 0,
          "hierarchical_all_to_all: in and out of one size, a multiple of R", site,
          {{"in", in}, {"out", out}, {"R", R}});
  return in / R * static_cast<std::int64_t>(sizeof(T));
}
/// R blocks as rows of bytes: an all-to-all adds nothing, so T need not be a number.
template <class T>
auto as_rows_of_bytes(vector_view<T> blocks, std::int64_t R, std::int64_t bytes) {
  using byte = std::conditional_t<std::is_const_v<T>, unsigned char const, unsigned char>;
  return matrix_view<byte>(reinterpret_cast<byte*>(blocks.data()), R, bytes);
}

}  // namespace detail

/// As `all_to_all`, by a strategy that knows which ranks share a node: block d of this rank becomes block
/// i of index d, where i is this rank's index in `ranks`.
///
/// @param ranks     R ranks, the same on all of them.
/// @param in        [R * n] block d is in[d * n .. (d + 1) * n).
/// @param out       [R * n] out, the same n on all ranks. No overlap with `in`.
/// @param strategy  Any `exchange_path`.
/// @throws precondition_error unless this rank is in `ranks`, and both are of one size, a multiple of R.
/// @note  Collective. If it fails, the communicator has aborted. It makes a plan and the staging rows anew
///        in each call: O(R^2) time and R allocations or more. Where that matters, make the plan once, and
///        keep it, its `bound_plan` after bind_equal(1), and a `rank_exchange`, whose run is the rest.
/// @cost  See the strategy.
template <class T, communicator C, exchange_path Path = two_hop>
outcome hierarchical_all_to_all(C& comm, topology const& ranks, vector_view<T const> in,
                                vector_view<T> out, deadline until, Path const& strategy = {},
                                call_site site = call_site::here()) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::int64_t const R = ranks.size();
  std::int64_t const bytes = detail::expect_equal_blocks<T>(in.size(), out.size(), R, site);
  exchange_plan const plan = make_plan(strategy, ranks, comm.rank(), site);
  bound_plan blocks(plan);
  blocks.bind_equal(1, site);
  rank_exchange exchange(comm);
  return exchange.template run<unsigned char>(blocks, detail::as_rows_of_bytes(in, R, bytes),
                                              detail::as_rows_of_bytes(out, R, bytes), until, site);
}

}  // namespace moe::inline MOE_ABI
