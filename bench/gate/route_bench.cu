// Route on a GPU, with and without sums for tables and losses, beside one warp for each token that looks for
// the highest score K times.
// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/gate/route.cuh>

#include "gate/gate_problem.cuh"
#include "support/gpu_problem.cuh"
#include "support/gpu_timing.cuh"

namespace {

using moe_bench::batch_case;
using moe_bench::bf16;
using moe_bench::gate_problem;

/// The obvious gate: softmax, then K times the best of what is left, renormalised.
template <class L>
struct argmax_kernel {
  static constexpr int threads = 256, warps = threads / moe::warp_size, most = 512;
  struct shared {
    float row[warps][most];
  };
  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, moe::matrix_view<L const> logits, int K,
                                  std::int32_t* expert, float* weight) const {
    b.wait_for_previous();
    int const warp = b.thread() / 32, lane = b.thread() % 32;
    auto const E = static_cast<int>(logits.cols());
    std::int64_t const t = std::int64_t(b.block()) * warps + warp;
    if (t >= logits.rows()) return;
    float* const row = s.row[warp];  // lane l looks at every 32nd from l
    float highest = moe::no_score<float>, total = 0, sum = 0, own = 0;
    for (int e = lane; e < E; e += 32) {
      row[e] = static_cast<float>(logits(t, e));
      highest = highest < row[e] ? row[e] : highest;
    }
    for (int bits = 16; bits > 0; bits /= 2) {
      float const other = b.shuffle_xor(moe::all_lanes, highest, bits);
      highest = highest < other ? other : highest;
    }
    for (int e = lane; e < E; e += 32) total += row[e] = moe::exp(row[e] - highest);
    for (int bits = 16; bits > 0; bits /= 2) total += b.shuffle_xor(moe::all_lanes, total, bits);
    for (int j = 0; j < K; ++j) {
      float best = -1;
      int at = E;
      for (int e = lane; e < E; e += 32)
        if (row[e] > best) best = row[at = e];
      for (int bits = 16; bits > 0; bits /= 2) {
        float const other = b.shuffle_xor(moe::all_lanes, best, bits);
        int const its = b.shuffle_xor(moe::all_lanes, at, bits);
        if (other > best || (other == best && its < at)) best = other, at = its;
      }
      if (at % 32 == lane) row[at] = -1;
      if (lane == 0) expert[t * K + j] = at;
      sum += best / total;
      if (lane == j) own = best / total;
    }
    if (lane < K) weight[t * K + lane] = own / sum;
  }
};

/// Times enqueue(exec, set), which makes the choices of `gate`, after a look at those of the first set.
template <class L, class Gate, class Enqueue>
void run(benchmark::State& state, gate_problem<L> const& p, Gate const& gate, double bytes,
         Enqueue const& enqueue) {
  moe::thread_team team(8);
  moe::cpu const host(team);
  auto const& first = p.at(0);
  moe_bench::forget(p.exec, first.routed);
  enqueue(p.exec, first);
  if (!moe_bench::expected_routing(host, gate, p.on_host())
           .equals(first.routed.expert, first.routed.weight, 1e-5f, 1e-6f))
    return state.SkipWithError("choices differ from the CPU's");
  moe_bench::time_on_gpu(state, p.count(), bytes,
                         [&](moe::gpu const& exec, int set) { enqueue(exec, p.at(set)); });
}

/// Whether the sums of the first set count its own pairs.
template <class L>
bool counts_pairs(gate_problem<L> const& p) {
  auto const& s = p.at(0);
  int const E = s.routed.E;
  auto counts = moe_bench::download(s.sums.pairs, s.sums.chunks * (E + 4));
  auto const ids = moe_bench::download(s.routed.expert, s.routed.pairs());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    auto const chunk = static_cast<std::int64_t>(i) / s.routed.K / s.sums.chunk;
    --counts[static_cast<std::size_t>(chunk * (E + 4) + ids[i])];
  }
  for (std::int32_t const left : counts)
    if (left != 0) return false;
  return true;
}

template <class L, class Gate>
void add_gate(batch_case const& c, std::string const& operation, Gate const& gate) {
  auto const name = [&](std::string const& what) {
    return c.name(what.c_str()) + "/" + moe_bench::name_of<L>;
  };
  moe_bench::add_benchmark(name(operation), c.T, [c, gate](benchmark::State& state) {
    auto const& p = moe_bench::shared_problem<gate_problem<L>>(c);
    run(state, p, gate, p.logit_bytes() + p.choice_bytes(),
        [&](moe::gpu const& exec, auto const& set) {
          moe::routing routed = set.routed;
          moe::route(exec, gate, set.logits, moe::batch{}, {}, routed);
        });
  });
  moe_bench::add_benchmark(name(operation + "_sums"), c.T, [c, gate](benchmark::State& state) {
    auto const& p = moe_bench::shared_problem<gate_problem<L>>(c);
    std::int64_t const chunks = p.at(0).sums.chunks;
    double const sum_bytes = static_cast<double>(chunks) * (12.0 * p.of.of.E + 32);
    auto const enqueue = [&](moe::gpu const& exec, auto const& set) {
      moe::routing routed = set.routed;
      moe::route(exec, gate, set.logits, moe::batch{}, {}, routed, {}, set.sums);
    };
    p.exec.fill(p.at(0).sums.pairs, 0x7f, static_cast<std::size_t>(chunks * (p.of.of.E + 4)) * 4);
    enqueue(p.exec, p.at(0));
    if (!counts_pairs(p)) return state.SkipWithError("sums count other pairs");
    run(state, p, gate, p.logit_bytes() + p.choice_bytes() + sum_bytes, enqueue);
  });
}

template <class L>
void add_case(batch_case const& c) {
  auto const add_softmax = [&](auto const& gate) {
    add_gate<L>(c, "route", gate);
    moe_bench::add_benchmark(c.name("route_by_argmax") + "/" + moe_bench::name_of<L>, c.T,
                             [c, gate](benchmark::State& state) {
                               auto const& p = moe_bench::shared_problem<gate_problem<L>>(c);
                               constexpr int warps = argmax_kernel<L>::warps;
                               run(state, p, gate, p.logit_bytes() + p.choice_bytes(),
                                   [&](moe::gpu const& exec, auto const& set) {
                                     exec.launch("route_by_argmax", argmax_kernel<L>{},
                                                 (c.T + warps - 1) / warps, moe::call_site::here(),
                                                 moe::matrix_view<L const>(set.logits), c.of.K,
                                                 set.routed.expert, set.routed.weight);
                                   });
                             });
  };
  if (c.of.K == 2)
    add_softmax(moe_bench::softmax_gate<2>);
  else
    add_softmax(moe_bench::softmax_gate<8>);
  if (c.of.E >= 256) add_gate<L>(c, "route_sigmoid", moe_bench::sigmoid_gate);
}

bool const registered = [] {
  for (batch_case const& c : moe_bench::gate_cases()) {
    add_case<float>(c);
    add_case<bf16>(c);
  }
  return true;
}();

}  // namespace
