// A layer of random values and the roof it is measured against, for the benchmarks of expert/.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/expert/detail/simd.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/routing/build_table.hpp>

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

/// Parameters and gradients of E experts: made once, for all cases of that shape.
inline std::pair<float*, float*> arrays_of(moe::ffn_shape const& shape) {
  static std::map<std::int64_t, std::pair<std::vector<float>, std::vector<float>>> made;
  auto& [parameters, gradients] = made[shape.P * 1000003 + shape.M * 1009 + shape.H];
  if (parameters.empty()) {
    parameters = random_floats(moe::ffn_elements<float>(shape, true, false), 1);
    gradients.resize(parameters.size());
  }
  return {parameters.data(), gradients.data()};
}

inline double seconds(auto&& f) {
  auto const start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// FLOP/s of independent multiply-adds in registers on all threads: the median of some tries.
inline double fma_roof(moe::cpu const& exec) {
  namespace gemm = moe::MOE_ABI::detail::gemm;
  using vector = gemm::simd<float>;
  constexpr int sums = 12, steps = 200000;
  std::vector<float> sink(static_cast<std::size_t>(exec.threads()));
  std::vector<double> tries;
  for (int i = 0; i < 9; ++i) {
    double const time = seconds([&] {
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
    });
    tries.push_back(2.0 * sums * steps * gemm::lanes<float> * exec.threads() / time);
  }
  std::sort(tries.begin(), tries.end());
  return tries[tries.size() / 2];
}

/// T tokens that chose K of E experts at random, packed.
struct layer_case {
  std::int64_t T, M, H;
  int K, E;
  moe::routing_buffer routing;
  moe::table_buffer table;
  std::vector<float> tokens, dout;
  moe::ffn_weights<float> weights, dweights;

  layer_case(std::int64_t tokens_count, int experts, int choices, std::int64_t width,
             std::int64_t hidden)
      : T(tokens_count),
        M(width),
        H(hidden),
        K(choices),
        E(experts),
        routing(T, K, E),
        table(shape()),
        tokens(random_floats(T * M, 2)),
        dout(random_floats(T * M, 3)),
        weights(moe::carve_ffn(arrays_of({E, M, H}).first, {E, M, H}, true, false)),
        dweights(moe::carve_ffn(arrays_of({E, M, H}).second, {E, M, H}, true, false)) {
    std::mt19937 random(4);
    std::vector<std::int32_t> ids(static_cast<std::size_t>(E));
    for (int e = 0; e < E; ++e) ids[static_cast<std::size_t>(e)] = e;
    for (std::int64_t t = 0; t < T; ++t) {
      std::shuffle(ids.begin(), ids.end(), random);
      std::copy_n(ids.begin(), K, routing.expert + t * K);
      std::fill_n(routing.weight + t * K, K, 1.0f / static_cast<float>(K));
    }
    moe::buffer const scratch(moe::build_table_scratch(moe::cpu{}, shape()));
    moe::build_table(moe::cpu{}, routing, {}, scratch, table);
  }
  moe::table_shape shape() const {
    moe::table_shape s{.T = T, .K = K, .E = E};
    s.max_rows = moe::max_rows({}, s);
    return s;
  }
  moe::vector_view<float const> weight() const { return {routing.weight, T * K}; }
};

}  // namespace moe_bench
