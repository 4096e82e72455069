// A layer of SwiGLU experts, forward and backward: built-in products and, if MOE_BENCH_CBLAS is defined
// and a BLAS linked, one single-threaded BLAS call for each expert. Run as grouped_gemm_bench.
// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <moe/expert/ffn.hpp>

#include "layer_case.hpp"
#if defined(MOE_BENCH_CBLAS)
#include <moe/expert/cblas_gemm.hpp>
#endif

namespace {

/// A provider that adds up the time of its products: for the share of the stages.
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

template <class Gemm>
void run(benchmark::State& state, bool backward) {
  moe_bench::layer_case c(state.range(0), static_cast<int>(state.range(1)),
                          static_cast<int>(state.range(2)), state.range(3), state.range(4));
  moe::thread_team team(static_cast<int>(state.range(5)));
  moe::cpu const exec(team);
  moe::ffn<moe::swiglu, timed<Gemm>> const experts;
  auto const handle = experts.prepare(c.weights);
  auto const shape = c.weights.shape();
  std::int64_t const rows = c.table.max_rows;
  moe::buffer const saved(experts.template saved_bytes<float>(shape, rows));
  moe::buffer const scratch(
      std::max(experts.template forward_scratch_bytes<float>(exec, shape, rows),
               experts.template backward_scratch_bytes<float>(exec, shape, rows)));
  std::vector<float> out(c.tokens.size()), dtokens(out.size());
  std::vector<float> dweight(static_cast<std::size_t>(c.T * c.K));
  moe::matrix_view<float const> const x(c.tokens, c.T, c.M), dout(c.dout, c.T, c.M);
  moe::matrix_view<float> const y(out, c.T, c.M), dx(dtokens, c.T, c.M);
  auto const forward = [&] {
    experts.forward(exec, handle, x, c.table, c.weight(), y, saved, scratch);
  };
  forward();
  // Verify one element against the definition.
  std::int64_t const t = c.T - 1;
  double want = 0;
  for (int k = 0; k < c.K; ++k) {
    std::int64_t const e = c.routing.expert[t * c.K + k];
    for (std::int64_t h = 0; h < c.H; ++h) {
      double g = 0, u = 0;
      for (std::int64_t i = 0; i < c.M; ++i) {
        g += double(x(t, i)) * c.weights.gate[e](i, h);
        u += double(x(t, i)) * c.weights.up[e](i, h);
      }
      want += c.weight()[t * c.K + k] * moe::swiglu{}(g, u) * c.weights.down[e](h, 5);
    }
  }
  if (std::fabs(y(t, 5) - want) > 1e-3 * (1 + std::fabs(want)))
    return state.SkipWithError("wrong result");

  double const roof = moe_bench::fma_roof(exec);
  timed<Gemm>::spent = 0;
  double total = 0;
  for (auto _ : state)
    total += moe_bench::seconds([&] {
      if (backward)
        experts.backward(exec, handle, dout, x, c.table, c.weight(), saved, dx,
                         moe::vector_view<float>(dweight), c.dweights, moe::update::assign,
                         scratch);
      else
        forward();
    });
  double const flop = 2.0 * double(c.T * c.K) * 3 * double(c.M * c.H) * (backward ? 2 : 1) *
                      double(state.iterations());
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsRate);
  state.counters["of_fma_roof_%"] =
      benchmark::Counter(100 * flop / roof, benchmark::Counter::kIsRate);
  state.counters["products_%"] = 100 * timed<Gemm>::spent / total;
  state.counters["tokens/s"] =
      benchmark::Counter(double(c.T * state.iterations()), benchmark::Counter::kIsRate);
}

template <class Gemm>
void add(std::string const& name) {
  for (bool backward : {false, true}) {
    auto* const bench = benchmark::RegisterBenchmark(
        ("ffn/" + name + (backward ? "/backward" : "/forward")).c_str(), run<Gemm>, backward);
    bench->ArgNames({"T", "E", "K", "M", "H", "threads"})->UseRealTime();
    bench->Unit(benchmark::kMillisecond);
    for (std::int64_t T : {1, 32, 512})
      for (std::int64_t threads : {1, 2}) {
        bench->Args({T, 8, 2, 1024, 2816, threads});
        bench->Args({T, 64, 8, 1024, 512, threads});
      }
  }
}

int const registered = [] {
  add<moe::builtin_gemm>("builtin");
#if defined(MOE_BENCH_CBLAS)
  add<moe::cblas_gemm>("cblas");
#endif
  return 0;
}();

}  // namespace
