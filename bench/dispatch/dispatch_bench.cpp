// Dispatch and combine against a copy of as many bytes, naive loops, and one-hot einsums.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/dispatch.hpp>
#include <moe/routing/build_table.hpp>

#include "one_hot.hpp"
#include "support/roof.hpp"

namespace {

struct shape {
  std::int64_t T;
  int E, K;
  std::int64_t M;
};

constexpr shape shapes[] = {{4096, 64, 2, 1024}, {4096, 64, 8, 1024}, {64, 256, 8, 4096}};

/// K different experts for each token, all equally popular.
moe::routing_buffer make_routing(shape const& s) {
  moe::routing_buffer r(s.T, s.K, s.E);
  std::mt19937 random(1);
  std::vector<std::int32_t> experts(static_cast<std::size_t>(s.E));
  std::iota(experts.begin(), experts.end(), 0);
  for (std::int64_t t = 0; t < s.T; ++t)
    for (int j = 0; j < s.K; ++j) {
      auto const e = static_cast<std::size_t>(j);
      std::swap(experts[e], experts[e + random() % (experts.size() - e)]);
      r.expert[t * s.K + j] = experts[e];
      r.weight[t * s.K + j] = std::uniform_real_distribution<float>(0, 1)(random);
    }
  return r;
}

/// Elements that start at a cache line.
template <class V>
class aligned_array {
 public:
  void resize(std::int64_t size) {
    size_ = size;
    bytes_ = moe::buffer(static_cast<std::size_t>(size) * sizeof(V));
    std::fill(begin(), end(), V{});
  }
  std::int64_t size() const { return size_; }
  V* data() const { return reinterpret_cast<V*>(bytes_.data()); }
  V* begin() const { return data(); }
  V* end() const { return data() + size_; }

 private:
  std::int64_t size_ = 0;
  moe::buffer bytes_;
};

/// Everything that dispatch, combine and their backwards touch.
template <class S>
struct problem {
  shape s;
  moe::thread_team team;
  moe::cpu exec;
  moe::routing_buffer routing;
  moe::table_rules rules;
  moe::table_shape bounds;
  moe::table_buffer table;
  moe::buffer scratch;
  aligned_array<S> token_data, row_data, out_data, drow_data;
  aligned_array<float> dweight_data;

  problem(shape const& given, int threads, moe::table_rules const& with = {})
      : s(given),
        team(threads),
        exec(threads == 1 ? moe::cpu{} : moe::cpu(team)),
        routing(make_routing(s)),
        rules(with),
        bounds(shape_of(s, rules)),
        table(bounds),
        scratch(moe::build_table_scratch(exec, bounds)) {
    build();
    token_data.resize(s.T * s.M);
    std::mt19937 random(2);
    for (S& x : token_data)
      x = static_cast<S>(std::uniform_real_distribution<float>(-1, 1)(random));
    row_data.resize(N() * s.M);
    drow_data.resize(row_data.size());
    out_data.resize(token_data.size());
    dweight_data.resize(s.T * s.K);
    moe::dispatch(exec, tokens(), table, rows());
  }

  static moe::table_shape shape_of(shape const& s, moe::table_rules const& rules) {
    moe::table_shape bounds{.T = s.T, .K = s.K, .E = s.E};
    bounds.max_rows = moe::max_rows(rules, bounds);
    return bounds;
  }
  void build() { moe::build_table(exec, routing, rules, scratch, table); }

  std::int64_t N() const { return table.counts->rows; }
  moe::matrix_view<S> tokens() { return {token_data.data(), s.T, s.M}; }
  moe::matrix_view<S> rows() { return {row_data.data(), N(), s.M}; }
  moe::matrix_view<S> drows() { return {drow_data.data(), N(), s.M}; }
  moe::matrix_view<S> out() { return {out_data.data(), s.T, s.M}; }
  moe::vector_view<float const> weight() const { return {routing.weight, s.T * s.K}; }
  moe::vector_view<float> dweight() { return {dweight_data.data(), s.T * s.K}; }
};

/// The obvious loops: one pair after the other.
template <class S>
void naive_dispatch(problem<S>& p) {
  p.exec.split(p.s.T, 8, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      for (int j = 0; j < p.s.K; ++j) {
        std::int32_t const r = p.table.row_of[t * p.s.K + j];
        if (r >= 0)
          for (std::int64_t c = 0; c < p.s.M; ++c) p.rows()(r, c) = p.tokens()(t, c);
      }
  });
}
template <class S>
void naive_combine(problem<S>& p) {
  p.exec.split(p.s.T, 8, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      for (std::int64_t c = 0; c < p.s.M; ++c) p.out()(t, c) = S{};
      for (int j = 0; j < p.s.K; ++j) {
        std::int64_t const i = t * p.s.K + j;
        std::int32_t const r = p.table.row_of[i];
        if (r >= 0)
          for (std::int64_t c = 0; c < p.s.M; ++c)
            p.out()(t, c) = static_cast<S>(static_cast<float>(p.out()(t, c)) +
                                           p.weight()[i] * static_cast<float>(p.rows()(r, c)));
      }
    }
  });
}

/// A named operation and how often it reads and writes the rows and the tokens.
template <class S>
struct operation {
  char const* name;
  int rows_read, tokens_read, rows_written, tokens_written;
  void (*run)(problem<S>&);
};

template <class S>
std::vector<operation<S>> operations() {
  using p = problem<S>;
  return {
      {"dispatch", 0, 1, 1, 0, [](p& x) { moe::dispatch(x.exec, x.tokens(), x.table, x.rows()); }},
      {"dispatch_naive", 0, 1, 1, 0, naive_dispatch<S>},
      {"dispatch_weighted", 0, 1, 1, 0,
       [](p& x) { moe::dispatch(x.exec, x.tokens(), x.table, x.weight(), x.rows()); }},
      {"combine", 1, 0, 0, 1,
       [](p& x) { moe::combine(x.exec, x.rows(), x.table, x.weight(), x.out()); }},
      {"combine_naive", 1, 0, 0, 1, naive_combine<S>},
      {"combine_add", 1, 1, 0, 1,
       [](p& x) {
         moe::combine(x.exec, x.rows(), x.table, x.weight(), x.out(), moe::update::add);
       }},
      {"dispatch_backward", 1, 0, 0, 1,
       [](p& x) { moe::dispatch_backward(x.exec, x.rows(), x.table, x.out()); }},
      {"dispatch_backward_weighted", 1, 1, 0, 1,
       [](p& x) {
         moe::dispatch_backward(x.exec, x.rows(), x.tokens(), x.table, x.weight(), x.out(),
                                x.dweight());
       }},
      {"combine_backward", 1, 1, 1, 0,
       [](p& x) {
         moe::combine_backward(x.exec, x.tokens(), x.rows(), x.table, x.weight(), x.drows(),
                               x.dweight());
       }},
  };
}

/// Combine after dispatch with weights w gives each token times its sum of weights.
template <class S>
void verify(problem<S>& p) {
  moe::dispatch(p.exec, p.tokens(), p.table, p.rows());
  moe::combine(p.exec, p.rows(), p.table, p.weight(), p.out());
  for (std::int64_t t = 0; t < p.s.T; ++t) {
    float sum = 0;
    for (int j = 0; j < p.s.K; ++j)
      if (p.table.row_of[t * p.s.K + j] >= 0) sum += p.weight()[t * p.s.K + j];
    for (std::int64_t c = 0; c < p.s.M; ++c) {
      float const expected = sum * static_cast<float>(p.tokens()(t, c));
      float const got = static_cast<float>(p.out()(t, c));
      if (!(std::abs(got - expected) <= 0.01f * (1 + std::abs(expected)))) std::abort();
    }
  }
}

template <class S>
void register_operations(char const* type) {
  for (shape const& s : shapes)
    for (int const threads : {1, 2})
      for (operation<S> const& o : operations<S>()) {
        std::string const name = std::string(o.name) + "/" + type + "/T:" + std::to_string(s.T) +
                                 "/E:" + std::to_string(s.E) + "/K:" + std::to_string(s.K) +
                                 "/M:" + std::to_string(s.M) +
                                 "/threads:" + std::to_string(threads);
        auto const run = [s, threads, o](benchmark::State& state) {
          problem<S> p(s, threads);
          verify(p);
          moe_bench::traffic const moved{.reads = o.rows_read * s.K + o.tokens_read,
                                         .writes = o.rows_written * s.K + o.tokens_written,
                                         .bytes = s.T * s.M * static_cast<std::int64_t>(sizeof(S))};
          moe_bench::run_against_copy(state, p.exec, moved, [&] { o.run(p); });
          state.counters["tokens/s"] = benchmark::Counter(
              static_cast<double>(s.T), benchmark::Counter::kIsIterationInvariantRate);
        };
        benchmark::RegisterBenchmark(name.c_str(), run)
            ->UseManualTime()
            ->Unit(benchmark::kMicrosecond)
            ->Iterations(31);
      }
}

/// Table, dispatch and combine, with the capacity of the original: every expert takes C rows.
void from_table(benchmark::State& state, shape const& s, int threads, bool one_hot) {
  std::int64_t const C = s.T * s.K / s.E;
  problem<float> p(s, threads, {.rows = moe::layout::padded, .cap = moe::capacity::fixed(C)});
  verify(p);
  std::vector<float> const expected(p.out_data.begin(), p.out_data.end());
  if (one_hot) {
    moe_bench::one_hot_movement einsum(s.T, s.E, C, s.M);
    for (auto _ : state)
      state.SetIterationTime(moe_bench::seconds([&] {
        einsum.build_masks(p.exec, p.routing);
        einsum.dispatch(p.exec, p.token_data.data(), p.row_data.data());
        einsum.combine(p.exec, p.row_data.data(), p.out_data.data());
      }));
    state.counters["flop/s"] =
        benchmark::Counter(einsum.flops(), benchmark::Counter::kIsIterationInvariantRate);
  } else {
    for (auto _ : state)
      state.SetIterationTime(moe_bench::seconds([&] {
        p.build();
        moe::dispatch(p.exec, p.tokens(), p.table, p.rows());
        moe::combine(p.exec, p.rows(), p.table, p.weight(), p.out());
      }));
  }
  for (std::size_t i = 0; i < expected.size(); ++i)
    if (!(std::abs(p.out_data.data()[i] - expected[i]) <= 1e-4f)) std::abort();
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(s.T), benchmark::Counter::kIsIterationInvariantRate);
}

int const registered = [] {
  register_operations<float>("float");
  register_operations<moe::bf16>("bf16");
  shape const s{4096, 64, 2, 1024};
  for (int const threads : {1, 2})
    for (bool const one_hot : {false, true}) {
      std::string const name = std::string("layer_movement/") + (one_hot ? "einsum" : "table") +
                               "/T:4096/E:64/K:2/M:1024/C:128/threads:" + std::to_string(threads);
      auto const run = [=](benchmark::State& state) { from_table(state, s, threads, one_hot); };
      benchmark::RegisterBenchmark(name.c_str(), run)
          ->UseManualTime()
          ->Unit(benchmark::kMillisecond)
          ->Iterations(one_hot ? 1 : 31);
    }
  return 0;
}();

}  // namespace
