// What the benchmarks of products share: values, providers, and the roof of multiply-adds.
// SPDX-License-Identifier: MIT
#pragma once

#include <benchmark/benchmark.h>
#include <cstdint>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/expert/detail/simd.hpp>
#include <moe/expert/grouped_gemm.hpp>
#if defined(MOE_BENCH_CBLAS)
#include <moe/expert/cblas_gemm.hpp>
#endif

#include "support/roof.hpp"

namespace moe_bench {

/// Values in [-0.5, 0.5), from a linear congruence: large arrays must not cost more than the benchmark.
inline std::vector<float> random_floats(std::int64_t n, std::uint32_t seed) {
  std::uint32_t state = seed * 2654435761u + 1;
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) {
    state = state * 1664525u + 1013904223u;
    v = static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
  }
  return values;
}

/// Calls f(name, provider) for the built-in products and, if MOE_BENCH_CBLAS is defined and a BLAS
/// linked, for one single-threaded BLAS call for each expert.
template <class F>
void for_each_provider(F const& f) {
  f("builtin", moe::builtin_gemm{});
#if defined(MOE_BENCH_CBLAS)
  f("cblas", moe::cblas_gemm{});
#endif
}

/// FLOP/s of independent multiply-adds in registers on all threads: the fast decile of some tries.
inline double fma_roof(moe::cpu const& exec) {
  namespace gemm = moe::MOE_ABI::detail::gemm;
  using vector = gemm::simd<float>;
  constexpr int sums = 12, steps = 200000;
  std::vector<float> sink(static_cast<std::size_t>(exec.threads()));
  std::vector<double> times;
  for (int i = 0; i < 9; ++i) {
    times.push_back(seconds([&] {
      exec.run([&](int member) {
        vector sum[sums];  // all different, or they would be computed once
        for (int k = 0; k < sums; ++k) sum[k] = vector{} + static_cast<float>(k);
        vector x = vector{} + 0.999f, y = vector{} + 0.001f;
        for (int n = 0; n < steps; ++n) {
          __asm__ volatile("" : "+x"(x));
          gemm::unroll<sums>([&](auto k) { sum[k] = sum[k] * x + y; });
        }
        for (int k = 1; k < sums; ++k) sum[0] += sum[k];
        sink[static_cast<std::size_t>(member)] = sum[0][0];
      });
    }));
  }
  return 2.0 * sums * steps * gemm::lanes<float> * exec.threads() / fast_decile(times);
}

/// Counters: FLOP/s of iterations of `flop` operations each, and what share of the roof that is.
inline void count_flop(benchmark::State& state, double flop, double roof) {
  flop *= static_cast<double>(state.iterations());
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsRate);
  state.counters["of_fma_roof_%"] =
      benchmark::Counter(100 * flop / roof, benchmark::Counter::kIsRate);
}

}  // namespace moe_bench
