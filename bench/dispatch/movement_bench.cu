// Dispatch, combine and their backwards on a GPU, beside a copy of as many bytes and the obvious kernels; and
// table, dispatch and combine together against the one-hot einsum.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/dispatch/combine.cuh>
#include <moe/dispatch/dispatch.cuh>
#include <moe/routing/build_table.cuh>
#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>

#include "support/gpu_problem.cuh"
#include "support/gpu_timing.cuh"
#include "support/matrix_products.cuh"

namespace {

using moe_bench::batch_case;
using moe_bench::bf16;

/// What the einsum is set against.
constexpr batch_case one_hot_case = {{"one_hot", 64, 2, 1024}, 4096};

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

/// Device memory for one model and batch: a table, and sets of matrices that follow one another.
struct problem {
  moe::gpu exec;  // first: without a device nothing else is tried
  moe_bench::model m;
  std::int64_t T;
  moe::routing_buffer routing;
  moe::table_shape shape;
  moe::table_buffer table;
  std::int64_t set_size;  // elements: tokens, out [T,M], rows, drows [N,M]
  int sets;
  moe::gpu_buffer tables, scratch, values, matrices, masks;
  std::unique_ptr<moe_bench::matrix_products> products;
  moe::routing routed_there;
  moe::routing_table on_device, built;
  bool is_verified = false;
  char const* wrong = nullptr;  // what was verified and is not right

  explicit problem(batch_case const& c)
      : m(c.of),
        T(c.T),
        routing(moe_bench::make_routing(c)),
        shape(shape_of(m, T)),
        table(shape),
        set_size(2 * (T + shape.max_rows) * m.M),
        sets(moe_bench::sets_past_cache(static_cast<std::size_t>(set_size) * sizeof(bf16) / 2)),
        tables(2 * moe::table_bytes(shape) + moe::routing_bytes(T, m.K)),
        scratch(moe::build_table_scratch(exec, shape)),
        values(2 * static_cast<std::size_t>(pairs()) * sizeof(float)),
        matrices(static_cast<std::size_t>(set_size * sets) * sizeof(bf16)) {
    moe::cpu const host;
    moe::buffer const here(moe::build_table_scratch(host, shape));
    moe::build_table(host, routing, moe::table_rules{}, here, table);
    moe::memory from = tables;
    routed_there = moe::carve_routing(exec, from, T, m.K, m.E);
    on_device = moe::carve_table(exec, from, shape);
    built = moe::carve_table(exec, from, shape);
    moe_bench::upload(routed_there.expert, routing.expert, pairs());
    moe_bench::upload(on_device.counts, table.counts, 1);
    moe_bench::upload(on_device.row_of, table.row_of, pairs());
    moe_bench::upload(on_device.pair_of, table.pair_of, shape.max_rows);
    moe_bench::upload(static_cast<float*>(values.data()), routing.weight, pairs());
    moe_bench::fill_at_random(exec, static_cast<bf16*>(matrices.data()), set_size * sets);
    if (c == one_hot_case) {
      masks = moe::gpu_buffer(static_cast<std::size_t>(T * N()) * sizeof(bf16));
      products = std::make_unique<moe_bench::matrix_products>();
    }
    // The CPU would take minutes over the largest ones.
    if (pairs() * m.M <= std::int64_t{1} << 27) verify();
  }

  static moe::table_shape shape_of(moe_bench::model const& m, std::int64_t T) {
    moe::table_shape shape{.T = T, .K = m.K, .E = m.E};
    shape.max_rows = moe::max_rows(moe::table_rules{}, shape);
    return shape;
  }
  std::int64_t pairs() const { return T * m.K; }
  std::int64_t N() const { return shape.max_rows; }  // dropless and packed: every pair has a row

  bool has_masks() const { return masks.data() != nullptr; }
  /// The einsum's tensor [T,E,C], here [T,N] as no expert has empty rows, made anew.
  moe::matrix_view<bf16> mask(moe::gpu const& on, float const* weights) const {
    moe::matrix_view<bf16> const all(static_cast<bf16*>(masks.data()), T, N());
    on.fill(all.data(), 0, masks.size());
    on.launch("one_hot", one_hot_kernel{}, (pairs() + 255) / 256, moe::call_site::here(),
              static_cast<std::int32_t const*>(on_device.row_of), weights, m.K, all);
    return all;
  }
  void dispatch_one_hot(moe::gpu const& on, int set, moe::matrix_view<bf16> to) const {
    (*products)(on, moe_bench::transposed::left, mask(on, nullptr), tokens(set), to);
  }
  void combine_one_hot(moe::gpu const& on, int set) const {
    (*products)(on, moe_bench::transposed::none, mask(on, weight().data()), rows(set), out(set));
  }

  void dispatch_by_rows(moe::gpu const& on, int set, moe::matrix_view<bf16> to) const {
    on.launch("dispatch_by_rows", gather_kernel{}, N(), moe::call_site::here(),
              moe::matrix_view<bf16 const>(tokens(set)), m.K,
              static_cast<std::int32_t const*>(on_device.pair_of), to);
  }
  void combine_by_elements(moe::gpu const& on, int set) const {
    on.launch("combine_by_elements", sum_kernel{}, T, moe::call_site::here(),
              moe::matrix_view<bf16 const>(rows(set)), m.K,
              static_cast<std::int32_t const*>(on_device.row_of), weight().data(), out(set));
  }

  /// A layer without its experts: table, dispatch, combine.
  void move(moe::gpu const& on, int set) const {
    moe::routing_table made = built;
    moe::build_table(on, routed_there, moe::table_rules{}, scratch, made);
    moe::dispatch(on, tokens(set), made, rows(set));
    moe::combine(on, rows(set), made, weight(), out(set));
  }
  /// The same by einsums. Which row a pair has is given to it.
  void move_one_hot(moe::gpu const& on, int set) const {
    dispatch_one_hot(on, set, rows(set));
    combine_one_hot(on, set);
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
  static std::vector<bf16> download(moe::matrix_view<bf16> view) {
    return moe_bench::download(view.data(), view.rows() * view.cols());
  }
  /// What was written, which is NaN then, so that it does not pass for the next result.
  template <class V>
  std::vector<V> take(V* from, std::int64_t count) const {
    auto taken = moe_bench::download(from, count);
    exec.fill(from, 0xff, taken.size() * sizeof(V));
    return taken;
  }
  std::vector<bf16> take(moe::matrix_view<bf16> view) const {
    return take(view.data(), view.rows() * view.cols());
  }

  /// Each form once, on the first set, against the CPU.
  void verify() {
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
    demand(take(drows(0)), big, 0, "dispatch differs from the CPU's");
    dispatch_by_rows(exec, 0, drows(0));
    demand(take(drows(0)), big, 0, "dispatch_by_rows differs from the CPU's");
    if (has_masks()) {
      dispatch_one_hot(exec, 0, drows(0));
      demand(take(drows(0)), big, 0, "the one-hot dispatch differs from the CPU's");
    }
    moe::dispatch(exec, tokens(0), on_device, weight(), drows(0));
    moe::dispatch(host, in, table, w, big_view);
    demand(take(drows(0)), big, 0.01f, "weighted dispatch differs from the CPU's");
    moe::combine(exec, rows(0), on_device, weight(), out(0));
    moe::combine(host, given, table, w, small_view);
    demand(take(out(0)), small, 0.01f, "combine differs from the CPU's");
    combine_by_elements(exec, 0);
    demand(take(out(0)), small, 0.01f, "combine_by_elements differs from the CPU's");
    if (has_masks()) {
      combine_one_hot(exec, 0);
      demand(take(out(0)), small, 0.02f, "the one-hot combine differs from the CPU's");
      verify_moves(host, demand);
    }
    moe::combine_backward(exec, tokens(0), rows(0), on_device, weight(), drows(0), dweight());
    moe::combine_backward(host, in, given, table, w, big_view, dots);
    demand(take(drows(0)), big, 0.01f, "combine_backward differs from the CPU's");
    demand(take(dweight().data(), pairs()), dots, 0.01f, "dweight differs from the CPU's");
    moe::dispatch_backward(exec, rows(0), tokens(0), on_device, weight(), out(0), dweight());
    moe::dispatch_backward(host, given, in, table, w, small_view, dots);
    demand(take(out(0)), small, 0.01f, "dispatch_backward differs from the CPU's");
    demand(take(dweight().data(), pairs()), dots, 0.01f, "dweight differs from the CPU's");
    is_verified = true;
  }

  /// Overwrites rows of the second set.
  template <class Demand>
  void verify_moves(moe::cpu const& host, Demand const& demand) const {
    int const set = 1;
    auto const x = download(tokens(set));
    std::vector<bf16> big(static_cast<std::size_t>(N() * m.M)), small(x.size());
    moe::matrix_view<bf16> const big_view(big.data(), N(), m.M), small_view(small.data(), T, m.M);
    moe::dispatch(host, moe::matrix_view<bf16 const>(x.data(), T, m.M), table, big_view);
    moe::combine(host, moe::matrix_view<bf16 const>(big_view), table,
                 moe::vector_view<float const>(routing.weight, pairs()), small_view);
    move(exec, set);
    demand(take(out(set)), small, 0.01f, "table, dispatch and combine differ from the CPU's");
    move_one_hot(exec, set);
    demand(take(out(set)), small, 0.02f, "the one-hot einsums differ from the CPU's");
  }
};

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
       p.dispatch_by_rows(exec, set, p.rows(set));
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
     [](problem const& p, moe::gpu const& exec, int set) { p.combine_by_elements(exec, set); }},
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
    // Their quotient is what the table, dispatch and combine gain over the einsums.
    {"move", 1, 1, 1, 1,
     [](problem const& p, moe::gpu const& exec, int set) { p.move(exec, set); }},
    {"move_one_hot", 1, 1, 1, 1,
     [](problem const& p, moe::gpu const& exec, int set) { p.move_one_hot(exec, set); }},
};

void run(benchmark::State& state, operation const& o, batch_case const& c) {
  auto const& p = moe_bench::shared_problem<problem>(c);
  if (p.wrong != nullptr) return state.SkipWithError(p.wrong);
  double const rows = static_cast<double>(p.N()), tokens = static_cast<double>(p.T);
  double const bytes =
      sizeof(bf16) * static_cast<double>(p.m.M) *
      (rows * (o.rows_read + o.rows_written) + tokens * (o.tokens_read + o.tokens_written));
  moe_bench::time_on_gpu(state, p.sets, bytes,
                         [&](moe::gpu const& exec, int set) { o.run(p, exec, set); });
  state.counters["verified"] = p.is_verified;
}

bool const registered = [] {
  auto const add = [](operation const& o, batch_case const& c) {
    moe_bench::add_benchmark(c.name(o.name), c.T,
                             [&o, c](benchmark::State& state) { run(state, o, c); });
  };
  for (batch_case const& c : moe_bench::all_cases())
    for (operation const& o : operations) add(o, c);
  for (operation const& o : one_hot_operations) add(o, one_hot_case);
  return true;
}();

}  // namespace
