// Whole layers, forward and backward: built-in products and, if MOE_BENCH_CBLAS is defined and a BLAS
// linked, one single-threaded BLAS call for each expert (run with OPENBLAS_NUM_THREADS=1).
// SPDX-License-Identifier: MIT
//
// dense: the obvious way, every expert applied to every token and most results thrown away; in the
// same products, so that what differs is routing alone. outside_products_%: the share of time that is
// not in the products of the experts; that of the router counts as outside. stages: a forward with a
// clock in its hooks.
#include <algorithm>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

#include "support/products.hpp"

namespace {

/// A provider that adds up the time of its products: the rest is outside of them.
template <class Gemm>
struct timed {
  static inline double spent = 0;
  template <class V>
  static std::size_t scratch_bytes(moe::cpu const& exec, int P) {
    return Gemm::template scratch_bytes<V>(exec, P);
  }
  template <class V, class... Args>
  static void forward(Args const&... args) {
    spent += moe_bench::seconds([&] { Gemm::template forward<V>(args...); });
  }
  template <class V, class... Args>
  static void input_gradient(Args const&... args) {
    spent += moe_bench::seconds([&] { Gemm::template input_gradient<V>(args...); });
  }
  template <class V, class... Args>
  static void weight_gradient(Args const&... args) {
    spent += moe_bench::seconds([&] { Gemm::template weight_gradient<V>(args...); });
  }
};

/// Parameters and gradients of E experts: made once, for all cases of that shape.
std::pair<float*, float*> arrays_of(moe::ffn_shape const& shape) {
  static std::map<std::int64_t, std::pair<std::vector<float>, std::vector<float>>> made;
  auto& [parameters, gradients] = made[shape.P * 1000003 + shape.M * 1009 + shape.H];
  if (parameters.empty()) {
    parameters = moe_bench::random_floats(moe::ffn_elements(shape, true, false), 1);
    gradients.resize(parameters.size());
  }
  return {parameters.data(), gradients.data()};
}

/// Hooks that add up the time between each other: the shares of the stages of a forward.
class stage_clock {
 public:
  void start() { last_ = clock::now(); }
  void logits(moe::matrix_view<float>) { add(0); }
  void routed(moe::basic_routing<float> const&, moe::routing_table const&,
              moe::vector_view<float const>) {
    add(1);
  }
  void rows_in(moe::matrix_view<float const>) { add(2); }
  void rows_out(moe::matrix_view<float const>) { add(3); }
  void output(moe::matrix_view<float const>) { add(4); }

  void count(benchmark::State& state) const {
    char const* const names[] = {"router_%", "gate_and_table_%", "dispatch_%", "experts_%",
                                 "combine_%"};
    double total = 0;
    for (double s : spent_) total += s;
    for (int i = 0; i < 5; ++i) state.counters[names[i]] = 100 * spent_[i] / total;
  }

 private:
  using clock = std::chrono::steady_clock;
  void add(int stage) {
    auto const now = clock::now();
    spent_[stage] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  clock::time_point last_;
  double spent_[5] = {};
};

enum class pass { forward, stages, backward, dense };

/// Hidden value h of expert e for token t by the definition.
double slow_hidden(moe::layer_weights<float> const& p, moe::matrix_view<float const> x,
                   std::int64_t t, std::int64_t e, std::int64_t h) {
  double g = 0, u = 0;
  for (std::int64_t m = 0; m < x.cols(); ++m) {
    g += double(x(t, m)) * p.experts.gate[e](m, h);
    u += double(x(t, m)) * p.experts.up[e](m, h);
  }
  return moe::swiglu{}(g, u);
}

/// Output 5 of token t, from what the router chose.
double slow_output(moe::layer_weights<float> const& p, moe::layer_saved<float> const& saved,
                   moe::matrix_view<float const> x, std::int64_t t) {
  double sum = 0;
  for (int j = 0; j < saved.routed.K; ++j) {
    std::int64_t const i = t * saved.routed.K + j, e = saved.routed.expert[i];
    for (std::int64_t h = 0; h < p.experts.shape().H; ++h)
      sum += saved.weights[i] * slow_hidden(p, x, t, e, h) * p.experts.down[e](h, 5);
  }
  return sum;
}

/// The gradient of down(7, 5) of expert e.
double slow_gradient(moe::layer_weights<float> const& p, moe::layer_saved<float> const& saved,
                     moe::matrix_view<float const> x, moe::matrix_view<float const> dout,
                     std::int64_t e) {
  double sum = 0;
  for (std::int64_t i = 0; i < x.rows() * saved.routed.K; ++i) {
    std::int64_t const t = i / saved.routed.K;
    if (saved.routed.expert[i] == e)
      sum += double(saved.weights[i]) * slow_hidden(p, x, t, e, 7) * dout(t, 5);
  }
  return sum;
}

template <class Gemm>
void run(benchmark::State& state, pass what) {
  std::int64_t const T = state.range(0), M = state.range(3), H = state.range(4);
  int const E = static_cast<int>(state.range(1)), K = static_cast<int>(state.range(2));
  moe::thread_team team(static_cast<int>(state.range(5)));
  moe::cpu const exec(team);
  moe::ffn<moe::swiglu, timed<Gemm>> const experts;
  moe::moe_layer const layer(moe::tutel_topk({.k = K, .capacity_factor = 0}), experts,
                             {.T = T, .M = M, .H = H, .E = E});
  auto const [values, gradients] = arrays_of({E, M, H});
  auto router = moe_bench::random_floats(M * E, 7), drouter = router;
  auto const carve = [&](float* of_router, float* of_experts) {
    return moe::layer_weights<float>{{of_router, M, E},
                                     moe::carve_ffn(of_experts, {E, M, H}, true, false)};
  };
  auto const parameters = carve(router.data(), values);
  auto const dparameters = carve(drouter.data(), gradients);
  auto const tokens = moe_bench::random_floats(T * M, 2),
             douts = moe_bench::random_floats(T * M, 3);
  std::vector<float> out(tokens.size()), dtokens(tokens.size());
  moe::matrix_view<float const> const x(tokens, T, M), dout(douts, T, M);
  moe::matrix_view<float> const y(out, T, M), dx(dtokens, T, M);
  moe::buffer const saved_bytes(layer.template saved_bytes<float>());
  moe::buffer const scratch(layer.template scratch_bytes<float>(exec));
  auto saved = layer.template carve_saved<float>(saved_bytes);
  auto const forward = [&] { layer.forward(exec, parameters, x, {}, y, saved, scratch); };
  auto const backward = [&] {
    layer.backward(exec, parameters, x, dout, {.balance = 0.01}, saved, dx, dparameters,
                   moe::update::assign, scratch);
  };
  auto const close = [](double got, double want) {
    return std::fabs(got - want) <= 1e-3 * (1 + std::fabs(want));
  };
  // Verified before it is timed, which also brings in the pages of all memory.
  forward();
  for (std::int64_t t : {std::int64_t{0}, T - 1})
    if (!close(y(t, 5), slow_output(parameters, saved, x, t)))
      return state.SkipWithError("wrong result");
  if (what == pass::backward) {
    backward();
    for (std::int64_t e : {0, E - 1})
      if (!close(dparameters.experts.down[e](7, 5), slow_gradient(parameters, saved, x, dout, e)))
        return state.SkipWithError("wrong gradient");
  }

  // The obvious way: all experts on all tokens, then the weighted sum.
  std::vector<float> all(what == pass::dense ? tokens.size() : 0), sums(all.size());
  moe::ffn<moe::swiglu, timed<Gemm>> const unsaved{.recompute = true};
  moe::buffer const dense_scratch(
      what == pass::dense ? unsaved.template forward_scratch_bytes<float>(exec, {1, M, H}, T) : 0);
  auto const dense = [&] {
    std::fill(sums.begin(), sums.end(), 0.0f);
    for (int e = 0; e < E; ++e) {
      moe::matrix_view<float> const rows(all, T, M);
      unsaved.forward_rows(exec, unsaved.prepare(parameters.experts.expert(e)), x, moe::all_rows(T),
                           rows, {}, dense_scratch);
      for (std::int64_t i = 0; i < T * K; ++i)
        if (saved.routed.expert[i] == e)
          for (std::int64_t m = 0; m < M; ++m)
            sums[static_cast<std::size_t>(i / K * M + m)] += saved.weights[i] * rows(i / K, m);
    }
  };
  if (what == pass::dense) {
    dense();
    for (std::size_t i = 0; i < sums.size(); ++i)
      if (!close(sums[i], out[i])) return state.SkipWithError("wrong baseline");
  }

  double const roof = moe_bench::fma_roof(exec);
  timed<Gemm>::spent = 0;
  double total = 0;
  stage_clock clock;
  for (auto _ : state)
    total += moe_bench::seconds([&] {
      if (what == pass::forward) forward();
      if (what == pass::stages) {
        clock.start();
        layer.forward(exec, parameters, x, {}, y, saved, scratch, clock);
      }
      if (what == pass::dense) dense();
      if (what == pass::backward) backward();
    });
  // Useful work, for the baseline too: experts and router.
  double const flop =
      2.0 * double(T) * double(3 * K * M * H + M * E) * (what == pass::backward ? 2 : 1);
  moe_bench::count_flop(state, flop, roof);
  state.counters["outside_products_%"] = 100 * (1 - timed<Gemm>::spent / total);
  if (what == pass::stages) clock.count(state);
  state.counters["tokens/s"] =
      benchmark::Counter(double(T * state.iterations()), benchmark::Counter::kIsRate);
  // What has to be read at least: the weights of the experts that have rows.
  int busy = 0;
  for (int e = 0; e < E; ++e) busy += saved.table.used[e] > 0;
  state.counters["weight_bytes/s"] = benchmark::Counter(
      3.0 * double(busy) * double(M * H) * sizeof(float) * double(state.iterations()),
      benchmark::Counter::kIsRate);
}

int const registered = [] {
  struct {
    char const* name;
    pass what;
  } const passes[] = {{"forward", pass::forward},
                      {"stages", pass::stages},
                      {"backward", pass::backward},
                      {"dense", pass::dense}};
  moe_bench::for_each_provider([&](std::string const& name, auto gemm) {
    for (auto const& each : passes) {
      auto* const bench = benchmark::RegisterBenchmark(
          ("moe_layer/" + name + "/" + each.name).c_str(), run<decltype(gemm)>, each.what);
      bench->ArgNames({"T", "E", "K", "M", "H", "threads"})->UseRealTime();
      bench->Unit(benchmark::kMillisecond);
      for (std::int64_t T : {1, 32, 512})
        for (std::int64_t threads : {1, 2}) {
          bench->Args({T, 8, 2, 1024, 2816, threads});
          bench->Args({T, 64, 8, 1024, 512, threads});
        }
    }
  });
  return 0;
}();

}  // namespace
