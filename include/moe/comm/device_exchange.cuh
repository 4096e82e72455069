// Runs plans in memory of a device: enqueues the copies, sums and messages of a bound plan on a stream.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <moe/comm/add_rows_kernel.hpp>
#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/placed_rows.hpp>
#include <moe/comm/detail/row_format.hpp>
#include <moe/comm/detail/slot_counts.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/slices.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Enqueues to[i] += from[i] for i < n.
template <class T, kernel_executor X>
void add_rows(X const& exec, T const* from, std::int64_t n, T* to, call_site site) {
  constexpr int threads = threads_of<X>(256);
  auto const launch = [&](auto vector) {
    std::int64_t const blocks = std::min<std::int64_t>(
        blocks_for(n, std::int64_t{threads} * vector()), std::int64_t{16} * exec.processors());
    exec.launch("device_exchange::run", add_rows_kernel<T, vector(), threads>{}, blocks, site, from,
                n, to);
  };
  if constexpr (scalar<T>)
    with_vector<T>(in_vectors(matrix_view<T const>(from, 1, n), matrix_view<T>(to, 1, n)), launch);
  else
    launch(std::integral_constant<int, 1>{});
}

}  // namespace detail

/// Bytes of scratch that `device_exchange` needs to run a bound plan with rows of M elements.
template <class T>
std::size_t exchange_scratch(bound_plan const& sizes, std::int64_t M) {
  std::size_t const bytes =
      detail::placed_rows::staging_bytes(sizes, static_cast<std::size_t>(M) * sizeof(T));
  return memory_size{}.add<std::byte>(static_cast<std::int64_t>(bytes)).bytes();
}
/// Bytes of scratch that `device_exchange` needs to bind a plan.
inline std::size_t bind_scratch(exchange_plan const& plan) {
  std::int64_t slots = 0;
  for (int const n : plan.buffers) slots += n;
  return memory_size{}.add<detail::row_count>(slots).bytes();
}

/// One rank's executor of plans in memory of a device: what `rank_exchange` is for the host. All of it is
/// work on the communicator's stream, and what it leaves there can be captured in a CUDA graph.
///
/// Plans that select tokens are refused. Keeps its arrays: a run allocates nothing once it has seen its
/// largest. Sums are made in the order of the plan, so that results are bitwise those of the host, but
/// for the bits of a NaN.
///
/// Never run on a GPU yet.
/// @tparam X  `gpu`, of the stream of the communicator.
template <kernel_executor X, stream_communicator C>
class device_exchange {
 public:
  /// @param comm  Must outlive the exchange; what it has started is enqueued whenever a member is called.
  device_exchange(X const& exec, C& comm) : exec_(exec), comm_(&comm) {}

  /// Exact sizes, as rank_exchange::bind: of the same plan with the counts themselves as rows. Waits for
  /// the device; a plan may as well be bound by a `rank_exchange` over a communicator of the host.
  ///
  /// @param rows     [input slots] rows in each, in memory of the host.
  /// @param scratch  bind_scratch(plan) bytes of the device; free again when this returns,
  ///                 or after a failure when the stream is through.
  /// @return What failed, if anything did; then the communicator has aborted.
  /// @throws precondition_error as rank_exchange::bind does, or if scratch is short.
  outcome bind(bound_plan& sizes, vector_view<std::int64_t const> rows, memory scratch,
               deadline until, call_site site = call_site::here()) {
    using count = detail::row_count;
    expects_usable(sizes, site);
    counts_.begin(sizes, rows, site);
    count* const there = scratch.take<count>(
        counts_.size(), "device_exchange::bind: scratch >= bind_scratch(plan)", site);
    auto* const device = reinterpret_cast<std::byte*>(there);
    auto* const host = reinterpret_cast<std::byte*>(counts_.data());
    auto const bytes = static_cast<std::size_t>(counts_.size()) * sizeof(count);
    rows_.place(sizes, sizeof(count), device);

    // Copies of the host's memory find the stream idle: they may wait for it, and know no deadline.
    outcome result = comm_->wait_for_stream(until);
    if (result) result = copy_now(device, host, bytes, until);
    if (result) result = enqueue<count>(until, site);
    if (result) result = comm_->wait_for_stream(until);
    if (result) result = copy_now(host, device, bytes, until);
    if (result) result = counts_.end(sizes);
    if (!result) comm_->abort();
    return result;
  }

  /// Enqueues the plan and returns, without waiting for the device. `ok`: work that is enqueued on the
  /// stream afterwards finds the rows in `out`. What fails later is told by the communicator's
  /// wait_for_stream.
  ///
  /// @param in       [sizes.input_rows(), M] contiguous, the input slots one after another.
  /// @param out      [sizes.output_rows() or more, M] contiguous, the output slots one after another. No
  ///                 overlap with `in`.
  /// @param scratch  exchange_scratch<T>(sizes, M) bytes, in use until the stream is through.
  /// @param until    When all has to be enqueued: the first messages between two ranks connect them.
  /// @return What failed, if anything did; then the communicator has aborted.
  /// @throws precondition_error if the plan is not bound, not of this rank or selects tokens, or if shapes
  ///         do not fit or scratch is short; what `exec` throws at launch, after it has aborted.
  /// @cost   A call of the runtime for each move of the plan, a group of NCCL for each phase.
  template <class T>
  outcome run(bound_plan const& sizes, std::type_identity_t<matrix_view<T const>> in,
              std::type_identity_t<matrix_view<T>> out, memory scratch, deadline until,
              call_site site = call_site::here()) {
    static_assert(std::is_trivially_copyable_v<T>);
    expects_usable(sizes, site);
    expects(sizes.is_bound(), "device_exchange::run: bound to counts", site);
    expects(!sizes.selects(), "device_exchange::run: the plan selects no tokens", site);
    expects(in.rows() == sizes.input_rows() && out.rows() >= sizes.output_rows() &&
                in.cols() == out.cols(),
            "device_exchange::run: in is [input_rows(), M], out [output_rows() or more, M]", site,
            {{"in.rows()", in.rows()},
             {"input_rows()", sizes.input_rows()},
             {"out.rows()", out.rows()},
             {"output_rows()", sizes.output_rows()},
             {"in.cols()", in.cols()},
             {"out.cols()", out.cols()}});
    expects(in.ld() == in.cols() && out.ld() == out.cols() && !overlap(in, out),
            "device_exchange::run: contiguous rows, in and out apart", site);
    auto const row = static_cast<std::size_t>(in.cols()) * sizeof(T);
    auto const staging = static_cast<std::int64_t>(detail::placed_rows::staging_bytes(sizes, row));
    auto* const room = scratch.take<std::byte>(
        staging, "device_exchange::run: scratch >= exchange_scratch<T>(sizes, M)", site);
    auto const rows_from = [row](T const* first) {
      auto* const data = const_cast<std::byte*>(reinterpret_cast<std::byte const*>(first));
      return detail::buffer_rows{{{data, row, row}, {}}};
    };
    rows_.place(sizes, row, rows_from(in.data()), rows_from(out.data()), room);
    return enqueue<T>(until, site);
  }

 private:
  void expects_usable(bound_plan const& sizes, call_site site) const {
    expects(
        sizes.has_plan() && comm_->rank() == sizes.plan().rank,
        "device_exchange: the plan is of the communicator's rank", site,
        {{"plan.rank", sizes.has_plan() ? sizes.plan().rank : -1}, {"comm.rank()", comm_->rank()}});
    if constexpr (requires { exec_.stream() == comm_->stream(); })
      expects(exec_.stream() == comm_->stream(),
              "device_exchange: the executor is of the communicator's stream", site);
  }

  outcome copy_now(std::byte* to, std::byte const* from, std::size_t bytes, deadline until) {
    outcome const enqueued = comm_->copy(to, from, bytes);
    return enqueued ? comm_->wait_for_stream(until) : enqueued;
  }

  template <class T>
  outcome enqueue(deadline until, call_site site) {
    exchange_plan const& plan = rows_.sizes().plan();
    outcome result;
    try {
      for (exchange_phase const& phase : plan.phases) {
        result = move<T>(phase.moves, site);
        if (!result) break;
        rows_.list_messages(phase);
        // Not for the messages: until NCCL has enqueued them, nobody may use the stream.
        result = exchange_now(*comm_, rows_.sends(), rows_.receives(), ticket_, until);
        if (!result) break;
      }
      if (result) result = move<T>(plan.last, site);
    } catch (...) {  // peers would wait for this rank
      comm_->abort();
      throw;
    }
    if (!result) comm_->abort();
    return result;
  }

  template <class T>
  outcome move(std::vector<row_move> const& moves, call_site site) {
    for (row_move const& m : moves) {
      std::size_t const bytes = rows_.bytes(m.from, m.count);
      if (bytes == 0) continue;
      if (m.action == row_action::add) {
        detail::add_rows(exec_, reinterpret_cast<T const*>(rows_.data(m.from)),
                         static_cast<std::int64_t>(bytes / sizeof(T)),
                         reinterpret_cast<T*>(rows_.data(m.to)), site);
      } else if (outcome const copied = comm_->copy(rows_.data(m.to), rows_.data(m.from), bytes);
                 !copied) {
        return copied;
      }
    }
    return {};
  }

  X exec_;
  C* comm_;
  detail::slot_counts counts_;
  detail::placed_rows rows_;
  typename C::ticket ticket_;
};

}  // namespace moe::inline MOE_ABI
