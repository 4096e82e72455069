// The product with the router and route in one launch for a few tokens, beside cuBLAS and route.
// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/gate/project_and_route.cuh>
#include <moe/gate/route.cuh>
#include <moe/routing/routing.cuh>

#include "gate/gate_problem.cuh"
#include "support/gpu_problem.cuh"
#include "support/gpu_timing.cuh"
#include "support/matrix_products.cuh"

namespace {

using moe_bench::batch_case;
using moe_bench::bf16;

/// Tokens and routers of bf16 in sets that follow one another: as if each were another layer's.
struct problem {
  moe::gpu exec;  // first: without a device nothing else is tried
  moe_bench::matrix_products products;
  batch_case of;
  int sets;
  moe::gpu_buffer room, tickets;
  struct set {
    moe::matrix_view<bf16> x, router;  // [T,M], [E,M]
    moe::matrix_view<float> logits;    // [T,E]
    moe::routing routed;
    std::int32_t* ticket;
    moe::memory scratch;
  };
  std::vector<set> all;

  explicit problem(batch_case const& c)
      : of(c), sets(moe_bench::sets_past_cache(static_cast<std::size_t>(bytes()))) {
    std::int64_t const T = of.T, E = of.of.E, M = of.of.M;
    std::size_t const scratch = moe::project_and_route_scratch(exec, T, E, M);
    auto const scratch_bytes = static_cast<std::int64_t>(scratch);
    std::size_t const each = moe::memory_size()
                                 .add<bf16>(T * M)
                                 .add<bf16>(E * M)
                                 .add<float>(T * E)
                                 .add<std::byte>(scratch_bytes)
                                 .bytes() +
                             moe::routing_bytes(T, of.of.K);
    room = moe::gpu_buffer(each * static_cast<std::size_t>(sets));
    tickets = moe::gpu_buffer(static_cast<std::size_t>(sets) * sizeof(std::int32_t));
    exec.fill(tickets.data(), 0, tickets.size());
    moe::memory from = room;
    auto const site = moe::call_site::here();
    // Logits of about the size of 1.
    float const scale = 3 / std::sqrt(static_cast<float>(M));
    for (int n = 0; n < sets; ++n) {
      set s;
      s.x = {from.take<bf16>(T * M, "benchmark", site), T, M};
      s.router = {from.take<bf16>(E * M, "benchmark", site), E, M};
      s.logits = {from.take<float>(T * E, "benchmark", site), T, E};
      s.scratch = {from.take<std::byte>(scratch_bytes, "benchmark", site), scratch};
      s.routed = moe::carve_routing(exec, from, T, of.of.K, of.of.E);
      s.routed.score = nullptr;
      s.ticket = static_cast<std::int32_t*>(tickets.data()) + n;
      moe_bench::fill_at_random(exec, s.x.data(), T * M);
      moe_bench::fill_at_random(exec, s.router.data(), E * M, scale);
      all.push_back(s);
    }
  }

  /// Tokens and the router read, ids and weights written.
  double bytes() const {
    return 2.0 * static_cast<double>((of.T + of.of.E) * of.of.M) +
           8.0 * static_cast<double>(of.pairs());
  }
  set const& at(int n) const { return all[static_cast<std::size_t>(n)]; }

  /// Logits of the first set, summed in double.
  std::vector<float> logits() const {
    std::int64_t const T = of.T, E = of.of.E, M = of.of.M;
    auto const x = moe_bench::download(at(0).x.data(), T * M);
    auto const router = moe_bench::download(at(0).router.data(), E * M);
    std::vector<float> sums;
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t e = 0; e < E; ++e) {
        double sum = 0;
        for (std::int64_t c = 0; c < M; ++c)
          sum +=
              static_cast<double>(static_cast<float>(x[static_cast<std::size_t>(t * M + c)])) *
              static_cast<double>(static_cast<float>(router[static_cast<std::size_t>(e * M + c)]));
        sums.push_back(static_cast<float>(sum));
      }
    return sums;
  }
};

template <class Gate>
void fused(problem const& p, moe::gpu const& exec, Gate const& gate, int n) {
  problem::set const& s = p.at(n);
  moe::routing routed = s.routed;
  moe::project_and_route(exec, gate, s.x, s.router, moe::batch{}, s.ticket, s.scratch, routed);
}

template <class Gate>
void apart(problem const& p, moe::gpu const& exec, Gate const& gate, int n) {
  problem::set const& s = p.at(n);
  moe::routing routed = s.routed;
  p.products(exec, moe_bench::transposed::right, s.x, s.router, s.logits);
  moe::route(exec, gate, s.logits, moe::batch{}, {}, routed);
}

template <class Gate>
void add(batch_case const& c, char const* operation, Gate const& gate,
         void (*enqueue)(problem const&, moe::gpu const&, Gate const&, int)) {
  moe_bench::add_benchmark(
      c.name(operation) + "/bf16", c.T, [c, gate, enqueue](benchmark::State& state) {
        auto const& p = moe_bench::shared_problem<problem>(c);
        moe::thread_team team(8);
        moe::cpu const host(team);
        moe_bench::forget(p.exec, p.at(0).routed);
        enqueue(p, p.exec, gate, 0);
        auto const logits = p.logits();
        moe_bench::expected_routing const expected(
            host, gate, moe::matrix_view<float const>(logits.data(), c.T, c.of.E));
        auto const& found = p.at(0).routed;
        if (!expected.equals(found.expert, found.weight, 1e-4f, 1e-4f))
          return state.SkipWithError("choices differ from the CPU's");
        moe_bench::time_on_gpu(state, p.sets, p.bytes(),
                               [&](moe::gpu const& exec, int n) { enqueue(p, exec, gate, n); });
      });
}

template <class Gate>
void add_both(batch_case const& c, Gate const& gate) {
  add<Gate>(c, "project_and_route", gate, fused<Gate>);
  add<Gate>(c, "cublas_and_route", gate, apart<Gate>);
}

bool const registered = [] {
  for (moe_bench::model const& m : moe_bench::models)
    for (std::int64_t const T : {1, 8, 16})
      if (m.K == 2)
        add_both({m, T}, moe_bench::softmax_gate<2>);
      else
        add_both({m, T}, moe_bench::softmax_gate<8>);
  return true;
}();

}  // namespace
