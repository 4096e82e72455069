// What benchmarks of a GPU have in common: models, batches, routings, memory there, names.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <exception>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/routing/routing.hpp>

#include "support/gpu_timing.cuh"

namespace moe_bench {

using moe::bf16;

struct model {
  char const* name;
  int E, K;
  std::int64_t M;
};
inline constexpr model models[] = {
    {"mixtral", 8, 2, 4096}, {"deepseek_v3", 256, 8, 7168}, {"qwen3", 128, 8, 2048}};
inline constexpr std::int64_t batch_sizes[] = {1, 8, 32, 128, 512, 4096, 16384};

/// T tokens of a model, whose experts are equally popular, or the i-th with weight 1 / (i + 1).
struct batch_case {
  model of;
  std::int64_t T;
  bool zipf = false;

  std::int64_t pairs() const { return T * of.K; }
  /// "what/model/distribution/T:n".
  std::string name(char const* what) const {
    return std::string(what) + "/" + of.name + (zipf ? "/zipf" : "/uniform") +
           "/T:" + std::to_string(T);
  }
  friend bool operator==(batch_case const& a, batch_case const& b) {
    return a.of.name == b.of.name && a.T == b.T && a.zipf == b.zipf;
  }
};

/// Every model with every size of batch; popular experts with two of them.
inline std::vector<batch_case> all_cases() {
  std::vector<batch_case> all;
  for (model const& m : models) {
    for (std::int64_t const T : batch_sizes) all.push_back({m, T});
    for (std::int64_t const T : {512, 4096}) all.push_back({m, T, true});
  }
  return all;
}

/// K different experts for each token.
inline moe::routing_buffer make_routing(batch_case const& c) {
  int const E = c.of.E, K = c.of.K;
  moe::routing_buffer r(c.T, K, E);
  std::mt19937 random(1);
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<std::pair<double, std::int32_t>> key(static_cast<std::size_t>(E));
  for (std::int64_t t = 0; t < c.T; ++t) {
    // The K lowest of exponential times of these rates: a sample without replacement.
    for (int e = 0; e < E; ++e)
      key[static_cast<std::size_t>(e)] = {-std::log(1 - unit(random)) * (c.zipf ? e + 1 : 1), e};
    std::partial_sort(key.begin(), key.begin() + K, key.end());
    for (int j = 0; j < K; ++j) {
      r.expert[t * K + j] = key[static_cast<std::size_t>(j)].second;
      r.weight[t * K + j] = r.score[t * K + j] = static_cast<float>(unit(random));
    }
  }
  return r;
}

template <class V>
void upload(V* to, V const* from, std::int64_t count) {
  check(cudaMemcpy(to, from, static_cast<std::size_t>(count) * sizeof(V), cudaMemcpyHostToDevice));
}
template <class V>
void copy_on_device(V* to, V const* from, std::int64_t count) {
  check(
      cudaMemcpy(to, from, static_cast<std::size_t>(count) * sizeof(V), cudaMemcpyDeviceToDevice));
}
template <class V>
std::vector<V> download(V const* from, std::int64_t count) {
  std::vector<V> values(static_cast<std::size_t>(count));
  check(cudaMemcpy(values.data(), from, values.size() * sizeof(V), cudaMemcpyDeviceToHost));
  return values;
}

/// Random bf16 of (-scale, scale).
struct fill_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, bf16* to, std::int64_t size, float scale) const {
    b.wait_for_previous();
    for (std::int64_t i = std::int64_t(b.block()) * threads + b.thread(); i < size;
         i += std::int64_t(b.blocks()) * threads) {
      auto x = static_cast<std::uint32_t>(i) * 2654435761u;
      x ^= x >> 15;
      to[i] = static_cast<bf16>(
          scale * static_cast<float>(static_cast<std::int32_t>(x * 0x2c1b3c6du)) * 0x1p-31f);
    }
  }
};

inline void fill_at_random(moe::gpu const& exec, bf16* to, std::int64_t size, float scale = 1) {
  exec.launch("fill", fill_kernel{}, 8 * exec.processors(), moe::call_site::here(), to, size,
              scale);
}

/// The Problem that the benchmark before had, if it was made of the same key: benchmarks of one follow
/// one another.
template <class Problem, class... Key>
Problem& shared_problem(Key const&... key) {
  static std::unique_ptr<Problem> current;
  static std::unique_ptr<std::tuple<Key...>> made_of;
  if (current == nullptr || *made_of != std::tuple<Key...>(key...)) {
    current.reset();
    current = std::make_unique<Problem>(key...);
    made_of = std::make_unique<std::tuple<Key...>>(key...);
  }
  return *current;
}

/// Registers run(state), whose exceptions become the benchmark's error.
template <class F>
void add_benchmark(std::string const& name, std::int64_t T, F const& run) {
  auto const guarded = [run, T](benchmark::State& state) {
    try {
      run(state);
    } catch (std::exception const& e) {
      return state.SkipWithError(e.what());
    }
    state.counters["tokens/s"] =
        benchmark::Counter(static_cast<double>(T), benchmark::Counter::kIsIterationInvariantRate);
  };
  benchmark::RegisterBenchmark(name.c_str(), guarded)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

}  // namespace moe_bench
