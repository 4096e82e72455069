// The three grouped products: built-in and, if MOE_BENCH_CBLAS is defined and a BLAS linked, one
// single-threaded BLAS call for each expert. Weights of all experts together do not fit caches.
// Run with --benchmark_enable_random_interleaving=true and OPENBLAS_NUM_THREADS=1.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/expert/grouped_gemm.hpp>

#include "support/products.hpp"

namespace {

enum class product { forward, input_gradient, weight_gradient };

template <class Gemm>
void run(benchmark::State& state, product which) {
  std::int64_t const m = state.range(0), K = state.range(1), N = state.range(2);
  moe::thread_team team(static_cast<int>(state.range(3)));
  moe::cpu const exec(team);
  auto const P = static_cast<int>(std::max<std::int64_t>(8, (64 << 20) / (K * N * 4)));
  std::vector<std::int32_t> begin, used(static_cast<std::size_t>(P), static_cast<std::int32_t>(m));
  for (int p = 0; p < P; ++p) begin.push_back(static_cast<std::int32_t>(p * m));
  moe::row_segments const segments(P, begin.data(), used.data());
  std::int64_t const rows = P * m;
  auto a = moe_bench::random_floats(rows * K, 1), c = moe_bench::random_floats(rows * N, 2);
  auto b = moe_bench::random_floats(P * K * N, 3);
  moe::matrix_view<float> const A(a, rows, K), C(c, rows, N);
  moe::stacked_view<float> const B(b, P, K, N);
  moe::buffer const scratch(Gemm::template scratch_bytes<float>(exec, P));
  auto const call = [&] {
    if (which == product::forward)
      Gemm::template forward<float>(exec, A, B, {}, segments, C, scratch);
    else if (which == product::input_gradient)
      Gemm::template input_gradient<float>(exec, C, B, segments, moe::update::assign, A, scratch);
    else
      Gemm::template weight_gradient<float>(exec, A, C, segments, moe::update::assign, B, scratch);
  };
  // Verify one element of the last expert.
  std::int64_t const r = rows - 1, i = K / 2, j = N / 2;
  double want = 0;
  if (which == product::forward)
    for (std::int64_t k = 0; k < K; ++k) want += double(A(r, k)) * B[P - 1](k, j);
  else if (which == product::input_gradient)
    for (std::int64_t k = 0; k < N; ++k) want += double(C(r, k)) * B[P - 1](i, k);
  else
    for (std::int64_t k = rows - m; k < rows; ++k) want += double(A(k, i)) * C(k, j);
  call();
  float const got = which == product::forward          ? C(r, j)
                    : which == product::input_gradient ? A(r, i)
                                                       : B[P - 1](i, j);
  if (std::fabs(got - want) > 1e-3) return state.SkipWithError("wrong result");

  double const roof = moe_bench::fma_roof(exec);
  for (auto _ : state) call();
  moe_bench::count_flop(state, 2.0 * double(rows * K) * double(N), roof);
}

int const registered = [] {
  moe_bench::for_each_provider([](std::string const& name, auto gemm) {
    std::pair<product, char const*> const products[] = {
        {product::forward, "forward"},
        {product::input_gradient, "input_gradient"},
        {product::weight_gradient, "weight_gradient"}};
    for (auto [which, word] : products)
      benchmark::RegisterBenchmark(("grouped_gemm/" + name + "/" + word).c_str(),
                                   run<decltype(gemm)>, which)
          ->ArgNames({"m", "in", "out", "threads"})
          ->ArgsProduct({{1, 4, 16, 64, 256}, {1024}, {512, 2816}, {1, 2}})
          ->UseRealTime()
          ->Unit(benchmark::kMillisecond);
  });
  return 0;
}();

}  // namespace
