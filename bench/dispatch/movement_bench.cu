// Dispatch, combine and their backwards on a GPU, beside a copy of as many bytes and the obvious kernels.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cublas_v2.h>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/dispatch/combine.cuh>
#include <moe/dispatch/dispatch.cuh>
#include <moe/routing/build_table.hpp>

#include "support/gpu_timing.cuh"

namespace {

using moe::bf16;

struct model {
  char const* name;
  int E, K;
  std::int64_t M;
};
constexpr model models[] = {{"mixtral", 8, 2, 4096},
                            {"deepseek_v3", 256, 8, 7168},
                            {"qwen3", 128, 8, 2048},
                            {"one_hot", 64, 2, 1024}};  // for the einsum, with 4096 tokens only
constexpr std::int64_t batch_sizes[] = {1, 8, 32, 128, 512, 4096, 16384};

/// K different experts for each token: equally popular, or the i-th with weight 1 / (i + 1).
moe::routing_buffer make_routing(model const& m, std::int64_t T, bool zipf) {
  moe::routing_buffer r(T, m.K, m.E);
  std::mt19937 random(1);
  std::uniform_real_distribution<double> unit(0, 1);
  std::vector<std::pair<double, std::int32_t>> key(static_cast<std::size_t>(m.E));
  for (std::int64_t t = 0; t < T; ++t) {
    // The K lowest of exponential times of these rates: a sample without replacement.
    for (int e = 0; e < m.E; ++e)
      key[static_cast<std::size_t>(e)] = {-std::log(1 - unit(random)) * (zipf ? e + 1 : 1), e};
    std::partial_sort(key.begin(), key.begin() + m.K, key.end());
    for (int j = 0; j < m.K; ++j) {
      r.expert[t * m.K + j] = key[static_cast<std::size_t>(j)].second;
      r.weight[t * m.K + j] = static_cast<float>(unit(random));
    }
  }
  return r;
}

/// Random bf16 of (-1, 1).
struct fill_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, bf16* to, std::int64_t size) const {
    b.wait_for_previous();
    for (std::int64_t i = std::int64_t(b.block()) * threads + b.thread(); i < size;
         i += std::int64_t(b.blocks()) * threads) {
      auto x = static_cast<std::uint32_t>(i) * 2654435761u;
      x ^= x >> 15;
      to[i] = static_cast<bf16>(static_cast<float>(static_cast<std::int32_t>(x * 0x2c1b3c6du)) *
                                0x1p-31f);
    }
  }
};

/// The obvious dispatch: a block copies a row from its token.
struct gather_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, moe::matrix_view<bf16 const> tokens, int K,
                                  std::int32_t const* pair_of, moe::matrix_view<bf16> rows) const {
    b.wait_for_previous();
    std::int32_t const i = pair_of[b.block()];
    for (std::int64_t c = b.thread(); c < rows.cols(); c += threads)
      rows(b.block(), c) = i < 0 ? bf16{} : tokens(i / K, c);
  }
};

/// The obvious combine: a thread sums one element.
struct sum_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, moe::matrix_view<bf16 const> rows, int K,
                                  std::int32_t const* row_of, float const* weight,
                                  moe::matrix_view<bf16> out) const {
    b.wait_for_previous();
    std::int64_t const t = b.block();
    for (std::int64_t c = b.thread(); c < out.cols(); c += threads) {
      float sum = 0;
      for (int j = 0; j < K; ++j)
        if (std::int32_t const r = row_of[t * K + j]; r >= 0)
          sum += weight[t * K + j] * static_cast<float>(rows(r, c));
      out(t, c) = static_cast<bf16>(sum);
    }
  }
};

/// mask[t, row] = the weight of each pair that has a row, or 1.
struct one_hot_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, std::int32_t const* row_of, float const* weight,
                                  int K, moe::matrix_view<bf16> mask) const {
    b.wait_for_previous();
    std::int64_t const i = std::int64_t(b.block()) * threads + b.thread();
    if (i < mask.rows() * K && row_of[i] >= 0)
      mask(i / K, row_of[i]) = static_cast<bf16>(weight != nullptr ? weight[i] : 1.0f);
  }
};

/// The product behind an einsum with a one-hot tensor, in row-major terms: c = a b, or a^T b.
class matrix_products {
 public:
  matrix_products() { demand(cublasCreate(&handle_)); }
  ~matrix_products() { static_cast<void>(cublasDestroy(handle_)); }

  void operator()(cudaStream_t stream, bool transpose_a, moe::matrix_view<bf16> a,
                  moe::matrix_view<bf16> b, moe::matrix_view<bf16> c) const {
    float const one = 1, zero = 0;
    demand(cublasSetStream(handle_, stream));
    demand(
        cublasSetWorkspace(handle_, workspace_.data(), workspace_.size()));  // gone with SetStream
    // cuBLAS takes rows for columns: it computes c^T = b^T a^T.
    demand(cublasGemmEx(
        handle_, CUBLAS_OP_N, transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N, static_cast<int>(c.cols()),
        static_cast<int>(c.rows()), static_cast<int>(b.rows()), &one, b.data(), CUDA_R_16BF,
        static_cast<int>(b.ld()), a.data(), CUDA_R_16BF, static_cast<int>(a.ld()), &zero, c.data(),
        CUDA_R_16BF, static_cast<int>(c.ld()), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

 private:
  static void demand(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) throw moe::error("benchmark: cuBLAS failed");
  }

  moe::gpu_buffer workspace_{std::size_t{32} << 20};
  cublasHandle_t handle_ = nullptr;
};

/// Device memory for one model and batch: a table, and sets of matrices that follow one another.
struct problem {
  model m;
  std::int64_t T;
  moe::routing_buffer routing;
  moe::table_shape shape;
  moe::table_buffer table;
  std::int64_t set_size;  // elements: tokens, out [T,M], rows, drows [N,M]
  int sets;
  moe::gpu_buffer ids, values, matrices, masks;
  std::unique_ptr<matrix_products> products;
  moe::routing_table on_device;
  char const* wrong = nullptr;  // what was verified and is not right

  problem(model const& which, std::int64_t tokens, bool zipf)
      : m(which),
        T(tokens),
        routing(make_routing(m, T, zipf)),
        shape(shape_of(m, T)),
        table(shape),
        set_size(2 * (T + shape.max_rows) * m.M),
        sets(moe_bench::sets_past_cache(static_cast<std::size_t>(set_size) * sizeof(bf16) / 2)),
        ids(static_cast<std::size_t>(pairs() + shape.max_rows) * sizeof(std::int32_t) +
            sizeof(moe::table_counts)),
        values(2 * static_cast<std::size_t>(pairs()) * sizeof(float)),
        matrices(static_cast<std::size_t>(set_size * sets) * sizeof(bf16)) {
    moe::cpu const host;
    moe::buffer const scratch(moe::build_table_scratch(host, shape));
    moe::build_table(host, routing, moe::table_rules{}, scratch, table);
    on_device = table;
    auto* const counts = static_cast<moe::table_counts*>(ids.data());
    on_device.counts = counts;
    on_device.row_of = reinterpret_cast<std::int32_t*>(counts + 1);
    on_device.pair_of = on_device.row_of + pairs();
    upload(on_device.counts, table.counts, 1);
    upload(on_device.row_of, table.row_of, pairs());
    upload(on_device.pair_of, table.pair_of, shape.max_rows);
    upload(values.data(), routing.weight, pairs());
    moe::gpu const exec;
    exec.launch("fill", fill_kernel{}, 8 * exec.processors(), moe::call_site::here(),
                static_cast<bf16*>(matrices.data()), set_size * sets);
    if (has_masks()) {
      masks = moe::gpu_buffer(static_cast<std::size_t>(T * N()) * sizeof(bf16));
      products = std::make_unique<matrix_products>();
    }
    verify(exec);
  }

  static moe::table_shape shape_of(model const& m, std::int64_t T) {
    moe::table_shape shape{.T = T, .K = m.K, .E = m.E};
    shape.max_rows = moe::max_rows(moe::table_rules{}, shape);
    return shape;
  }
  std::int64_t pairs() const { return T * m.K; }
  std::int64_t N() const { return shape.max_rows; }  // dropless and packed: every pair has a row

  bool has_masks() const { return m.E == 64; }
  /// The einsum's tensor [T,E,C], here [T,N] as no expert has empty rows, made anew.
  moe::matrix_view<bf16> mask(moe::gpu const& exec, float const* weights) const {
    moe::matrix_view<bf16> const all(static_cast<bf16*>(masks.data()), T, N());
    exec.fill(all.data(), 0, masks.size());
    exec.launch("one_hot", one_hot_kernel{}, (pairs() + 255) / 256, moe::call_site::here(),
                static_cast<std::int32_t const*>(on_device.row_of), weights, m.K, all);
    return all;
  }
  void dispatch_one_hot(moe::gpu const& exec, int set, moe::matrix_view<bf16> to) const {
    (*products)(exec.stream(), true, mask(exec, nullptr), tokens(set), to);
  }
  void combine_one_hot(moe::gpu const& exec, int set) const {
    (*products)(exec.stream(), false, mask(exec, weight().data()), rows(set), out(set));
  }

  moe::matrix_view<bf16> part(int set, std::int64_t first, std::int64_t rows) const {
    return {static_cast<bf16*>(matrices.data()) + set * set_size + first * m.M, rows, m.M};
  }
  moe::matrix_view<bf16> tokens(int set) const { return part(set, 0, T); }
  moe::matrix_view<bf16> out(int set) const { return part(set, T, T); }
  moe::matrix_view<bf16> rows(int set) const { return part(set, 2 * T, N()); }
  moe::matrix_view<bf16> drows(int set) const { return part(set, 2 * T + N(), N()); }
  moe::vector_view<float const> weight() const {
    return {static_cast<float const*>(values.data()), pairs()};
  }
  moe::vector_view<float> dweight() const {
    return {static_cast<float*>(values.data()) + pairs(), pairs()};
  }

 private:
  template <class V>
  static void upload(void* to, V const* from, std::int64_t count) {
    moe_bench::check(
        cudaMemcpy(to, from, static_cast<std::size_t>(count) * sizeof(V), cudaMemcpyHostToDevice));
  }
  template <class V>
  static std::vector<V> download(V const* from, std::int64_t count) {
    std::vector<V> values(static_cast<std::size_t>(count));
    moe_bench::check(
        cudaMemcpy(values.data(), from, values.size() * sizeof(V), cudaMemcpyDeviceToHost));
    return values;
  }
  std::vector<bf16> download(moe::matrix_view<bf16> view) const {
    return download<bf16>(view.data(), view.rows() * view.cols());
  }

  /// Each form once, on the first set, against the CPU.
  void verify(moe::gpu const& exec) {
    moe::thread_team team(8);
    moe::cpu const host = team;
    auto const x = download(tokens(0)), y = download(rows(0));
    moe::matrix_view<bf16 const> const in(x.data(), T, m.M), given(y.data(), N(), m.M);
    moe::vector_view<float const> const w(routing.weight, pairs());
    std::vector<bf16> big(y.size()), small(x.size());
    std::vector<float> dots(static_cast<std::size_t>(pairs()));
    auto const big_view = moe::matrix_view<bf16>(big.data(), N(), m.M);
    auto const small_view = moe::matrix_view<bf16>(small.data(), T, m.M);
    auto const demand = [&](auto const& found, auto const& expected, float scale,
                            char const* what) {
      for (std::size_t i = 0; i < expected.size(); ++i)
        if (!(std::abs(static_cast<float>(found[i]) - static_cast<float>(expected[i])) <=
              scale * (1 + std::abs(static_cast<float>(expected[i])))))
          wrong = what;
    };
    moe::dispatch(exec, tokens(0), on_device, drows(0));
    moe::dispatch(host, in, table, big_view);
    demand(download(drows(0)), big, 0, "dispatch differs from the CPU's");
    if (has_masks()) {
      dispatch_one_hot(exec, 0, drows(0));
      demand(download(drows(0)), big, 0, "the one-hot dispatch differs from the CPU's");
    }
    moe::dispatch(exec, tokens(0), on_device, weight(), drows(0));
    moe::dispatch(host, in, table, w, big_view);
    demand(download(drows(0)), big, 0.01f, "weighted dispatch differs from the CPU's");
    moe::combine(exec, rows(0), on_device, weight(), out(0));
    moe::combine(host, given, table, w, small_view);
    demand(download(out(0)), small, 0.01f, "combine differs from the CPU's");
    if (has_masks()) {
      combine_one_hot(exec, 0);
      demand(download(out(0)), small, 0.02f, "the one-hot combine differs from the CPU's");
    }
    moe::combine_backward(exec, tokens(0), rows(0), on_device, weight(), drows(0), dweight());
    moe::combine_backward(host, in, given, table, w, big_view, dots);
    demand(download(drows(0)), big, 0.01f, "combine_backward differs from the CPU's");
    demand(download(dweight().data(), pairs()), dots, 0.01f, "dweight differs from the CPU's");
    moe::dispatch_backward(exec, rows(0), tokens(0), on_device, weight(), out(0), dweight());
    moe::dispatch_backward(host, given, in, table, w, small_view, dots);
    demand(download(out(0)), small, 0.01f, "dispatch_backward differs from the CPU's");
    demand(download(dweight().data(), pairs()), dots, 0.01f, "dweight differs from the CPU's");
  }
};

/// The problem that the benchmark before had, if it is the same: benchmarks of one follow one another.
problem& shared_problem(int which, std::int64_t T, bool zipf) {
  static std::unique_ptr<problem> current;
  static std::tuple<int, std::int64_t, bool> key;
  if (current == nullptr || key != std::tuple(which, T, zipf)) {
    current.reset();
    current = std::make_unique<problem>(models[which], T, zipf);
    key = {which, T, zipf};
  }
  return *current;
}

/// A named operation, and how often it reads and writes [N,M] and [T,M].
struct operation {
  char const* name;
  int rows_read, tokens_read, rows_written, tokens_written;
  void (*run)(problem const&, moe::gpu const&, int set);
};

constexpr operation operations[] = {
    {"dispatch", 0, 1, 1, 0,
     [](problem const& p, moe::gpu const& exec, int set) {
       moe::dispatch(exec, p.tokens(set), p.on_device, p.rows(set));
     }},
    {"dispatch_by_rows", 0, 1, 1, 0,
     [](problem const& p, moe::gpu const& exec, int set) {
       exec.launch("dispatch_by_rows", gather_kernel{}, p.N(), moe::call_site::here(),
                   moe::matrix_view<bf16 const>(p.tokens(set)), p.m.K,
                   static_cast<std::int32_t const*>(p.on_device.pair_of), p.rows(set));
     }},
    {"dispatch_weighted", 0, 1, 1, 0,
     [](problem const& p, moe::gpu const& exec, int set) {
       moe::dispatch(exec, p.tokens(set), p.on_device, p.weight(), p.rows(set));
     }},
    {"combine", 1, 0, 0, 1,
     [](problem const& p, moe::gpu const& exec, int set) {
       moe::combine(exec, p.rows(set), p.on_device, p.weight(), p.out(set));
     }},
    {"combine_by_elements", 1, 0, 0, 1,
     [](problem const& p, moe::gpu const& exec, int set) {
       exec.launch("combine_by_elements", sum_kernel{}, p.T, moe::call_site::here(),
                   moe::matrix_view<bf16 const>(p.rows(set)), p.m.K,
                   static_cast<std::int32_t const*>(p.on_device.row_of), p.weight().data(),
                   p.out(set));
     }},
    {"combine_backward", 1, 1, 1, 0,
     [](problem const& p, moe::gpu const& exec, int set) {
       moe::combine_backward(exec, p.tokens(set), p.rows(set), p.on_device, p.weight(),
                             p.drows(set), p.dweight());
     }},
    {"dispatch_backward", 1, 0, 0, 1,
     [](problem const& p, moe::gpu const& exec, int set) {
       moe::dispatch_backward(exec, p.rows(set), p.on_device, p.out(set));
     }},
    {"dispatch_backward_weighted", 1, 1, 0, 1,
     [](problem const& p, moe::gpu const& exec, int set) {
       moe::dispatch_backward(exec, p.rows(set), p.tokens(set), p.on_device, p.weight(), p.out(set),
                              p.dweight());
     }},
};

/// Of the paper's baseline: with weights in bf16, as they are in its mask.
constexpr operation one_hot_operations[] = {
    operations[0],
    {"dispatch_one_hot", 0, 1, 1, 0,
     [](problem const& p, moe::gpu const& exec, int set) {
       p.dispatch_one_hot(exec, set, p.rows(set));
     }},
    operations[3],
    {"combine_one_hot", 1, 0, 0, 1,
     [](problem const& p, moe::gpu const& exec, int set) { p.combine_one_hot(exec, set); }},
};

void run(benchmark::State& state, operation const& o, int which, std::int64_t T, bool zipf) {
  try {
    problem const& p = shared_problem(which, T, zipf);
    if (p.wrong != nullptr) return state.SkipWithError(p.wrong);
    double const rows = static_cast<double>(p.N()), tokens = static_cast<double>(p.T);
    double const bytes =
        sizeof(bf16) * static_cast<double>(p.m.M) *
        (rows * (o.rows_read + o.rows_written) + tokens * (o.tokens_read + o.tokens_written));
    moe_bench::time_on_gpu(state, p.sets, bytes,
                           [&](moe::gpu const& exec, int set) { o.run(p, exec, set); });
    state.counters["tokens/s"] =
        benchmark::Counter(static_cast<double>(T), benchmark::Counter::kIsIterationInvariantRate);
  } catch (moe::error const& e) {
    state.SkipWithError(e.what());
  }
}

void add_benchmark(operation const& o, int which, std::int64_t T, bool zipf) {
  std::string const name = std::string(o.name) + "/" + models[which].name +
                           (zipf ? "/zipf" : "/uniform") + "/T:" + std::to_string(T);
  benchmark::RegisterBenchmark(
      name.c_str(), [&o, which, T, zipf](benchmark::State& s) { run(s, o, which, T, zipf); })
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

bool const registered = [] {
  for (int which = 0; which < 3; ++which)
    for (bool const zipf : {false, true})
      for (std::int64_t const T : batch_sizes)
        for (operation const& o : operations) add_benchmark(o, which, T, zipf);
  for (operation const& o : one_hot_operations) add_benchmark(o, 3, 4096, false);
  return true;
}();

}  // namespace
