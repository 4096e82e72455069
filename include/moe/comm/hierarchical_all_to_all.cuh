// An all-to-all of equal blocks by any strategy, in memory of a device.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/device_exchange.cuh>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/hierarchical_all_to_all.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch of the device that hierarchical_all_to_all needs on any rank.
///
/// @param size  Elements in `in`: R * n.
/// @throws precondition_error as make_plan does, or unless size is a multiple of R.
/// @cost  Makes the plans of all ranks: keep the number.
template <class T, exchange_path Path = two_hop>
std::size_t hierarchical_all_to_all_scratch(topology const& ranks, std::int64_t size,
                                            Path const& strategy = {},
                                            call_site site = call_site::here()) {
  std::int64_t const R = ranks.size();
  std::int64_t const bytes = detail::expect_equal_blocks<T>(size, size, R, site);
  std::size_t most = 0;
  for (exchange_plan const& plan : make_plans(strategy, ranks, site)) {
    bound_plan blocks(plan);
    blocks.bind_equal(1, site);
    most = std::max(most, exchange_scratch<unsigned char>(blocks, bytes));
  }
  return most;
}

/// hierarchical_all_to_all in memory of a device, enqueued on the communicator's stream: `ok` says that what
/// is enqueued there afterwards finds the blocks in `out`.
///
/// @param exec     Of the communicator's stream.
/// @param in, out  As for the host, in memory of the device.
/// @param scratch  hierarchical_all_to_all_scratch<T>(ranks, in.size(), strategy) bytes of the device, in
///                 use until the stream is through.
/// @param until    When all has to be enqueued.
/// @throws precondition_error as the host's, or if scratch is short.
/// @note   Never run on a GPU yet. Where making the plan in each call matters, keep it, its `bound_plan`
///         and a `device_exchange`, whose run is the rest and can be captured in a CUDA graph.
template <class T, kernel_executor X, stream_communicator C, exchange_path Path = two_hop>
outcome hierarchical_all_to_all(X const& exec, C& comm, topology const& ranks,
                                vector_view<T const> in, vector_view<T> out, memory scratch,
                                deadline until, Path const& strategy = {},
                                call_site site = call_site::here()) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::int64_t const R = ranks.size();
  std::int64_t const bytes = detail::expect_equal_blocks<T>(in.size(), out.size(), R, site);
  exchange_plan const plan = make_plan(strategy, ranks, comm.rank(), site);
  bound_plan blocks(plan);
  blocks.bind_equal(1, site);
  device_exchange exchange(exec, comm);
  return exchange.template run<unsigned char>(blocks, detail::as_rows_of_bytes(in, R, bytes),
                                              detail::as_rows_of_bytes(out, R, bytes), scratch,
                                              until, site);
}

}  // namespace moe::inline MOE_ABI
