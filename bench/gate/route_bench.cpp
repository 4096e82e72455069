// Route and its gradient against the obvious scalar gate and against the roof of softmax: one
// vectorised exp for each logit, timed in the same run.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <moe/core/execution.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using top = moe::top_k<16>;
using mixtral = moe::gate<moe::softmax, top, moe::renormalised>;
using olmoe = moe::gate<moe::softmax, top, moe::as_scored>;
using gpt_oss = moe::gate<moe::identity, top, moe::softmax_of_selected>;
using sampling = moe::gate<moe::softmax, moe::sampled<top>, moe::renormalised>;

struct problem {
  std::int64_t T;
  int E, K;
  std::vector<float> logits;

  explicit problem(benchmark::State const& state)
      : T(state.range(0)),
        E(static_cast<int>(state.range(1))),
        K(static_cast<int>(state.range(2))),
        logits(static_cast<std::size_t>(T * E)) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    for (float& l : logits) l = normal(bits);
  }
  moe::matrix_view<float const> view() const { return {logits.data(), T, E}; }
};

/// The obvious gate: softmax by std::exp, std::partial_sort of ids, weights divided by their sum.
void scalar_gate(problem const& p, moe::routing& out) {
  std::vector<float> s(static_cast<std::size_t>(p.E));
  std::vector<int> ids(static_cast<std::size_t>(p.E));
  for (std::int64_t t = 0; t < p.T; ++t) {
    float const* const l = p.logits.data() + t * p.E;
    float const highest = *std::max_element(l, l + p.E);
    float total = 0;
    for (int e = 0; e < p.E; ++e) {
      s[static_cast<std::size_t>(e)] = std::exp(l[e] - highest);
      total += s[static_cast<std::size_t>(e)];
    }
    for (float& v : s) v /= total;
    std::iota(ids.begin(), ids.end(), 0);
    std::partial_sort(ids.begin(), ids.begin() + p.K, ids.end(), [&](int a, int b) {
      float const x = s[static_cast<std::size_t>(a)], y = s[static_cast<std::size_t>(b)];
      return x > y || (x == y && a < b);
    });
    float sum = 0;
    for (int j = 0; j < p.K; ++j)
      sum += s[static_cast<std::size_t>(ids[static_cast<std::size_t>(j)])];
    for (int j = 0; j < p.K; ++j) {
      int const e = ids[static_cast<std::size_t>(j)];
      out.expert[t * p.K + j] = e;
      out.weight[t * p.K + j] = s[static_cast<std::size_t>(e)] / sum;
    }
  }
}

/// Nanoseconds for one moe::exp of each logit on one thread, the least of some tries.
double roof_ns(problem const& p) {
  std::vector<float> out(p.logits.size());
  double least = 1e30;
  for (int i = 0; i < 20; ++i) {
    auto const start = std::chrono::steady_clock::now();
    for (std::size_t n = 0; n < out.size(); ++n) out[n] = moe::exp(p.logits[n]);
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
    std::chrono::duration<double, std::nano> const took = std::chrono::steady_clock::now() - start;
    least = std::min(least, took.count());
  }
  return least;
}

/// Runs f until the benchmark is done. Counters: tokens and bytes for each second, and the percentage
/// of the time that the roof would have taken on as many threads.
template <class F>
void measure(benchmark::State& state, problem const& p, std::int64_t bytes, int threads, F&& f) {
  auto const start = std::chrono::steady_clock::now();
  for (auto _ : state) {
    f();
    benchmark::ClobberMemory();
  }
  std::chrono::duration<double, std::nano> const took = std::chrono::steady_clock::now() - start;
  double const runs = static_cast<double>(state.iterations());
  auto const rate = [runs](double amount, benchmark::Counter::OneK k) {
    return benchmark::Counter(runs * amount, benchmark::Counter::kIsRate, k);
  };
  state.counters["tokens/s"] = rate(static_cast<double>(p.T), benchmark::Counter::kIs1000);
  state.counters["bytes/s"] = rate(static_cast<double>(bytes), benchmark::Counter::kIs1024);
  state.counters["percent_of_roof"] = 100 * roof_ns(p) / threads * runs / took.count();
}

template <class Gate>
Gate with_k(int k) {
  Gate g;
  if constexpr (requires { g.select.select; })
    g.select.select = top(k);
  else
    g.select = top(k);
  return g;
}

template <class Gate>
void route(benchmark::State& state) {
  problem const p(state);
  int const threads = static_cast<int>(state.range(3));
  moe::thread_team team(threads);
  moe::cpu const exec(team);
  auto const g = with_k<Gate>(p.K);
  moe::routing_buffer out(p.T, p.K, p.E);
  moe::buffer const scratch(moe::route_scratch<Gate>(exec, p.E));
  moe::batch const tokens{.training = true};
  moe::route(exec, g, p.view(), tokens, scratch, out);
  if constexpr (std::is_same_v<Gate, mixtral>) {
    moe::routing_buffer expected(p.T, p.K, p.E);
    scalar_gate(p, expected);
    for (std::int64_t i = 0; i < p.T * p.K; ++i)
      if (out.expert[i] != expected.expert[i] ||
          std::abs(out.weight[i] - expected.weight[i]) > 1e-5f)
        return state.SkipWithError("differs from the scalar gate");
  }
  measure(state, p, p.T * (4 * p.E + 12 * p.K), threads,
          [&] { moe::route(exec, g, p.view(), tokens, scratch, out); });
}

template <class Gate>
void route_backward(benchmark::State& state) {
  problem const p(state);
  int const threads = static_cast<int>(state.range(3));
  moe::thread_team team(threads);
  moe::cpu const exec(team);
  auto const g = with_k<Gate>(p.K);
  moe::routing_buffer out(p.T, p.K, p.E);
  moe::buffer const scratch(moe::route_scratch<Gate>(exec, p.E));
  moe::route(exec, g, p.view(), moe::batch{}, scratch, out);
  std::vector<float> const dweight(static_cast<std::size_t>(p.T * p.K), 0.5f);
  std::vector<float> const dscore(static_cast<std::size_t>(p.E), 0.1f);
  std::vector<float> dlogits(p.logits.size());
  measure(state, p, p.T * (8 * p.E + 8 * p.K), threads, [&] {
    moe::route_backward(exec, g, p.view(), out, moe::matrix_view(dweight, p.T, p.K),
                        {.expert = dscore}, scratch, moe::matrix_view(dlogits, p.T, p.E));
  });
}

void baseline(benchmark::State& state) {
  problem const p(state);
  moe::routing_buffer out(p.T, p.K, p.E);
  measure(state, p, p.T * (4 * p.E + 8 * p.K), 1, [&] { scalar_gate(p, out); });
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "K", "threads"});
  for (int threads : {1, 2}) {
    b->Args({4096, 8, 2, threads});
    b->Args({4096, 64, 2, threads});
    b->Args({4096, 256, 8, threads});
  }
  b->UseRealTime()->Unit(benchmark::kMicrosecond);
}

BENCHMARK(route<mixtral>)->Name("route/softmax_renormalised")->Apply(shapes);
BENCHMARK(route<olmoe>)->Name("route/softmax")->Apply(shapes);
BENCHMARK(route<gpt_oss>)->Name("route/softmax_of_selected")->Apply(shapes);
BENCHMARK(route<sampling>)->Name("route/sampled")->Apply(shapes);
BENCHMARK(route_backward<mixtral>)->Name("route_backward/softmax_renormalised")->Apply(shapes);
BENCHMARK(baseline)
    ->Name("route/baseline_partial_sort")
    ->ArgNames({"T", "E", "K", "threads"})
    ->Args({4096, 8, 2, 1})
    ->Args({4096, 64, 2, 1})
    ->Args({4096, 256, 8, 1})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

}  // namespace
