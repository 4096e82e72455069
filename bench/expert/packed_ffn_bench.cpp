// Inference experts over packed weights beside `ffn` on unpacked ones: by the library's own products and,
// if MOE_BENCH_CBLAS is defined and a BLAS linked, by a task for each expert of a single-threaded BLAS
// (run with OPENBLAS_NUM_THREADS=1). In each round all of them run, and the probes of the roofs.
// SPDX-License-Identifier: MIT
//
// Counters, of medians: FLOP/s; of_fma_roof_%; of_read_roof_%, bytes of the weights that are used per
// second against reading memory; over_cblas and over_unpacked, their time over that of
// packed; cblas_FLOP/s; clean_%, samples that count.
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_ffn.hpp>
#include <moe/routing/build_table.hpp>

#include "support/products.hpp"
#include "support/rounds.hpp"

namespace {

/// Of outputs, relative, against float weights.
template <class W>
constexpr double tolerance = std::same_as<W, float>              ? 1e-5
                             : std::same_as<W, moe::int4_blocks> ? 0.2
                                                                 : 0.02;

/// How often experts are chosen.
enum class law { uniform, zipf };

/// Weights of E experts, row-major and packed as W.
template <class W>
struct model {
  moe::ffn_shape shape;
  std::vector<float> values;
  moe::ffn_weights<float> weights;
  moe::buffer bytes;
  moe::packed_weights<W> packed;

  explicit model(moe::cpu const& exec, moe::ffn_shape const& s)
      : shape(s),
        values(moe_bench::random_floats(moe::ffn_elements(s, true, false), 1)),
        weights(moe::carve_ffn(values.data(), s, true, false)),
        bytes(moe::packed_bytes<W>(s, true)),
        packed(bytes.data(), bytes.size(), s, true) {
    for (float& v : values) v *= 0.1f;
    moe::pack(exec, weights, moe::orientation::in_out, packed);
  }
};

/// One batch: which experts its tokens go to.
struct batch {
  moe::basic_routing_buffer<float> routing;
  moe::table_buffer table;
  std::int64_t active = 0;  ///< experts with rows

  static moe::table_shape bounds(std::int64_t T, int K, int E) {
    moe::table_shape s{.T = T, .K = K, .E = E};
    s.max_rows = moe::max_rows({}, s);
    return s;
  }
  batch(moe::cpu const& exec, std::int64_t T, int K, int E, law how, std::uint32_t seed)
      : routing(T, K, E), table(bounds(T, K, E)) {
    auto const random = moe_bench::random_floats(T * K * 64, seed);
    std::vector<double> until(static_cast<std::size_t>(E));
    double sum = 0;
    for (int e = 0; e < E; ++e)
      until[static_cast<std::size_t>(e)] = sum += how == law::zipf ? std::pow(e + 1, -1.5) : 1.0;
    std::size_t next = 0;
    for (std::int64_t t = 0; t < T; ++t)
      for (int j = 0; j < K;) {
        double const x = (random[next++ % random.size()] + 0.5) * sum;
        auto const e = std::min<std::ptrdiff_t>(
            std::upper_bound(until.begin(), until.end(), x) - until.begin(), E - 1);
        auto const* const chosen = routing.expert + t * K;
        if (std::find(chosen, chosen + j, e) != chosen + j) continue;
        routing.expert[t * K + j] = static_cast<std::int32_t>(e);
        routing.weight[t * K + j++] = 1.0f / static_cast<float>(K);
      }
    moe::buffer const scratch(moe::build_table_scratch(exec, bounds(T, K, E)));
    moe::build_table(exec, routing, {}, {}, scratch, table);
    for (int e = 0; e < E; ++e) active += table.used[e] > 0;
  }
};

/// Everything that one forward of tokens of S needs; `run` is one.
template <class S, class Experts, class Handle>
struct runner {
  Experts experts;
  Handle handle;
  moe::buffer scratch;
  std::vector<S> out;

  runner(moe::cpu const& exec, Experts const& e, Handle const& h, moe::ffn_shape const& shape,
         std::int64_t T, std::int64_t rows)
      : experts(e),
        handle(h),
        scratch(e.template forward_scratch_bytes<S>(exec, shape, rows)),
        out(static_cast<std::size_t>(T * shape.M)) {}
  void run(moe::cpu const& exec, batch const& b, std::vector<S> const& x) {
    std::int64_t const T = b.table.T, M = static_cast<std::int64_t>(out.size()) / T;
    experts.template forward<S>(exec, handle, moe::matrix_view<S const>(x, T, M), b.table,
                                moe::vector_view<float const>(b.routing.weight, T * b.table.K),
                                moe::matrix_view<S>(out, T, M), moe::memory(), scratch);
  }
};
template <class S, class Experts, class Handle>
runner<S, Experts, Handle> make_runner(moe::cpu const& exec, Experts const& experts,
                                       Handle const& handle, moe::ffn_shape const& shape,
                                       std::int64_t T, std::int64_t rows) {
  return {exec, experts, handle, shape, T, rows};
}

template <class W, class Rows = moe::default_rows<W>, class S = float>
void run(benchmark::State& state, law how) {
  std::int64_t const T = state.range(4);
  auto const E = static_cast<int>(state.range(0)), K = static_cast<int>(state.range(1));
  moe::ffn_shape const shape{E, state.range(2), state.range(3)};
  auto const threads = static_cast<int>(state.range(5));
  moe::thread_team team(threads);
  moe::cpu const exec(team);
  // One model at a time: the largest takes gigabytes.
  static std::unique_ptr<model<W>> kept;
  if (!kept || !(kept->shape == shape)) {
    kept.reset();
    kept = std::make_unique<model<W>>(exec, shape);
  }
  std::vector<std::unique_ptr<batch>> batches;  // other experts each time, as in decoding
  for (std::uint32_t i = 0; i < (T < 32 ? 8 : 1); ++i)
    batches.push_back(std::make_unique<batch>(exec, T, K, E, how, i + 1));
  auto const x = moe_bench::random_floats(T * shape.M, 2);
  std::vector<S> tokens(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) tokens[i] = static_cast<S>(x[i]);

  std::int64_t const rows = T * K;
  moe::packed_ffn<moe::swiglu, W, moe::best_set, Rows> const packed{};
  auto own = make_runner<S>(exec, packed, packed.prepare(kept->packed), shape, T, rows);
  moe::ffn<moe::swiglu> const plain{.recompute = true};
  auto unpacked = make_runner<float>(exec, plain, plain.prepare(kept->weights), shape, T, rows);
#if defined(MOE_BENCH_CBLAS)
  moe::ffn<moe::swiglu, moe::cblas_gemm> const blas{.recompute = true};
  auto by_cblas = make_runner<float>(exec, blas, blas.prepare(kept->weights), shape, T, rows);
#endif
  own.run(exec, *batches[0], tokens);
  unpacked.run(exec, *batches[0], x);
  double norm = 0, off = 0;
  for (std::size_t i = 0; i < own.out.size(); ++i) {
    norm += double(unpacked.out[i]) * unpacked.out[i];
    off += std::pow(static_cast<float>(own.out[i]) - double(unpacked.out[i]), 2);
  }
  if (!(std::sqrt(off / norm) < tolerance<W>)) return state.SkipWithError("wrong result");

  moe_bench::samples own_times(threads), unpacked_times(threads), blas_times(threads),
      fma_times(threads), read_times(threads);
  auto const probe = moe_bench::fma_probe();
  std::vector<float> const memory(std::size_t{64} << 20, 1.0f);
  std::vector<float> sink(static_cast<std::size_t>(threads));
  double const expert_bytes = double(moe::packed_bytes<W>({1, shape.M, shape.H}, true));
  double flop = 0, bytes = 0;
  std::size_t round = 0;
  std::int64_t const steps = 500000;
  for (auto _ : state) {
    auto const& b = *batches[round++ % batches.size()];
    state.SetIterationTime(own_times.take([&] { own.run(exec, b, tokens); }));
    flop = 6.0 * double(b.table.counts->rows) * double(shape.M) * double(shape.H);
    bytes += double(b.active) * expert_bytes;
    unpacked_times.take([&] { unpacked.run(exec, b, x); });
#if defined(MOE_BENCH_CBLAS)
    blas_times.take([&] { by_cblas.run(exec, b, x); });
#endif
    fma_times.take(
        [&] { exec.run([&](int m) { sink[static_cast<std::size_t>(m)] = probe.run(steps); }); });
    read_times.take([&] {
      exec.run([&](int m) {
        std::int64_t const part = static_cast<std::int64_t>(memory.size()) / threads / 256 * 256;
        sink[static_cast<std::size_t>(m)] += probe.read(memory.data() + m * part, part);
      });
    });
  }
  benchmark::DoNotOptimize(sink.data());
  double const time = own_times.median(), n = static_cast<double>(round);
  double const fma = static_cast<double>(steps) * probe.flop * threads / fma_times.median();
  double const read = 4.0 * static_cast<double>(memory.size()) / read_times.median();
  auto const rate = [](double v) {
    return benchmark::Counter(v, benchmark::Counter::kDefaults, benchmark::Counter::kIs1000);
  };
  state.counters["FLOP/s"] = rate(flop / time);
  state.counters["of_fma_roof_%"] = 100 * flop / time / fma;
  state.counters["of_read_roof_%"] = 100 * bytes / n / time / read;
  state.counters["fma_roof"] = rate(fma);
  state.counters["read_roof"] = rate(read);
  state.counters["over_unpacked"] = unpacked_times.median() / time;
#if defined(MOE_BENCH_CBLAS)
  state.counters["over_cblas"] = blas_times.median() / time;
#endif
  state.counters["clean_%"] = 100 * own_times.clean_share();
}

int const registered = [] {
  auto const add = [](std::string const& name, auto f, law how) {
    auto* const b = benchmark::RegisterBenchmark(("packed_ffn/" + name).c_str(), f, how);
    b->ArgNames({"E", "K", "M", "H", "T", "threads"})
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
    b->Args({8, 2, 64, 64, 32, 1});  // a moment, for those who only want to see it run
    for (std::int64_t T : {1, 4, 32, 128, 512, 4096}) b->Args({8, 2, 1024, 2816, T, 2});
    for (std::int64_t T : {1, 4, 32, 128, 512, 4096}) b->Args({64, 8, 1024, 512, T, 2});
    for (std::int64_t T : {1, 4, 32, 128, 512, 4096}) b->Args({128, 8, 2048, 768, T, 2});
    b->Args({8, 2, 1024, 2816, 512, 1})->Args({64, 8, 1024, 512, 512, 1});
  };
  for (law how : {law::uniform, law::zipf}) {
    std::string const tail = how == law::uniform ? "/uniform" : "/zipf";
    add("float" + tail, run<float>, how);
    add("bf16" + tail, run<moe::bf16>, how);
    add("bf16_tokens_of_bf16" + tail, run<moe::bf16, float, moe::bf16>, how);
    add("bf16_rows_of_bf16" + tail, run<moe::bf16, moe::bf16>, how);
    add("half" + tail, run<moe::half>, how);
    add("int8" + tail, run<moe::int8_blocks>, how);
    add("int4" + tail, run<moe::int4_blocks>, how);
    add("int8_rows_of_float" + tail, run<moe::int8_blocks, float>, how);
    add("int4_rows_of_float" + tail, run<moe::int4_blocks, float>, how);
  }
  return 0;
}();

}  // namespace
