// All-to-all of equal blocks between the GPUs of a machine over NCCL: messages in a group, NCCL's own collective,
// and plans. Never run: there was no GPU to run it on.
// SPDX-License-Identifier: MIT
//
// A rank is a thread with a GPU. The time of a sample is that of the slowest rank's stream, for one call of
// many. bytes/s is what each GPU sends to others, as nccl-tests have it ("busbw"); on one GPU it is what it
// copies. The result is verified first.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <exception>
#include <nccl.h>
#include <string>
#include <support/nccl_owner.hpp>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/bound_plan.hpp>
#include <moe/comm/device_exchange.cuh>
#include <moe/comm/flat.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/nccl.cuh>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/core/gpu.cuh>
#include <moe/core/memory.hpp>

#include "support/gpu_timing.cuh"

namespace {

using moe_bench::check;
using moe_test::nccl_communicator;
using byte = unsigned char;

moe::deadline soon() {
  return moe::within(std::chrono::seconds(60));
}

/// One rank, which sends block d of `in` to rank d.
struct blocks {
  nccl_communicator& comm;
  std::int64_t m;  // bytes of each
  byte const* in;  // [R, m], of the device, as is `out`
  byte* out;
  moe::memory scratch;

  int R() const { return comm.size(); }
};

byte value(int source, int destination, std::int64_t place) {
  return static_cast<byte>(37 * source + 11 * destination + place % 251);
}

/// Messages in a group, one of them to itself.
class by_messages {
 public:
  explicit by_messages(blocks const& b) : comm_(&b.comm) {
    auto const bytes = static_cast<std::size_t>(b.m);
    for (int i = 0; i < b.R(); ++i) {
      sends_.push_back({reinterpret_cast<std::byte const*>(b.in + i * b.m), bytes, i});
      receives_.push_back({reinterpret_cast<std::byte*>(b.out + i * b.m), bytes, i});
    }
  }
  moe::outcome operator()() {
    return moe::exchange_now(*comm_, sends_, receives_, ticket_, soon());
  }

 private:
  nccl_communicator* comm_;
  std::vector<moe::outgoing> sends_;
  std::vector<moe::incoming> receives_;
  nccl_communicator::ticket ticket_;
};

/// ncclAlltoAll, where NCCL has it: otherwise messages, and a copy.
class by_all_to_all {
 public:
  explicit by_all_to_all(blocks const& b) : b_(b) {}
  moe::outcome operator()() {
    std::int64_t const size = b_.R() * b_.m;
    return moe::all_to_all<byte>(b_.comm, {b_.in, size}, {b_.out, size}, soon());
  }

 private:
  blocks b_;
};

/// The plan of a strategy; halves of the GPUs stand for nodes.
template <class Strategy>
class by_plan {
 public:
  explicit by_plan(blocks const& b)
      : b_(b),
        plan_(moe::make_plan(Strategy{}, moe::topology::even(1, b.R()).grouped((b.R() + 1) / 2),
                             b.comm.rank())),
        sizes_(plan_),
        exchange_(moe::gpu(b.comm.stream()), b.comm) {
    sizes_.bind_equal(1);
  }
  by_plan(by_plan const&) = delete;
  moe::outcome operator()() {
    return exchange_.template run<byte>(sizes_, {b_.in, b_.R(), b_.m}, {b_.out, b_.R(), b_.m},
                                        b_.scratch, soon());
  }

 private:
  blocks b_;
  moe::exchange_plan plan_;
  moe::bound_plan sizes_;
  moe::device_exchange<moe::gpu, nccl_communicator> exchange_;
};

/// What rank r sends, if `sends`, or gets.
std::vector<byte> pattern(int R, int r, std::int64_t m, bool sends) {
  std::vector<byte> all(static_cast<std::size_t>(R * m));
  for (int i = 0; i < R; ++i)
    for (std::int64_t place = 0; place < m; ++place)
      all[static_cast<std::size_t>(i * m + place)] =
          sends ? value(r, i, place) : value(i, r, place);
  return all;
}

constexpr int samples = 10;

/// Seconds of a call in each sample, of the slowest rank; or empty, and `wrong` says why.
template <class Way>
std::vector<double> time_ranks(int R, std::int64_t m, std::string& wrong) {
  int const calls = m <= (1 << 16) ? 100 : 10;
  ncclUniqueId id;
  if (ncclGetUniqueId(&id) != ncclSuccess) return wrong = "no id of NCCL", std::vector<double>{};
  std::vector<std::vector<double>> seconds(static_cast<std::size_t>(R));
  std::vector<std::string> failures(seconds.size());
  std::atomic<bool> all_right = true;
  std::barrier meet(R);
  moe_test::on_threads(R, [&](int r) {
    std::string& failure = failures[static_cast<std::size_t>(r)];
    try {
      check(cudaSetDevice(r));
      auto const size = static_cast<std::size_t>(R * m);
      // All memory is there before NCCL runs: an allocation may wait for kernels that wait for this rank.
      moe::gpu_buffer const in(size), out(size), scratch(3 * size + 4096);
      moe_bench::gpu_clock const clock;
      check(cudaMemcpy(in.data(), pattern(R, r, m, true).data(), size, cudaMemcpyHostToDevice));
      moe_test::owner const mine(id, R, r);
      failure = "no communicator";
      if (mine.is_ready()) {
        nccl_communicator comm(mine.handle(), clock.stream());
        Way run({comm, m, static_cast<byte const*>(in.data()), static_cast<byte*>(out.data()),
                 scratch});
        bool const ran = run() && comm.wait_for_stream(soon());
        std::vector<byte> found(size);
        if (ran) check(cudaMemcpy(found.data(), out.data(), size, cudaMemcpyDeviceToHost));
        failure = ran && found == pattern(R, r, m, false) ? "" : "wrong result";
        if (!failure.empty()) all_right = false;
        meet.arrive_and_wait();
        for (int i = 0; i < samples && all_right; ++i) {
          meet.arrive_and_wait();
          double const took = clock.seconds([&] {
            for (int call = 0; call < calls; ++call)
              if (!run()) failure = "failed while timed";
          });
          seconds[static_cast<std::size_t>(r)].push_back(took / calls);
        }
        mine.end(comm);
      }
    } catch (std::exception const& e) {
      failure = e.what();
    }
    if (!failure.empty()) all_right = false;
    meet.arrive_and_drop();  // nobody waits for a rank that is done, or has failed
  });
  for (std::string const& failure : failures)
    if (!failure.empty()) return wrong = failure, std::vector<double>{};
  std::vector<double> slowest(samples);
  for (int i = 0; i < samples; ++i)
    for (auto const& of_rank : seconds) {
      auto& most = slowest[static_cast<std::size_t>(i)];
      most = std::max(most, of_rank[static_cast<std::size_t>(i)]);
    }
  return slowest;
}

template <class Way>
void add(char const* name, int R, std::int64_t m) {
  std::string const full =
      "nccl_all_to_all/R:" + std::to_string(R) + "/m:" + std::to_string(m) + "/" + name;
  benchmark::RegisterBenchmark(full.c_str(),
                               [R, m](benchmark::State& state) {
                                 std::string wrong;
                                 auto const seconds = time_ranks<Way>(R, m, wrong);
                                 if (!wrong.empty()) return state.SkipWithError(wrong.c_str());
                                 double total = 0;
                                 std::size_t i = 0;
                                 for (auto _ : state) {
                                   state.SetIterationTime(seconds[i]);
                                   total += seconds[i++];
                                 }
                                 auto const sent =
                                     static_cast<double>(m) * std::max(1, R - 1) * samples;
                                 state.counters["bytes/s"] = sent / total;
                               })
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Iterations(samples);
}

int const registered = [] {
  int devices = 0;
  // Without a device one rank is tried, so that the program says what is missing.
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices < 1) devices = 1;
  for (std::int64_t const m : {1 << 10, 16 << 10, 256 << 10, 4 << 20, 64 << 20}) {
    add<by_messages>("messages", devices, m);
    add<by_all_to_all>("native", devices, m);
    add<by_plan<moe::flat>>("flat", devices, m);
    add<by_plan<moe::two_hop>>("two_hop", devices, m);
  }
  return 0;
}();

}  // namespace
