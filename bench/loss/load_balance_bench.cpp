// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>
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

/// What the memory gives: the scores read once.
void read(benchmark::State& state) {
  input const in(state.range(0), static_cast<int>(state.range(1)),
                 static_cast<int>(state.range(2)));
  for (auto _ : state) {
    float lane[16] = {};
    for (std::size_t i = 0; i + 16 <= in.scores.size(); i += 16)
      for (std::size_t l = 0; l < 16; ++l) lane[l] += in.scores[i + l];
    benchmark::DoNotOptimize(lane);
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(in.scores.size() * 4));
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
  for (auto _ : state) benchmark::DoNotOptimize(loss());
  state.SetItemsProcessed(state.iterations() * T);
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(in.scores.size() * 4));
}

BENCHMARK(read)
    ->Name("load_balance/roof_read")
    ->ArgNames({"T", "E", "K"})
    ->Args({4096, 64, 2})
    ->Args({4096, 256, 8});
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
