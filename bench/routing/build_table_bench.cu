// build_table on a GPU beside tables made by sorting: by CUB's radix sort, and by Thrust's stable sort.
// The targets ask for 32768 pairs of 256 experts (deepseek_v3 with T:4096) and 1024 (with T:128).
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cub/device/device_radix_sort.cuh>
#include <numeric>
#include <string>
#include <thrust/execution_policy.h>
#include <thrust/sort.h>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/memory.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/routing/build_table.cuh>
#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>

#include "support/gpu_problem.cuh"
#include "support/gpu_timing.cuh"

namespace {

using moe_bench::batch_case;

enum class rules { dropless, padded, by_score };

moe::table_rules rules_of(rules which) {
  moe::table_rules of;
  if (which == rules::dropless) return of;
  of.cap = moe::capacity::deepspeed({.factor = 1, .eval_factor = 1});
  if (which == rules::padded)
    of.rows = moe::layout::padded;
  else
    of.when_full = moe::overflow::score;
  return of;
}

/// begin[e] = the first row whose expert is e or above; e = E, too.
struct lower_bound_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, std::int32_t const* sorted, std::int32_t pairs,
                                  int E, std::int32_t* begin) const {
    b.wait_for_previous();
    int const e = b.block() * threads + b.thread();
    if (e > E) return;
    std::int32_t first = 0, last = pairs;
    while (first < last) {
      std::int32_t const middle = first + (last - first) / 2;
      if (sorted[middle] < e)
        first = middle + 1;
      else
        last = middle;
    }
    begin[e] = first;
  }
};

struct invert_kernel {
  static constexpr int threads = 256;
  struct shared {};
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, std::int32_t const* pair_of, std::int32_t pairs,
                                  std::int32_t* row_of) const {
    b.wait_for_previous();
    std::int32_t const row = b.block() * threads + b.thread();
    if (row < pairs) row_of[pair_of[row]] = row;
  }
};

/// Routings and tables on the device, in sets that follow one another, and the table of the CPU.
struct problem {
  struct set {
    moe::routing routed;
    moe::routing_table table;
  };

  moe::gpu exec;  // first: without a device nothing else is tried
  batch_case of;
  moe::table_rules by;
  moe::routing_buffer routing;
  moe::table_shape shape;
  moe::table_buffer expected;
  moe::gpu_buffer room, scratch, sort_room;
  moe::pair_counts counted;                            // what a gate on a GPU counts
  std::int32_t *ascending = nullptr, *keys = nullptr;  // [T*K]
  moe::memory sort_scratch;
  std::vector<set> all;

  problem(batch_case const& c, rules which)
      : of(c),
        by(rules_of(which)),
        routing(moe_bench::make_routing(c)),
        shape(shape_of(c, by)),
        expected(shape),
        scratch(moe::build_table_scratch(exec, shape)) {
    moe::cpu const host;
    moe::buffer const here(moe::build_table_scratch(host, shape));
    moe::build_table(host, routing, by, here, expected);

    int const sets = moe_bench::sets_past_cache(static_cast<std::size_t>(bytes()));
    auto const counts = count_pairs();
    std::size_t const each = moe::routing_bytes(c.T, c.of.K) + moe::table_bytes(shape);
    room = moe::gpu_buffer(
        each * static_cast<std::size_t>(sets) +
        moe::memory_size().add<std::int32_t>(static_cast<std::int64_t>(counts.size())).bytes());
    moe::memory from = room;
    counted.counts = from.take<std::int32_t>(static_cast<std::int64_t>(counts.size()), "benchmark",
                                             moe::call_site::here());
    moe_bench::upload(counted.counts, counts.data(), static_cast<std::int64_t>(counts.size()));
    for (int n = 0; n < sets; ++n) {
      set s;
      s.routed = moe::carve_routing(exec, from, c.T, c.of.K, c.of.E);
      s.table = moe::carve_table(exec, from, shape);
      if (n == 0) {
        moe_bench::upload(s.routed.expert, routing.expert, c.pairs());
        moe_bench::upload(s.routed.score, routing.score, c.pairs());
      } else {
        moe_bench::copy_on_device(s.routed.expert, all[0].routed.expert, c.pairs());
        moe_bench::copy_on_device(s.routed.score, all[0].routed.score, c.pairs());
      }
      all.push_back(s);
    }
    prepare_sort();
  }

  static moe::table_shape shape_of(batch_case const& c, moe::table_rules const& by) {
    moe::table_shape shape{.T = c.T, .K = c.of.K, .E = c.of.E};
    shape.max_rows = moe::max_rows(by, shape);
    return shape;
  }
  int sets() const { return static_cast<int>(all.size()); }
  set const& at(int n) const { return all[static_cast<std::size_t>(n)]; }
  /// Each id is read once, row_of and pair_of are written once, and so are begin, used and wanted of
  /// each expert.
  double bytes() const { return 12.0 * static_cast<double>(of.pairs() + of.of.E); }
  std::int32_t pairs() const { return static_cast<std::int32_t>(of.pairs()); }
  /// Bits that tell the experts apart.
  int bits() const { return std::bit_width(static_cast<unsigned>(of.of.E - 1)); }

  /// pair_of from the ids by a radix sort; keys: the sorted ids.
  cudaError_t radix_sort(void* room_for_it, std::size_t& size, set const& s,
                         cudaStream_t stream) const {
    return cub::DeviceRadixSort::SortPairs(
        room_for_it, size, static_cast<std::int32_t const*>(s.routed.expert), keys,
        static_cast<std::int32_t const*>(ascending), s.table.pair_of, pairs(), 0, bits(), stream);
  }
  /// begin and row_of from sorted ids and pair_of.
  void finish_sort(moe::gpu const& on, set const& s) const {
    auto const site = moe::call_site::here();
    on.launch("lower_bound", lower_bound_kernel{}, of.of.E / 256 + 1, site,
              static_cast<std::int32_t const*>(keys), pairs(), of.of.E, s.table.begin);
    on.launch("invert", invert_kernel{}, (pairs() + 255) / 256, site,
              static_cast<std::int32_t const*>(s.table.pair_of), pairs(), s.table.row_of);
  }

  /// Whether the first set's table is that of the CPU.
  bool is_right() const {
    auto const same = [](std::int32_t const* there, std::int32_t const* here, std::int64_t count) {
      auto const found = moe_bench::download(there, count);
      return std::equal(found.begin(), found.end(), here);
    };
    moe::routing_table const& found = at(0).table;
    return same(found.row_of, expected.row_of, of.pairs()) &&
           same(found.pair_of, expected.pair_of, expected.counts->rows) &&
           same(found.begin, expected.begin, of.of.E + 1);
  }

 private:
  std::vector<std::int32_t> count_pairs() {
    int const E = of.of.E, K = of.of.K;
    counted.chunk = moe::detail::tokens_per_chunk(of.T, E);
    counted.chunks = moe::detail::chunks_of(of.T, counted.chunk);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(counted.chunks * (E + 4)));
    for (std::int64_t i = 0; i < of.pairs(); ++i)
      ++counts[static_cast<std::size_t>(i / K / counted.chunk * (E + 4) + routing.expert[i])];
    return counts;
  }

  void prepare_sort() {
    std::size_t size = 0;
    moe_bench::check(radix_sort(nullptr, size, at(0), nullptr));
    auto const bytes = static_cast<std::int64_t>(size);
    sort_room = moe::gpu_buffer(moe::memory_size()
                                    .add<std::int32_t>(of.pairs())
                                    .add<std::int32_t>(of.pairs())
                                    .add<std::byte>(bytes)
                                    .bytes());
    moe::memory from = sort_room;
    auto const site = moe::call_site::here();
    ascending = from.take<std::int32_t>(of.pairs(), "benchmark", site);
    keys = from.take<std::int32_t>(of.pairs(), "benchmark", site);
    sort_scratch = {from.take<std::byte>(bytes, "benchmark", site), size};
    std::vector<std::int32_t> ids(static_cast<std::size_t>(of.pairs()));
    std::iota(ids.begin(), ids.end(), 0);
    moe_bench::upload(ascending, ids.data(), of.pairs());
  }
};

void build(problem const& p, moe::gpu const& exec, int n, moe::pair_counts const& counts) {
  problem::set const& s = p.at(n);
  moe::routing routed = s.routed;
  moe::routing_table table = s.table;
  routed.chunk_counts = counts;
  moe::build_table(exec, routed, p.by, p.scratch, table);
}

/// A named way to a table.
struct operation {
  char const* name;
  rules by;
  bool is_captured;
  void (*run)(problem const&, moe::gpu const&, int set);
};

constexpr operation operations[] = {
    {"packed", rules::dropless, true,
     [](problem const& p, moe::gpu const& exec, int n) { build(p, exec, n, {}); }},
    {"packed_counted_by_gate", rules::dropless, true,
     [](problem const& p, moe::gpu const& exec, int n) { build(p, exec, n, p.counted); }},
    {"cub_radix_sort", rules::dropless, true,
     [](problem const& p, moe::gpu const& exec, int n) {
       std::size_t size = p.sort_scratch.size();
       moe_bench::check(p.radix_sort(p.sort_scratch.data(), size, p.at(n), exec.stream()));
       p.finish_sort(exec, p.at(n));
     }},
    // It allocates, and waits for the device.
    {"thrust_stable_sort_eager", rules::dropless, false,
     [](problem const& p, moe::gpu const& exec, int n) {
       problem::set const& s = p.at(n);
       auto const copy = [&](std::int32_t* to, std::int32_t const* from) {
         moe_bench::check(cudaMemcpyAsync(to, from,
                                          sizeof *to * static_cast<std::size_t>(p.pairs()),
                                          cudaMemcpyDeviceToDevice, exec.stream()));
       };
       copy(p.keys, s.routed.expert);
       copy(s.table.pair_of, p.ascending);
       thrust::stable_sort_by_key(thrust::cuda::par.on(exec.stream()), p.keys, p.keys + p.pairs(),
                                  s.table.pair_of);
       p.finish_sort(exec, s);
     }},
    {"padded", rules::padded, true,
     [](problem const& p, moe::gpu const& exec, int n) { build(p, exec, n, {}); }},
    {"packed_by_score", rules::by_score, true,
     [](problem const& p, moe::gpu const& exec, int n) { build(p, exec, n, {}); }},
};

void run(benchmark::State& state, operation const& o, batch_case const& c) {
  auto const& p = moe_bench::shared_problem<problem>(c, o.by);
  auto const forget = [&](std::int32_t* array, std::int64_t count) {
    p.exec.fill(array, 0xff, static_cast<std::size_t>(count) * sizeof *array);
  };
  moe::routing_table const& first = p.at(0).table;
  // Nothing that another operation left may pass for a result.
  forget(first.row_of, c.pairs());
  forget(first.pair_of, first.max_rows);
  forget(first.begin, c.of.E + 1);
  o.run(p, p.exec, 0);
  if (!p.is_right()) return state.SkipWithError("the table differs from the CPU's");
  auto const enqueue = [&](moe::gpu const& exec, int n) { o.run(p, exec, n); };
  if (o.is_captured)
    moe_bench::time_on_gpu(state, p.sets(), p.bytes(), enqueue);
  else
    moe_bench::time_eagerly(state, p.sets(), p.bytes(), enqueue);
}

bool const registered = [] {
  for (batch_case const& c : moe_bench::all_cases())
    for (operation const& o : operations)
      moe_bench::add_benchmark(c.name("build_table") + "/" + o.name, c.T,
                               [&o, c](benchmark::State& state) { run(state, o, c); });
  return true;
}();

}  // namespace
