// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/loss/load_balance.hpp>

namespace {

struct input {
  std::vector<float> scores;
  moe::routing_buffer routing;
  moe::buffer scratch;

  input(std::int64_t T, int E, int K)
      : scores(static_cast<std::size_t>(T * E)),
        routing(T, K, E),
        scratch(moe::load_balance_scratch(T, E)) {
    for (std::size_t i = 0; i < scores.size(); ++i)
      scores[i] = static_cast<float>(i * 2654435761u % 1000) / 1000.0f / static_cast<float>(E);
    for (std::int64_t i = 0; i < T * K; ++i)
      routing.expert[i] = static_cast<std::int32_t>(i * 40503 % E);
  }
};

/// The obvious way: one column of scores after the other.
double by_columns(input const& in) {
  auto const& routing = in.routing;
  double total = 0;
  for (int e = 0; e < routing.E; ++e) {
    double me = 0, ce = 0;
    for (std::int64_t t = 0; t < routing.T; ++t) {
      me += static_cast<double>(in.scores[static_cast<std::size_t>(t * routing.E + e)]);
      ce += routing.expert[t * routing.K] == e ? 1 : 0;
    }
    total += me * ce;
  }
  double const T = static_cast<double>(routing.T);
  return routing.E * total / (T * T);
}

/// The roof: the scores are read once, by one thread. Best time of several, in seconds.
double time_to_read(input const& in) {
  double best = 1e9;
  for (int repeat = 0; repeat < 30; ++repeat) {
    auto const start = std::chrono::steady_clock::now();
    std::uint32_t lane[32] = {};
    std::uint32_t word;
    for (std::size_t i = 0; i + 32 <= in.scores.size(); i += 32)
      for (std::size_t l = 0; l < 32; ++l) {
        std::memcpy(&word, &in.scores[i + l], sizeof word);
        lane[l] ^= word;
      }
    benchmark::DoNotOptimize(lane);
    std::chrono::duration<double> const time = std::chrono::steady_clock::now() - start;
    best = std::min(best, time.count());
  }
  return best;
}

void columns(benchmark::State& state) {
  input const in(state.range(0), static_cast<int>(state.range(1)),
                 static_cast<int>(state.range(2)));
  for (auto _ : state) benchmark::DoNotOptimize(by_columns(in));
  state.SetItemsProcessed(state.iterations() * state.range(0));
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(in.scores.size() * 4));
}

void blocks(benchmark::State& state) {
  std::int64_t const T = state.range(0);
  int const E = static_cast<int>(state.range(1));
  input const in(T, E, static_cast<int>(state.range(2)));
  moe::thread_team team(static_cast<int>(state.range(3)));
  moe::cpu const exec(team);
  auto const loss = [&] {
    return moe::load_balance(exec, {in.scores, T, E}, in.routing, {}, in.scratch);
  };
  if (!(std::abs(loss() - by_columns(in)) < 1e-9)) {
    state.SkipWithError("wrong result");
    return;
  }
  double const roof = time_to_read(in);
  for (auto _ : state) benchmark::DoNotOptimize(loss());
  state.counters["percent_of_roof"] =
      benchmark::Counter(100 * roof, benchmark::Counter::kIsIterationInvariantRate);
  state.SetItemsProcessed(state.iterations() * T);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(in.scores.size() * 4));
}

BENCHMARK(columns)
    ->Name("load_balance/baseline_by_columns")
    ->ArgNames({"T", "E", "K"})
    ->Args({4096, 64, 2})
    ->Args({4096, 256, 8});
BENCHMARK(blocks)
    ->Name("load_balance")
    ->ArgNames({"T", "E", "K", "threads"})
    ->Args({4096, 64, 2, 1})
    ->Args({4096, 64, 2, 2})
    ->Args({4096, 256, 8, 1})
    ->Args({4096, 256, 8, 2})
    ->UseRealTime();

}  // namespace
