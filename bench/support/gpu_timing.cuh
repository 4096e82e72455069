// Times kernels by events around replays of a graph, in buffers that the caches have forgotten, beside a copy.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <functional>
#include <map>

#include <moe/core/gpu.cuh>
#include <moe/dispatch/detail/chunk.hpp>

namespace moe_bench {

inline void check(cudaError_t code) {
  moe::detail::check_cuda(code, "benchmark", moe::call_site::here());
}

inline std::size_t l2_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device));
  return static_cast<std::size_t>(bytes);
}

/// As many sets of buffers, `bytes` each, as it takes for the second-level cache to have forgotten a set
/// when its turn comes again.
inline int sets_past_cache(std::size_t bytes) {
  std::size_t const wanted = 2 * l2_bytes() / std::max<std::size_t>(1, bytes) + 2;
  return static_cast<int>(std::min<std::size_t>(wanted, 2048));
}

/// A stream with an event before and one after what is timed.
class gpu_clock {
 public:
  gpu_clock() {
    check(cudaStreamCreate(&stream_));
    check(cudaEventCreate(&start_));
    check(cudaEventCreate(&stop_));
  }
  gpu_clock(gpu_clock const&) = delete;
  ~gpu_clock() {
    static_cast<void>(cudaEventDestroy(stop_));
    static_cast<void>(cudaEventDestroy(start_));
    static_cast<void>(cudaStreamDestroy(stream_));
  }

  cudaStream_t stream() const { return stream_; }
  /// Of what enqueue() puts on the stream.
  template <class F>
  double seconds(F const& enqueue) const {
    check(cudaEventRecord(start_, stream_));
    enqueue();
    check(cudaEventRecord(stop_, stream_));
    check(cudaEventSynchronize(stop_));
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return 1e-3 * static_cast<double>(milliseconds);
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr, stop_ = nullptr;
};

/// Calls enqueue(exec, i) for i in [0, calls), captured once in a graph and replayed at will.
class replay {
 public:
  replay(int calls, std::function<void(moe::gpu const&, int)> const& enqueue) : calls_(calls) {
    cudaGraph_t graph = nullptr;
    moe::gpu const exec(clock_.stream());
    check(cudaStreamBeginCapture(clock_.stream(), cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < calls; ++i) enqueue(exec, i);
    check(cudaStreamEndCapture(clock_.stream(), &graph));
    check(cudaGraphInstantiate(&graph_, graph, 0));
    check(cudaGraphDestroy(graph));
  }
  replay(replay const&) = delete;
  ~replay() { static_cast<void>(cudaGraphExecDestroy(graph_)); }

  int calls() const { return calls_; }
  /// For all calls.
  double seconds() const {
    return clock_.seconds([&] { check(cudaGraphLaunch(graph_, clock_.stream())); });
  }

 private:
  int calls_;
  gpu_clock clock_;
  cudaGraphExec_t graph_ = nullptr;
};

/// to[i] = from[i], 16 bytes at a time, 4 of them on their way for each thread.
struct copy_kernel {
  static constexpr int threads = 256;
  static constexpr int depth = 4;
  struct shared {};
  using vector = moe::detail::chunk<float, 4>;

  static std::int64_t blocks(std::int64_t vectors) {
    return (vectors + threads * depth - 1) / (threads * depth);
  }

  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, float const* from, float* to, std::int64_t vectors,
                                  bool streaming) const {
    b.wait_for_previous();
    b.let_next_start();
    std::int64_t const first = std::int64_t(b.block()) * threads * depth + b.thread();
    vector x[depth];
    MOE_UNROLL
    for (int d = 0; d < depth; ++d) {
      std::int64_t const i = first + d * threads;
      x[d] = moe::detail::load_once<vector>(from + 4 * (i < vectors ? i : vectors - 1));
    }
    MOE_UNROLL
    for (int d = 0; d < depth; ++d)
      if (std::int64_t const i = first + d * threads; i < vectors)
        moe::detail::store(to + 4 * i, x[d], streaming);
  }
};

/// Seconds that a copy takes which reads half of the bytes and writes the other half: the faster of
/// copy_kernel and cudaMemcpyAsync, timed as `time_on_gpu` does, once for each size.
inline double copy_seconds(std::size_t bytes) {
  static std::map<std::size_t, double> known;
  auto const [place, is_new] = known.emplace(bytes, 0);
  if (!is_new) return place->second;
  std::size_t const half = std::max<std::size_t>(bytes / 2 / 16, 1) * 16;
  int const sets = sets_past_cache(2 * half);
  moe::gpu_buffer const memory(2 * half * static_cast<std::size_t>(sets));
  check(cudaMemset(memory.data(), 0x3f, memory.size()));
  auto const at = [&](int set, int part) {
    return static_cast<float*>(memory.data()) +
           (2 * static_cast<std::size_t>(set) + static_cast<std::size_t>(part)) * half / 4;
  };
  auto const vectors = static_cast<std::int64_t>(half / 16);
  bool const streaming = half > l2_bytes();
  replay const by_kernel(sets, [&](moe::gpu const& exec, int i) {
    exec.launch("copy", copy_kernel{}, copy_kernel::blocks(vectors), moe::call_site::here(),
                static_cast<float const*>(at(i, 0)), at(i, 1), vectors, streaming);
  });
  replay const by_runtime(sets, [&](moe::gpu const& exec, int i) {
    check(cudaMemcpyAsync(at(i, 1), at(i, 0), half, cudaMemcpyDeviceToDevice, exec.stream()));
  });
  double best = 1e9;
  for (int round = 0; round < 12; ++round)
    best = std::min({best, by_kernel.seconds(), by_runtime.seconds()});
  return place->second = best / sets;
}

/// Bytes per second of a copy of 2 GiB, of which half is read.
inline double copy_bandwidth() {
  constexpr std::size_t bytes = std::size_t{2} << 30;
  return static_cast<double>(bytes) / copy_seconds(bytes);
}

/// Repeats seconds(), each time that of `calls` calls, until the benchmark is done, and reports what it
/// means for as many bytes as a call has to read and write: bytes/s, the percentage of the bandwidth of a large
/// copy, that of the speed of a copy of as many bytes, and the microseconds that the bytes take at full
/// bandwidth.
template <class F>
void measure(benchmark::State& state, int calls, double bytes, F const& seconds) {
  for (int warm = 0; warm < 3; ++warm) seconds();
  double total = 0;
  std::int64_t timed = 0;
  while (state.KeepRunningBatch(calls)) {
    double const took = seconds();
    state.SetIterationTime(took);
    total += took;
    timed += calls;
  }
  double const each = total / static_cast<double>(timed);
  state.counters["bytes/s"] = bytes / each;
  state.counters["%bandwidth"] = 100 * bytes / each / copy_bandwidth();
  state.counters["%copy"] = 100 * copy_seconds(static_cast<std::size_t>(bytes)) / each;
  state.counters["floor_us"] = 1e6 * bytes / copy_bandwidth();
}

/// Times enqueue(exec, set) with sets in turn, as a graph; the time of an iteration is that of one call.
/// With UseManualTime.
inline void time_on_gpu(benchmark::State& state, int sets, double bytes,
                        std::function<void(moe::gpu const&, int)> const& enqueue) {
  // Short calls many times, so that an event's microsecond does not count.
  int const rounds = std::max(1, 64 / sets);
  replay const graph(sets * rounds, [&](moe::gpu const& exec, int i) { enqueue(exec, i % sets); });
  measure(state, graph.calls(), bytes, [&] { return graph.seconds(); });
}

/// The same without a graph, for what cannot be captured: launches by the host count.
inline void time_eagerly(benchmark::State& state, int sets, double bytes,
                         std::function<void(moe::gpu const&, int)> const& enqueue) {
  gpu_clock const clock;
  moe::gpu const exec(clock.stream());
  measure(state, sets, bytes, [&] {
    return clock.seconds([&] {
      for (int i = 0; i < sets; ++i) enqueue(exec, i);
    });
  });
}

}  // namespace moe_bench
