// The communicator over NCCL itself and plans over it: one rank on the first GPU, then a rank on each GPU.
// Never run: there was no GPU to run it on.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <doctest/doctest.h>
#include <exception>
#include <nccl.h>
#include <numeric>
#include <string>
#include <support/exchanged_rows.hpp>
#include <support/nccl_owner.hpp>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/bound_plan.hpp>
#include <moe/comm/device_exchange.cuh>
#include <moe/comm/flat.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/nccl.cuh>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/core/gpu.cuh>
#include <moe/core/memory.hpp>

#include "support/device.cuh"

namespace {

using moe::exchange_status;
using moe::topology;
using moe_test::append_rows;
using moe_test::at;
using moe_test::late;
using moe_test::M;
using moe_test::nccl_communicator;

void check(cudaError_t code) {
  moe::detail::check_cuda(code, "nccl_test", {});
}

/// A rank, and memory of its GPU: all of it is there before NCCL runs, as an allocation may wait for kernels
/// that wait for this rank.
struct gpu_rank {
  nccl_communicator& comm;
  moe::memory room;

  template <class T>
  T* upload(std::vector<T> const& values) {
    auto const n = static_cast<std::int64_t>(values.size());
    T* const there = room.take<T>(n, "nccl_test: enough room", moe::call_site::here());
    if (n > 0) check(cudaMemcpy(there, values.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    return there;
  }
  template <class T>
  T* no_values(std::size_t n) {
    return upload(std::vector<T>(n, T(-1)));
  }
  /// Waits for the stream first.
  template <class T>
  bool holds(T const* there, std::vector<T> const& expected) {
    if (!comm.wait_for_stream(late())) return false;
    auto found = expected;
    std::fill(found.begin(), found.end(), T(-1));
    if (!found.empty())
      check(cudaMemcpy(found.data(), there, found.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return found == expected;
  }
};

/// f(rank) is true on a thread for each of the first R GPUs.
template <class F>
void check_on_gpus(int R, F const& f) {
  ncclUniqueId id;
  REQUIRE(ncclGetUniqueId(&id) == ncclSuccess);
  std::vector<std::string> wrong(at(R));
  moe_test::on_threads(R, [&](int r) {
    try {
      check(cudaSetDevice(r));
      moe::gpu_buffer const room(std::size_t{1} << 20);
      moe_test::owner const mine(id, R, r);
      wrong[at(r)] = "no communicator";
      if (!mine.is_ready()) return;
      nccl_communicator comm = mine.communicator();
      gpu_rank rank{comm, room};
      wrong[at(r)] = f(rank) ? "" : "wrong";
      mine.end(comm);
    } catch (std::exception const& e) {
      wrong[at(r)] = e.what();
    }
  });
  for (std::string const& w : wrong) CHECK(w == "");
}
template <class F>
void check_ranks(F const& f) {
  int devices = 0;
  check(cudaGetDeviceCount(&devices));
  check_on_gpus(1, f);
  if (devices > 1) check_on_gpus(devices, f);
}

/// Rows from rank s to rank d.
std::int64_t count(int s, int d) {
  return (3 * s + 2 * d + 1) % 4;
}

struct rows_of_rank {
  std::vector<float> sent, received;
  std::vector<std::int64_t> send_counts, receive_counts;

  rows_of_rank(int R, int r) {
    for (int i = 0; i < R; ++i) {
      append_rows(sent, r, i, count(r, i));
      append_rows(received, i, r, count(i, r));
      send_counts.push_back(count(r, i));
      receive_counts.push_back(count(i, r));
    }
  }
};

moe::matrix_view<float const> rows_in(float const* data, std::size_t size) {
  return {data, static_cast<std::int64_t>(size) / M, M};
}
moe::matrix_view<float> rows_in(float* data, std::size_t size) {
  return {data, static_cast<std::int64_t>(size) / M, M};
}

}  // namespace

TEST_CASE("comm/nccl on GPUs: messages to all, to itself too, and groups of the user") {
  MOE_NEEDS_GPU();
  check_ranks([](gpu_rank& on) {
    int const R = on.comm.size(), r = on.comm.rank();
    std::vector<int> numbers, expected;
    for (int i = 0; i < R; ++i) {
      numbers.push_back(100 * r + i);
      expected.push_back(100 * i + r);
    }
    int const* const from = on.upload(numbers);
    int* const to = on.no_values<int>(at(R));
    std::vector<moe::outgoing> sends;
    std::vector<moe::incoming> receives;
    for (int i = 0; i < R; ++i) {
      sends.push_back({reinterpret_cast<std::byte const*>(from + i), sizeof(int), i});
      receives.push_back({reinterpret_cast<std::byte*>(to + i), sizeof(int), i});
    }
    if (!exchange_now(on.comm, sends, receives, late()) || !on.holds(to, expected)) return false;

    int* const own = on.no_values<int>(1);
    moe::nccl_group group;
    group.send(on.comm.native(), on.comm.stream(), sends[at(r)]);
    group.receive(on.comm.native(), on.comm.stream(),
                  {reinterpret_cast<std::byte*>(own), sizeof(int), r});
    moe::outcome const end = group.end();
    if (!end && end.status != exchange_status::pending) return false;
    return wait_for_nccl(on.comm.native(), late()) && on.holds(own, {101 * r});
  });
}

TEST_CASE("comm/nccl on GPUs: all-to-all of equal blocks, and of any numbers of rows") {
  MOE_NEEDS_GPU();
  check_ranks([](gpu_rank& on) {
    int const R = on.comm.size(), r = on.comm.rank();
    rows_of_rank const rows(R, r);
    std::int64_t const* const counts = on.upload(rows.send_counts);
    auto* const received = on.no_values<std::int64_t>(at(R));
    if (!moe::all_to_all<std::int64_t>(on.comm, {counts, R}, {received, R}, late()) ||
        !on.holds(received, rows.receive_counts))
      return false;
    float const* const in = on.upload(rows.sent);
    float* const out = on.no_values<float>(rows.received.size());
    return moe::all_to_all_v<float>(on.comm, rows_in(in, rows.sent.size()), rows.send_counts,
                                    rows_in(out, rows.received.size()), rows.receive_counts,
                                    late()) &&
           on.holds(out, rows.received);
  });
}

TEST_CASE("comm/device_exchange on GPUs: plans there and back") {
  MOE_NEEDS_GPU();
  check_ranks([](gpu_rank& on) {
    int const R = on.comm.size(), r = on.comm.rank();
    rows_of_rank const rows(R, r);
    auto const plan = moe::make_plan(moe::two_hop{}, topology::even(1, R).grouped((R + 1) / 2), r);
    auto const back_plan = transpose(plan);
    moe::bound_plan there(plan), back(back_plan);
    moe::device_exchange exchange(moe::gpu(on.comm.stream()), on.comm);
    if (!exchange.bind(there, rows.send_counts, on.room, late())) return false;
    back.bind_back(there);
    float const* const in = on.upload(rows.sent);
    float* const out = on.no_values<float>(rows.received.size());
    float* const home = on.no_values<float>(rows.sent.size());
    auto const received = rows_in(out, rows.received.size());
    return exchange.run<float>(there, rows_in(in, rows.sent.size()), received, on.room, late()) &&
           exchange.run<float>(back, received, rows_in(home, rows.sent.size()), on.room, late()) &&
           on.holds(out, rows.received) && on.holds(home, rows.sent);
  });
}

TEST_CASE("comm/device_exchange on GPUs: a plan in a graph, bound without messages") {
  MOE_NEEDS_GPU();
  check_ranks([](gpu_rank& on) {
    int const R = on.comm.size(), r = on.comm.rank();
    cudaStream_t const stream = on.comm.stream();
    auto const plan = moe::make_plan(moe::two_hop{}, topology::even(1, R).grouped((R + 1) / 2), r);
    moe::bound_plan sizes(plan);
    sizes.bind_equal(2);
    std::vector<float> rows, expected;
    for (int i = 0; i < R; ++i) {
      append_rows(rows, r, i, 2);
      append_rows(expected, i, r, 2);
    }
    float const* const in = on.upload(rows);
    float* const out = on.no_values<float>(expected.size());
    moe::device_exchange exchange(moe::gpu(stream), on.comm);
    auto const enqueue = [&] {
      return exchange.run<float>(sizes, rows_in(in, rows.size()), rows_in(out, expected.size()),
                                 on.room, late());
    };
    if (!enqueue() || !on.holds(out, expected)) return false;  // connects the ranks

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t replay = nullptr;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    moe::outcome const captured = enqueue();
    check(cudaStreamEndCapture(stream, &graph));
    if (!captured) return false;
    check(cudaGraphInstantiate(&replay, graph, 0));
    bool right = true;
    for (int i = 0; i < 2; ++i) {
      check(cudaMemsetAsync(out, 0, expected.size() * sizeof(float), stream));
      check(cudaGraphLaunch(replay, stream));
      right = on.holds(out, expected) && right;
    }
    check(cudaGraphExecDestroy(replay));
    check(cudaGraphDestroy(graph));
    return right;
  });
}

TEST_CASE("comm/device_exchange on GPUs: sums over ranks, and of a rank's own rows") {
  MOE_NEEDS_GPU();
  check_ranks([](gpu_rank& on) {
    int const R = on.comm.size(), r = on.comm.rank();
    moe::device_exchange exchange(moe::gpu(on.comm.stream()), on.comm);
    for (std::int64_t const columns : {8, 3}) {  // in vectors, and element by element
      // Back from experts that are sliced over all ranks: 2 rows for each rank.
      auto const plan = transpose(moe::make_sharded_plan(topology::even(1, R), r));
      moe::bound_plan sizes(plan);
      sizes.bind_equal(2);
      std::vector<float> all(at(R) * 2 * static_cast<std::size_t>(columns)), sums;
      std::iota(all.begin(), all.end(), static_cast<float>(1000 * r));
      for (std::int64_t i = 0; i < 2 * columns; ++i)
        sums.push_back(static_cast<float>(R * (2 * columns * r + i) + 500 * R * (R - 1)));
      float const* const in = on.upload(all);
      float* const out = on.no_values<float>(sums.size());
      if (!exchange.run<float>(sizes, {in, 2 * R, columns}, {out, 2, columns}, on.room, late()) ||
          !on.holds(out, sums))
        return false;

      auto doubling = moe::make_plan(moe::flat{}, topology::even(1, R), r);
      doubling.last.push_back({{0, r}, {1, r}, 1, moe::row_action::add});
      moe::bound_plan twice(doubling);
      twice.bind_equal(2);
      std::vector<float> const ones(all.size(), 1);
      std::vector<float> expected = ones;
      for (std::int64_t i = 0; i < 2 * columns; ++i)
        expected[static_cast<std::size_t>(2 * columns * r + i)] = 2;
      float const* const units = on.upload(ones);
      float* const doubled = on.no_values<float>(expected.size());
      if (!exchange.run<float>(twice, {units, 2 * R, columns}, {doubled, 2 * R, columns}, on.room,
                               late()) ||
          !on.holds(doubled, expected))
        return false;
    }
    return true;
  });
}

TEST_CASE("comm/nccl on GPUs: children, and the end of a communicator") {
  MOE_NEEDS_GPU();
  check_ranks([](gpu_rank& on) {
    int const R = on.comm.size(), r = on.comm.rank();
    nccl_communicator child;
    if (!on.comm.split(r % 2, r, late(), child)) return false;
    if (child.size() != (R + 1 - r % 2) / 2 || child.rank() != r / 2) return false;
    gpu_rank in_child{child,
                      on.room};  // on.comm fails as soon as a rank of the other child has aborted
    int const* const from = in_child.upload(std::vector<int>(at(child.size()), r));
    int* const to = in_child.no_values<int>(at(child.size()));
    std::vector<int> expected;
    for (int i = 0; i < child.size(); ++i) expected.push_back(2 * i + r % 2);
    if (!moe::all_to_all<int>(child, {from, child.size()}, {to, child.size()}, late()) ||
        !in_child.holds(to, expected))
      return false;
    child = {};
    on.comm.abort();
    return on.comm.native() == nullptr &&
           on.comm.wait_for_stream(late()).status == exchange_status::aborted;
  });
}
