// Run a whole MoE layer forward: router, capacity, SwiGLU experts, combine; watch it by hooks.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/05_layer_forward.cpp -o layer -pthread && ./layer
//
// Prints the memory of the layer, how many tokens each expert got, and the balance loss.
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/expert/initialise.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

// [hooks]
/// Called between the stages, on the calling thread; a hook object has those it wants.
struct watch {
  std::int64_t rows = 0;
  double norm = 0;

  void rows_in(moe::matrix_view<float const> in) { rows = in.rows(); }
  void output(moe::matrix_view<float const> out) {
    for (std::int64_t t = 0; t < out.rows(); ++t)
      for (std::int64_t m = 0; m < out.cols(); ++m) norm += out(t, m) * out(t, m);
  }
};
// [/hooks]

int main() {
  constexpr int T = 64, M = 16, E = 8;
  moe::thread_team team(2);
  moe::cpu const exec(team);

  // [make]
  moe::moe_layer const layer(moe::deepspeed_top2({.eval_capacity_factor = 1.5}),
                             moe::ffn<moe::swiglu>{}, {.T = T, .M = M, .H = 32, .E = E});
  std::vector<float> values(static_cast<std::size_t>(layer.parameter_elements()));
  auto const parameters = layer.carve(values.data());
  moe::buffer const saved_bytes(layer.saved_bytes<float>());
  moe::buffer const scratch(layer.scratch_bytes<float>(exec));
  auto saved = layer.carve_saved<float>(saved_bytes);
  // [/make]
  std::printf("parameters %zu, saved %zu bytes\n", values.size(), saved_bytes.size());

  std::vector<float> x(T * M), out(T * M);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.7f * static_cast<float>(i));
  for (std::size_t i = 0; i < M * E; ++i) values[i] = std::cos(1.3f * static_cast<float>(i));
  moe::initialise(exec, parameters.experts);

  // [forward]
  watch hooks;
  moe::layer_losses const losses =
      layer.forward(exec, parameters, {x.data(), T, M}, {.training = false}, {out.data(), T, M},
                    saved, scratch, hooks);
  // [/forward]
  int kept = 0;
  for (int e = 0; e < E; ++e) {
    std::printf("expert %d: %d tokens\n", e, saved.table.used[e]);
    kept += saved.table.used[e];
  }
  auto const dropped = static_cast<int>(saved.table.counts->dropped);
  std::printf("dropped %d, balance loss %.3f\n", dropped, losses.balance);

  bool const right = kept + dropped == 2 * T && hooks.rows == kept && hooks.norm > 0 &&
                     std::isfinite(hooks.norm) && losses.balance > 0;
  return right ? 0 : 1;
}
