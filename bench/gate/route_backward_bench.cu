// The gradient of route on a GPU, from the choices and the logits again.
// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
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

template <class L, class Gate>
void backward(gate_problem<L> const& p, moe::gpu const& exec, Gate const& gate, int n) {
  auto const& set = p.at(n);
  moe::route_backward(exec, gate, set.logits, set.routed, {set.dweight, p.of.T, p.of.of.K},
                      {.expert = p.dexpert_there()}, {}, set.dlogits);
}

/// Whether the gradient of the first set is that of the CPU for the same choices.
template <class L, class Gate>
bool is_right(gate_problem<L> const& p, Gate const& gate) {
  moe::thread_team team(8);
  moe::cpu const host(team);
  auto const& set = p.at(0);
  auto expert = moe_bench::download(set.routed.expert, p.of.pairs());
  moe::routing chosen = set.routed;
  chosen.expert = expert.data();
  std::vector<L> dlogits(p.logits.size());
  moe::buffer const scratch(moe::route_scratch<Gate>(host, p.of.of.E));
  moe::route_backward(host, gate, p.on_host(), chosen, {p.dweight.data(), p.of.T, p.of.of.K},
                      {.expert = p.dexpert}, scratch,
                      moe::matrix_view<L>(dlogits.data(), p.of.T, p.of.of.E));
  p.exec.fill(set.dlogits.data(), 0xff, p.logits.size() * sizeof(L));
  backward(p, p.exec, gate, 0);
  auto const found = moe_bench::download(set.dlogits.data(), p.of.T * p.of.of.E);
  float const scale = std::is_same_v<L, float> ? 1e-5f : 0.01f;
  for (std::size_t i = 0; i < found.size(); ++i) {
    auto const a = static_cast<float>(found[i]), b = static_cast<float>(dlogits[i]);
    if (!(std::abs(a - b) <= 2e-5f + scale * std::abs(b))) return false;
  }
  return true;
}

template <class L, class Gate>
void add(batch_case const& c, char const* operation, Gate const& gate) {
  moe_bench::add_benchmark(
      c.name(operation) + "/" + moe_bench::name_of<L>, c.T, [c, gate](benchmark::State& state) {
        auto const& p = moe_bench::shared_problem<gate_problem<L>>(c);
        for (auto const& set : p.sets) {
          moe::routing routed = set.routed;
          moe::route(p.exec, gate, set.logits, moe::batch{}, {}, routed);
        }
        if (!is_right(p, gate)) return state.SkipWithError("the gradient differs from the CPU's");
        // Logits, ids and gradients of weights read; gradients of logits written.
        moe_bench::time_on_gpu(state, p.count(), 2 * p.logit_bytes() + p.choice_bytes(),
                               [&](moe::gpu const& exec, int n) { backward(p, exec, gate, n); });
      });
}

template <class L>
void add_case(batch_case const& c) {
  if (c.of.K == 2)
    add<L>(c, "route_backward", moe_bench::softmax_gate<2>);
  else
    add<L>(c, "route_backward", moe_bench::softmax_gate<8>);
  if (c.of.E >= 256) add<L>(c, "route_sigmoid_backward", moe_bench::sigmoid_gate);
}

bool const registered = [] {
  for (batch_case const& c : moe_bench::gate_cases()) {
    add_case<float>(c);
    add_case<bf16>(c);
  }
  return true;
}();

}  // namespace
