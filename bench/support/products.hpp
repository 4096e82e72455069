// What the benchmarks of products share: values, providers, and the roof of multiply-adds.
// SPDX-License-Identifier: MIT
#pragma once

#include <benchmark/benchmark.h>
#include <cstdint>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/expert/grouped_gemm.hpp>
#if defined(MOE_BENCH_CBLAS)
#include <moe/expert/cblas_gemm.hpp>
#endif

#include "support/probes.hpp"
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

/// FLOP/s of independent multiply-adds in registers on all threads, with the best instructions of the
/// processor: the fast decile of some tries.
inline double fma_roof(moe::cpu const& exec) {
  auto const probe = fma_probe();
  std::vector<float> sink(static_cast<std::size_t>(exec.threads()));
  std::vector<double> times;
  for (int i = 0; i < 9; ++i)
    times.push_back(seconds([&] {
      exec.run([&](int member) { sink[static_cast<std::size_t>(member)] = probe.run(200000); });
    }));
  return 200000 * probe.flop * exec.threads() / fast_decile(times);
}

/// Counters: FLOP/s of iterations of `flop` operations each, and what share of the roof that is.
inline void count_flop(benchmark::State& state, double flop, double roof) {
  flop *= static_cast<double>(state.iterations());
  state.counters["FLOP/s"] = benchmark::Counter(flop, benchmark::Counter::kIsRate);
  state.counters["of_fma_roof_%"] =
      benchmark::Counter(100 * flop / roof, benchmark::Counter::kIsRate);
}

}  // namespace moe_bench
