// The k best of a long row: one pass over packed keys against k searches, and against a sort of the row's
// ids as far as k.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include <moe/core/score_row.hpp>
#include <moe/core/top_k_stream.hpp>

namespace {

constexpr int max_k = 8;

struct problem {
  int T, E, K;
  std::vector<float> scores;
  std::vector<float> room;
  std::vector<int> ids;

  explicit problem(benchmark::State const& state)
      : T(static_cast<int>(state.range(0))),
        E(static_cast<int>(state.range(1))),
        K(static_cast<int>(state.range(2))),
        scores(static_cast<std::size_t>(T * E)),
        room(static_cast<std::size_t>(E)),
        ids(static_cast<std::size_t>(E)) {
    std::mt19937 bits(1);
    std::normal_distribution<float> normal;
    for (float& s : scores) s = normal(bits);
  }
  float const* row(int t) const { return scores.data() + t * E; }
};

struct packed {
  static void run(problem& p, float const* row, int* out) {
    moe::top_k_stream<max_k> best(p.K);
    best.add(row, p.E, 0);
    for (int j = 0; j < p.K; ++j) out[j] = best[j];
  }
};

/// What `top_k` does, which may destroy the row: with the copy that a gate makes for it.
struct popped {
  static void run(problem& p, float const* row, int* out) {
    std::copy_n(row, p.E, p.room.data());
    moe::array_row<float> keys(p.room.data(), p.E);
    int ids[max_k];
    keys.pop_best(p.K, ids);
    std::copy_n(ids, p.K, out);
  }
};

/// The searches destroy the row, so that they need a copy, as a gate makes it.
struct searched {
  static void run(problem& p, float const* row, int* out) {
    std::copy_n(row, p.E, p.room.data());
    moe::array_row<float> keys(p.room.data(), p.E);
    for (int j = 0; j < p.K; ++j) out[j] = keys.pop_max(0, p.E).expert;
  }
};

struct sorted {
  static void run(problem& p, float const* row, int* out) {
    std::iota(p.ids.begin(), p.ids.end(), 0);
    std::partial_sort(p.ids.begin(), p.ids.begin() + p.K, p.ids.end(),
                      [&](int a, int b) { return row[a] > row[b] || (row[a] == row[b] && a < b); });
    std::copy_n(p.ids.begin(), p.K, out);
  }
};

template <class Way>
void top_k(benchmark::State& state) {
  problem p(state);
  int out[max_k], expected[max_k];
  for (int t = 0; t < p.T; ++t) {
    Way::run(p, p.row(t), out);
    sorted::run(p, p.row(t), expected);
    if (!std::equal(out, out + p.K, expected)) return state.SkipWithError("differs from sorting");
  }
  for (auto _ : state)
    for (int t = 0; t < p.T; ++t) {
      Way::run(p, p.row(t), out);
      benchmark::DoNotOptimize(out);
    }
  state.counters["rows/s"] =
      benchmark::Counter(static_cast<double>(p.T), benchmark::Counter::kIsIterationInvariantRate);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"T", "E", "K"});
  for (int E : {8, 64, 256, 1024, 4096})
    for (int K : {1, 2, 8}) b->Args({512, E, K});
  b->Unit(benchmark::kMicrosecond);
}

BENCHMARK(top_k<packed>)->Name("top_k/packed_stream")->Apply(shapes);
BENCHMARK(top_k<popped>)->Name("top_k/row")->Apply(shapes);
BENCHMARK(top_k<searched>)->Name("top_k/searched_k_times")->Apply(shapes);
BENCHMARK(top_k<sorted>)->Name("top_k/baseline_partial_sort")->Apply(shapes);

}  // namespace
