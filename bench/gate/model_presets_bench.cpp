// The gates of five published models at E = 256 on one core, each against the plain loop that its formula
// is in C++: std::exp, std::sort of the groups, std::partial_sort of the ids.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/model_presets.hpp>
#include <moe/gate/route.hpp>

namespace {

constexpr int E = 256;

/// A router in the words of the loop.
struct formula {
  enum { softmax, sigmoid, root_of_softplus, logits } score = softmax;
  int groups = 1, kept = 1, best = 1;
  bool divide = false, exponential = false;  ///< exponential: weights are a softmax of the chosen.
  float factor = 1;
  float const* bias = nullptr;  ///< Of selection; of the logits if these are the scores.
};

struct problem {
  std::int64_t T;
  std::vector<float> logits, bias;

  explicit problem(std::int64_t tokens) : T(tokens) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < T * E; ++i) logits.push_back(normal(bits));
    for (int e = 0; e < E; ++e) bias.push_back(0.1f * normal(bits));
  }
  moe::matrix_view<float const> view() const { return {logits.data(), T, E}; }
};

void plain_loop(formula const& f, problem const& p, int K, moe::routing& out) {
  std::vector<float> s(E), key(E), own, of_group(static_cast<std::size_t>(f.groups));
  std::vector<int> ids(E), order(of_group.size());
  auto const at = [](auto& v, int i) -> auto& { return v[static_cast<std::size_t>(i)]; };
  for (std::int64_t t = 0; t < p.T; ++t) {
    float const* const l = p.logits.data() + t * E;
    float const highest = *std::max_element(l, l + E);
    float total = 0;
    for (int e = 0; e < E; ++e) {
      switch (f.score) {
        case formula::softmax:
          total += at(s, e) = std::exp(l[e] - highest);
          break;
        case formula::sigmoid:
          at(s, e) = 1 / (1 + std::exp(-l[e]));
          break;
        case formula::root_of_softplus:
          at(s, e) = std::sqrt(std::log1p(std::exp(l[e])));
          break;
        case formula::logits:
          at(s, e) = l[e];
      }
    }
    if (f.score == formula::softmax)
      for (float& v : s) v /= total;
    for (int e = 0; e < E; ++e) at(key, e) = at(s, e) + (f.bias == nullptr ? 0 : f.bias[e]);
    if (f.exponential) s = key;  // the bias of a router's logits weighs, too
    if (f.kept < f.groups) {
      int const n = E / f.groups;
      for (int g = 0; g < f.groups; ++g) {
        own.assign(key.begin() + g * n, key.begin() + (g + 1) * n);
        std::partial_sort(own.begin(), own.begin() + f.best, own.end(), std::greater<>());
        at(of_group, g) = std::accumulate(own.begin(), own.begin() + f.best, 0.0f);
      }
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int a, int b) { return at(of_group, a) > at(of_group, b); });
      for (int i = f.kept; i < f.groups; ++i)
        std::fill_n(key.begin() + at(order, i) * n, n, -INFINITY);
    }
    std::iota(ids.begin(), ids.end(), 0);
    std::partial_sort(ids.begin(), ids.begin() + K, ids.end(), [&](int a, int b) {
      return at(key, a) > at(key, b) || (at(key, a) == at(key, b) && a < b);
    });
    float sum = 0;
    for (int j = 0; j < K; ++j) {
      float w = at(s, at(ids, j));
      if (f.exponential) w = std::exp(w - at(s, ids[0]));
      out.expert[t * K + j] = at(ids, j);
      out.weight[t * K + j] = w;
      sum += w;
    }
    for (int j = 0; j < K; ++j) out.weight[t * K + j] *= f.divide ? f.factor / sum : f.factor;
  }
}

void measure(benchmark::State& state, auto const& run, std::int64_t T) {
  for (auto _ : state) {
    run();
    benchmark::ClobberMemory();
  }
  state.counters["ns/token"] =
      benchmark::Counter(static_cast<double>(state.iterations() * T) * 1e-9,
                         benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

/// @param make  make(bias, formula&): the preset, and its formula.
template <class Make>
void compare(benchmark::State& state, Make const& make, bool plain) {
  problem const p(state.range(0));
  formula f;
  auto const preset = make(p.bias.data(), f);
  int const K = preset.gate.k();
  moe::cpu const exec;
  moe::routing_buffer out(p.T, K, E), expected(p.T, K, E);
  moe::buffer const scratch(moe::route_scratch<decltype(preset.gate)>(exec, E));
  auto const route = [&] { moe::route(exec, preset.gate, p.view(), {}, scratch, out); };
  route();
  plain_loop(f, p, K, expected);
  std::int64_t other = 0;  // a tie within the rounding of exp may fall otherwise
  for (std::int64_t i = 0; i < p.T * K; ++i) {
    if (out.expert[i] != expected.expert[i])
      ++other;
    else if (std::abs(out.weight[i] - expected.weight[i]) > 1e-5f * (1 + expected.weight[i]))
      return state.SkipWithError("a weight differs from the plain loop's");
  }
  if (other > p.T * K / 1000) return state.SkipWithError("experts differ from the plain loop's");
  if (plain)
    measure(state, [&] { plain_loop(f, p, K, expected); }, p.T);
  else
    measure(state, route, p.T);
}

auto qwen3_moe(float const*, formula& f) {
  f.divide = true;
  return moe::qwen3_moe();
}
auto deepseek_v2(float const*, formula& f) {
  f.groups = 8;
  f.kept = 3;
  f.factor = 16;
  return moe::deepseek_v2();
}
auto deepseek_v3(float const* bias, formula& f) {
  f = {formula::sigmoid, 8, 4, 2, true, false, 2.5f, bias};
  return moe::deepseek_v3({.e_score_correction_bias = bias});
}
auto deepseek_v4(float const* bias, formula& f) {
  f = {formula::root_of_softplus, 1, 1, 1, true, false, 1.5f, bias};
  return moe::deepseek_v4({.e_score_correction_bias = bias});
}
auto gpt_oss(float const* bias, formula& f) {
  f = {formula::logits, 1, 1, 1, true, true, 1, bias};
  return moe::gpt_oss({.router_bias = bias});
}

#define MOE_BENCH_PRESET(name)                        \
  BENCHMARK_CAPTURE(compare, name, name, false)       \
      ->Name("model_presets/" #name)                  \
      ->ArgNames({"T"})                               \
      ->Arg(4096)                                     \
      ->Unit(benchmark::kMicrosecond);                \
  BENCHMARK_CAPTURE(compare, name##_loop, name, true) \
      ->Name("model_presets/" #name "/plain_loop")    \
      ->ArgNames({"T"})                               \
      ->Arg(4096)                                     \
      ->Unit(benchmark::kMicrosecond)

MOE_BENCH_PRESET(qwen3_moe);
MOE_BENCH_PRESET(deepseek_v2);
MOE_BENCH_PRESET(deepseek_v3);
MOE_BENCH_PRESET(deepseek_v4);
MOE_BENCH_PRESET(gpt_oss);

}  // namespace
