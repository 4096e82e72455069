// Plans in memory of a device: device_exchange over NCCL, against a stand-in of NCCL and of the CUDA runtime,
// its kernels on the emulator.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>
#include <iterator>
#include <mutex>
#include <stdexcept>
#include <string>
#include <support/exchanged_rows.hpp>
#include <support/refusal.hpp>
#include <thread>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/coordinated.hpp>
#include <moe/comm/device_exchange.cuh>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/hierarchical_all_to_all.cuh>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/nccl.cuh>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/scalar.hpp>

#include "comm/nccl_standin/nccl_standin.hpp"
#include "comm/nccl_standin/ranks.hpp"
#include "emulator/block_emulator.hpp"

namespace {

using moe::exchange_plan;
using moe::exchange_status;
using moe::matrix_view;
using moe::nccl_communicator;
using moe::outcome;
using moe::topology;
using moe_test::append_rows;
using moe_test::at;
using moe_test::counts;
using moe_test::late;
using moe_test::M;
using moe_test::on_ranks;
using moe_test::owner;
using moe_test::skew;
using namespace std::chrono_literals;

/// Enqueues kernels on a stream of the stand-in, which runs them on the emulator.
class stream_executor {
 public:
  static constexpr int max_threads = 64;

  explicit stream_executor(cudaStream_t stream) : stream_(stream) {}
  cudaStream_t stream() const { return stream_; }
  int processors() const { return 1; }

  template <class Kernel, class... Args>
  void launch(char const*, Kernel const& kernel, std::int64_t blocks, moe::call_site,
              Args const&... args) const {
    if (refuses) throw std::runtime_error("no launch");
    nccl_standin::enqueue(stream_, [=] {
      std::lock_guard const lock(one_at_a_time());  // the emulator notes what it runs
      moe_test::launch(moe_test::schedule::in_order, 1, static_cast<int>(blocks), kernel, args...);
    });
  }
  void fill(void*, int, std::size_t, moe::call_site = {}) const {
    throw std::logic_error("nothing is filled");
  }

  bool refuses = false;

 private:
  static std::mutex& one_at_a_time() {
    static std::mutex one;
    return one;
  }
  cudaStream_t stream_;
};
static_assert(moe::kernel_executor<stream_executor>);
using device_exchange = moe::device_exchange<stream_executor, nccl_communicator>;

outcome bind_now(device_exchange& exchange, moe::bound_plan& sizes,
                 moe::vector_view<std::int64_t const> rows) {
  moe::buffer const scratch(moe::bind_scratch(sizes.plan()));
  return exchange.bind(sizes, rows, scratch, late());
}

/// Runs a plan and waits until the device is through.
template <class T>
outcome run_now(device_exchange& exchange, nccl_communicator& comm, moe::bound_plan const& sizes,
                std::vector<T> const& in, std::vector<T>& out, std::int64_t columns = M) {
  moe::buffer const scratch(moe::exchange_scratch<T>(sizes, columns));
  outcome const enqueued = exchange.template run<T>(
      sizes, {in.data(), sizes.input_rows(), columns},
      {out.data(), static_cast<std::int64_t>(out.size()) / columns, columns}, scratch, late());
  return enqueued ? comm.wait_for_stream(late()) : enqueued;
}

/// There and back, as a rank: true if all rows were right.
bool exchange_both_ways(nccl_communicator& comm, exchange_plan const& plan, counts const& n) {
  int const R = comm.size(), r = comm.rank();
  std::vector<float> rows, expected;
  for (int i = 0; i < R; ++i) {
    append_rows(rows, r, i, n[at(r)][at(i)]);
    append_rows(expected, i, r, n[at(i)][at(r)]);
  }
  exchange_plan const back_plan = transpose(plan);
  moe::bound_plan there(plan), back(back_plan);
  device_exchange exchange(stream_executor(comm.stream()), comm);
  if (!bind_now(exchange, there, n[at(r)])) return false;
  for (int s = 0; s < R; ++s)
    if (there.output_counts()[s] != n[at(s)][at(r)]) return false;
  back.bind_back(there);
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::vector<float> out(expected.size(), -1), home(rows.size(), -1);
    if (!run_now(exchange, comm, there, rows, out) || out != expected) return false;
    if (!run_now(exchange, comm, back, out, home) || home != rows) return false;
  }
  return true;
}

template <class T>
std::vector<T> rows_of(int rank, std::int64_t size) {
  std::vector<T> rows;
  for (int i = 0; i < size; ++i)
    rows.push_back(static_cast<T>(1.f + 0.1f * static_cast<float>(rank * 50 + i % 97)));
  return rows;
}

/// Sums over all ranks, of rank r over its r + 1 rows of `columns`: on the host or on a device.
constexpr int summing = 4;
std::int64_t rows_in_all() {
  return summing * (summing + 1) / 2;
}
template <class T>
std::vector<std::vector<T>> sums_on_host(std::int64_t columns) {
  std::vector<std::vector<T>> sums(summing);
  moe::thread_world world(summing);
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    auto const plan = moe::make_sharded_plan(topology::even(1, summing), r);
    auto const back_plan = transpose(plan);
    moe::bound_plan there(plan), back(back_plan);
    moe::rank_exchange exchange(comm);
    static_cast<void>(exchange.bind(there, std::vector<std::int64_t>{r + 1}, late()));
    back.bind_back(there);
    auto const all = rows_of<T>(r, rows_in_all() * columns);
    auto& sum = sums[at(r)];
    sum.resize(static_cast<std::size_t>((r + 1) * columns));
    static_cast<void>(exchange.template run<T>(back, {all.data(), rows_in_all(), columns},
                                               {sum.data(), r + 1, columns}, late()));
  });
  return sums;
}
template <class T>
std::vector<std::vector<T>> sums_on_device(std::int64_t columns) {
  std::vector<std::vector<T>> sums(summing);
  on_ranks(summing, [&](nccl_communicator& comm, owner const& mine) {
    int const r = comm.rank();
    auto const plan = moe::make_sharded_plan(topology::even(1, summing), r);
    auto const back_plan = transpose(plan);
    moe::bound_plan there(plan), back(back_plan);
    device_exchange exchange(stream_executor(comm.stream()), comm);
    outcome end = bind_now(exchange, there, std::vector<std::int64_t>{r + 1});
    back.bind_back(there);
    auto& sum = sums[at(r)];
    sum.resize(static_cast<std::size_t>((r + 1) * columns));
    if (end)
      end = run_now(exchange, comm, back, rows_of<T>(r, rows_in_all() * columns), sum, columns);
    if (!end) sum.clear();
    mine.end(comm);
  });
  return sums;
}

}  // namespace

TEST_CASE("comm/device_exchange: every strategy, any counts, there and back, 1 to 6 ranks") {
  unsigned seed = 0;
  for (int R = 1; R <= 6; ++R) {
    topology const ranks = topology::even(1, R).grouped(3);
    std::vector<std::vector<exchange_plan>> const strategies = {
        moe::make_plans(moe::flat{}, ranks), moe::make_plans(moe::two_hop{}, ranks),
        moe::make_plans(moe::two_hop{moe::first_hop::intra}, ranks),
        moe::make_plans(moe::leader{}, ranks)};
    for (auto const& plans : strategies) {
      CAPTURE(R);
      counts const n = moe_test::random_counts(R, static_cast<skew>(seed % 4), seed);
      ++seed;
      if (&plans == &strategies[at(R % 4)]) ++seed;  // each strategy meets each skew
      std::vector<char> right(at(R));
      on_ranks(
          R,
          [&](nccl_communicator& comm, owner const& mine) {
            right[at(comm.rank())] = exchange_both_ways(comm, plans[at(comm.rank())], n);
            mine.end(comm);
          },
          {}, seed % 2 == 0);
      CHECK(right == std::vector<char>(at(R), true));
    }
  }
}

TEST_CASE("comm/hierarchical_all_to_all: of anything, on a device") {
  struct odd {
    char of[3];
  };
  auto const value = [](int from, int to, int i) {
    return odd{{static_cast<char>(from), static_cast<char>(to), static_cast<char>(i)}};
  };
  constexpr int n = 5;
  for (int R = 1; R <= 6; ++R) {
    topology const ranks = topology::even(1, R).grouped(2);
    std::vector<char> right(at(R));
    on_ranks(R, [&](nccl_communicator& comm, owner const& mine) {
      int const r = comm.rank();
      std::vector<odd> in, expected, out(at(R * n));
      for (int other = 0; other < R; ++other)
        for (int i = 0; i < n; ++i) {
          in.push_back(value(r, other, i));
          expected.push_back(value(other, r, i));
        }
      moe::buffer const scratch(moe::hierarchical_all_to_all_scratch<odd>(ranks, R * n));
      right[at(r)] = moe::hierarchical_all_to_all<odd>(stream_executor(comm.stream()), comm, ranks,
                                                       in, out, scratch, late()) &&
                     comm.wait_for_stream(late()) &&
                     std::memcmp(out.data(), expected.data(), out.size() * sizeof(odd)) == 0;
      if (r == 0) {
        CHECK_THROWS_AS(static_cast<void>(moe::hierarchical_all_to_all<odd>(
                            stream_executor(comm.stream()), comm, ranks,
                            moe::vector_view<odd const>(in.data(), R * n - (R > 1 ? 1 : 0)),
                            moe::vector_view<odd>(out.data(), R * n - 2), scratch, late())),
                        moe::precondition_error);
      }
      mine.end(comm);
    });
    CHECK(right == std::vector<char>(at(R), true));
  }
}

TEST_CASE_TEMPLATE("comm/device_exchange: sums are bitwise those of the host", T, float, double,
                   moe::bf16, moe::half, int, short) {
  // In vectors, and element by element.
  for (std::int64_t const columns : {8, 64, 3}) {
    CAPTURE(columns);
    auto const expected = sums_on_host<T>(columns), found = sums_on_device<T>(columns);
    for (int r = 0; r < summing; ++r) {
      REQUIRE(found[at(r)].size() == static_cast<std::size_t>((r + 1) * columns));
      bool const same = std::memcmp(found[at(r)].data(), expected[at(r)].data(),
                                    found[at(r)].size() * sizeof(T)) == 0;
      CHECK(same);
    }
  }
}

TEST_CASE("comm/device_exchange: run enqueues, whatever the device does, and runs again") {
  constexpr int R = 4;
  auto const plans = moe::make_plans(moe::two_hop{}, topology::even(2, 2));
  std::vector<char> right(R);
  on_ranks(R, [&](nccl_communicator& comm, owner const& mine) {
    int const r = comm.rank();
    moe::bound_plan sizes(plans[at(r)]);
    sizes.bind_equal(2);
    device_exchange exchange(stream_executor(comm.stream()), comm);
    std::vector<float> first, second, expected[2], out[2];
    for (int i = 0; i < R; ++i) {
      append_rows(first, r, i, 2);
      append_rows(second, r + 1, i, 2);
      append_rows(expected[0], i, r, 2);
      append_rows(expected[1], i + 1, r, 2);
    }
    std::atomic<bool> may_start{false};
    nccl_standin::enqueue(mine.stream(), [&] {
      while (!may_start) std::this_thread::yield();
    });
    moe::buffer const scratch(moe::exchange_scratch<float>(sizes, M));
    bool good = true;
    for (int i = 0; i < 2; ++i) {
      out[i].assign(first.size(), -1);
      good = good && exchange.run<float>(sizes, {i == 0 ? first : second, R * 2, M},
                                         {out[i], R * 2, M}, scratch, late());
    }
    // The device has not begun.
    good = good && out[0] == std::vector<float>(first.size(), -1);
    may_start = true;
    good = good && comm.wait_for_stream(late());
    right[at(r)] = good && out[0] == expected[0] && out[1] == expected[1];
    mine.end(comm);
  });
  CHECK(right == std::vector<char>(R, true));
}

TEST_CASE("comm/device_exchange: a plan that a host's communicator has bound") {
  constexpr int R = 3;
  auto const plans = moe::make_plans(moe::leader{}, topology::even(1, R));
  counts const n = moe_test::random_counts(R, skew::zeros, 5);
  std::vector<moe::bound_plan> sizes;
  for (auto const& plan : plans) sizes.emplace_back(plan);
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    static_cast<void>(moe::rank_exchange(comm).bind(sizes[at(r)], n[at(r)], late()));
  });
  std::vector<char> right(R);
  on_ranks(R, [&](nccl_communicator& comm, owner const& mine) {
    int const r = comm.rank();
    std::vector<float> rows, expected;
    for (int i = 0; i < R; ++i) {
      append_rows(rows, r, i, n[at(r)][at(i)]);
      append_rows(expected, i, r, n[at(i)][at(r)]);
    }
    device_exchange exchange(stream_executor(comm.stream()), comm);
    std::vector<float> out(expected.size() + 2 * M, -1);  // room for more
    right[at(r)] = run_now(exchange, comm, sizes[at(r)], rows, out) &&
                   std::equal(expected.begin(), expected.end(), out.begin()) &&
                   std::count(out.begin(), out.end(), -1.f) == 2 * M;
    mine.end(comm);
  });
  CHECK(right == std::vector<char>(R, true));
}

TEST_CASE("comm/device_exchange: failures are outcomes, and end the rank") {
  moe_test::aborts_untold const untold;
  constexpr int R = 3;
  auto const plans = moe::make_plans(moe::two_hop{}, topology::even(1, R).grouped(2));
  std::vector<std::int64_t> const ones(R, 1);
  // The device may still use memory after a failure.
  std::vector<float> const in(R * M);
  std::vector<std::vector<float>> out(R, in);
  std::vector<moe::buffer> scratch;
  for (int r = 0; r < R; ++r) scratch.emplace_back(1024);
  auto const ends_of = [&](auto const& disturb, auto const& use) {
    std::vector<outcome> ends(R);
    std::vector<char> over(R);
    on_ranks(R,
             [&](nccl_communicator& comm, owner const& mine) {
               int const r = comm.rank();
               if (disturb(comm, mine)) return mine.end(comm, true);
               moe::bound_plan sizes(plans[at(r)]);
               device_exchange exchange(stream_executor(comm.stream()), comm);
               ends[at(r)] = use(exchange, sizes, comm);
               over[at(r)] = comm.native() == nullptr;
               mine.end(comm, true);
             },
             {.patience = 1s});
    for (int r = 0; r < R; ++r)
      CHECK(static_cast<bool>(over[at(r)]) == (ends[at(r)].status != exchange_status::ok));
    return ends;
  };
  auto const binds = [&](device_exchange& exchange, moe::bound_plan& sizes, nccl_communicator&) {
    auto const& room = scratch[at(sizes.plan().rank)];
    return exchange.bind(sizes, ones, room, moe::within(50ms));
  };
  auto const runs = [&](device_exchange& exchange, moe::bound_plan& sizes,
                        nccl_communicator& comm) {
    sizes.bind_equal(1);
    int const r = comm.rank();
    outcome const end =
        exchange.run<float>(sizes, {in, R, M}, {out[at(r)], R, M}, scratch[at(r)], late());
    return end ? comm.wait_for_stream(moe::within(50ms)) : end;
  };

  // A rank that never comes is noticed where the host waits for the device.
  auto const missing = [](nccl_communicator& comm, owner const&) { return comm.rank() == 1; };
  CHECK(ends_of(missing, binds)[0].status == exchange_status::timeout);
  CHECK(ends_of(missing, runs)[0].status == exchange_status::timeout);

  // What NCCL reports at its n-th call.
  for (int const calls : {1, 2}) {
    auto const fails = [&](nccl_communicator& comm, owner const& mine) {
      if (comm.rank() == 0) nccl_standin::fail_after(mine.handle(), calls, ncclSystemError);
      return false;
    };
    outcome const expected{exchange_status::backend, -1, static_cast<int>(ncclSystemError)};
    CHECK(ends_of(fails, binds)[0] == expected);
    CHECK(ends_of(fails, runs)[0] == expected);
  }

  auto const broken = [](nccl_communicator& comm, owner const& mine) {
    if (comm.rank() == 2) nccl_standin::break_stream(mine.stream(), cudaErrorLaunchFailure);
    return false;
  };
  outcome const by_cuda{exchange_status::backend, -1, -static_cast<int>(cudaErrorLaunchFailure)};
  CHECK(ends_of(broken, binds)[2] == by_cuda);
  CHECK(ends_of(broken, runs)[2] == by_cuda);
}

TEST_CASE("comm/device_exchange: counts of another epoch, and counts that cannot be summed") {
  constexpr int R = 2;
  std::vector<outcome> ends(R);
  auto const bind_each = [&](auto const& plan_of, auto const& rows_of_rank) {
    moe_test::aborts_untold const untold;
    on_ranks(R, [&](nccl_communicator& comm, owner const&) {
      int const r = comm.rank();
      exchange_plan const plan = plan_of(r);
      moe::bound_plan sizes(plan);
      device_exchange exchange(stream_executor(comm.stream()), comm);
      ends[at(r)] = bind_now(exchange, sizes, rows_of_rank(r));
      bool const neither = !sizes.is_bound() && comm.native() == nullptr;
      CHECK(neither);
    });
  };
  bind_each(
      [](int r) {
        return moe::make_plan(
            moe::flat{},
            topology::even(1, R).surviving({.epoch = r == 0 ? 3u : 4u, .alive = {1, 1}}), r);
      },
      [](int) { return std::vector<std::int64_t>(R, 1); });
  CHECK(ends[0] == outcome{exchange_status::stale, 1});
  CHECK(ends[1] == outcome{exchange_status::stale, 0});
  // Back to the sharded strategy's ranks, which say differently how many rows rank 0 has.
  bind_each([](int r) { return transpose(moe::make_sharded_plan(topology::even(1, R), r)); },
            [](int r) { return std::vector<std::int64_t>{1 + r, 2 + r}; });
  CHECK(ends[0].status == exchange_status::wrong_length);
  CHECK(ends[1].status == exchange_status::wrong_length);
}

TEST_CASE("comm/device_exchange: broken preconditions, and launches that fail") {
  using moe_test::refusal;
  using moe_test::says;
  auto const plan = moe::make_plan(moe::flat{}, topology::even(1, 1), 0);
  auto const other = moe::make_plan(moe::flat{}, topology::even(1, 2), 1);
  std::vector<std::string> texts;
  bool has_thrown = false, is_over = false;
  on_ranks(1, [&](nccl_communicator& comm, owner const& mine) {
    stream_executor exec(comm.stream());
    device_exchange exchange(exec, comm);
    moe::bound_plan none, sizes(plan), of_other(other);
    std::vector<float> in(6), out(6);
    moe::buffer const scratch(1024);
    auto const try_run = [&](moe::bound_plan const& p, matrix_view<float const> from,
                             matrix_view<float> to, moe::memory room) {
      texts.push_back(refusal([&] { (void)exchange.run<float>(p, from, to, room, late()); }));
    };
    auto const try_bind = [&](moe::bound_plan& p, std::vector<std::int64_t> const& rows,
                              moe::memory room) {
      texts.push_back(refusal([&] { (void)exchange.bind(p, rows, room, late()); }));
    };
    try_run(none, {}, {}, scratch);
    try_run(of_other, {}, {}, scratch);
    try_run(sizes, {in, 2, 3}, {out, 2, 3}, scratch);
    try_bind(sizes, {1, 2}, scratch);
    try_bind(sizes, {-1}, scratch);
    try_bind(sizes, {1}, {});
    sizes.bind_equal(2);
    try_run(sizes, {in, 1, 3}, {out, 2, 3}, scratch);
    try_run(sizes, {in, 2, 3}, {out, 1, 3}, scratch);
    try_run(sizes, {in, 2, 3}, {in, 2, 3}, scratch);
    try_run(sizes, {in, 2, 2}, {out.data(), 2, 2, 3}, scratch);
    // Tokens, which are selected on the host alone.
    auto const tokens_plan = moe::make_token_plan(moe::flat{}, topology::even(1, 1), 0);
    moe::bound_plan tokens(tokens_plan);
    try_bind(tokens, {1}, scratch);
    cudaStream_t elsewhere = nullptr;
    static_cast<void>(cudaStreamCreate(&elsewhere));
    device_exchange stray(stream_executor(elsewhere), comm);
    texts.push_back(
        refusal([&] { (void)stray.run<float>(sizes, {in, 2, 3}, {out, 2, 3}, scratch, late()); }));
    static_cast<void>(cudaStreamDestroy(elsewhere));
    CHECK(comm.native() != nullptr);  // nothing has happened

    exec.refuses = true;
    auto const sums_plan = [&] {
      exchange_plan p = plan;
      p.last.push_back({{0, 0}, {1, 0}, 1, moe::row_action::add});
      return p;
    }();
    moe::bound_plan sums(sums_plan);
    sums.bind_equal(2);
    device_exchange refused(exec, comm);
    try {
      (void)refused.run<float>(sums, {in, 2, 3}, {out, 2, 3}, scratch, late());
    } catch (std::runtime_error const&) {
      has_thrown = true;
    }
    is_over = comm.native() == nullptr;
    static_cast<void>(cudaStreamSynchronize(mine.stream()));  // of the copies before it
    mine.end(comm);
  });
  CHECK(has_thrown);
  CHECK(is_over);
  char const* const expected[] = {
      "device_exchange: the plan is of the communicator's rank; got plan.rank = -1",
      "device_exchange: the plan is of the communicator's rank; got plan.rank = 1",
      "device_exchange::run: bound to counts",
      "bind: one count for each input slot; got counts = 2, input slots = 1",
      "bind: counts >= 0; got count = -1",
      "device_exchange::bind: scratch >= bind_scratch(plan); got bytes needed = 32",
      "in is [input_rows(), M], out [output_rows() or more, M]; got in.rows() = 1",
      "got in.rows() = 2, input_rows() = 2, out.rows() = 1, output_rows() = 2",
      "device_exchange::run: contiguous rows, in and out apart",
      "device_exchange::run: contiguous rows, in and out apart",
      "bound_plan::bind_equal: the plan selects no tokens",
      "device_exchange: the executor is of the communicator's stream"};
  REQUIRE(texts.size() == std::size(expected));
  for (std::size_t i = 0; i < texts.size(); ++i) says(texts[i], expected[i]);
}
