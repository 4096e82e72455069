// Inference over packed weights: pack a checkpoint once, then run the experts, in bf16 or in half.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/18_packed_inference.cpp -o packed_inference -pthread
//
// The checkpoint has its matrices as [out, in]. Prints how many bytes the weights take, and how far the
// outputs are from those of float weights.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_ffn.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

constexpr int T = 64, M = 64, H = 192, E = 8;

int main() {
  moe::thread_team team(2);
  moe::cpu const exec(team);
  std::vector<float> up(E * H * M), gate(E * H * M), down(E * M * H), router(M * E), x(T * M);
  int n = 0;
  for (auto* part : {&up, &gate, &down, &router, &x})
    for (float& v : *part) v = 0.3f * std::sin(static_cast<float>(++n));
  auto const preset = moe::tutel_topk({.k = 2, .capacity_factor = 0});

  auto const run = [&](auto const& layer, auto pack_experts) {
    std::vector<float> values(static_cast<std::size_t>(layer.parameter_elements()));
    auto const parameters = layer.carve(values.data());
    std::copy(router.begin(), router.end(), parameters.router.data());
    pack_experts(parameters.experts);
    moe::buffer const saved_bytes(layer.template saved_bytes<float>());
    moe::buffer const scratch(layer.template scratch_bytes<float>(exec));
    auto saved = layer.template carve_saved<float>(saved_bytes);
    std::vector<float> out(T * M);
    layer.template forward<float>(exec, parameters, {x, T, M}, {}, {out, T, M}, saved, scratch);
    return out;
  };

  // [pack]
  moe::ffn_weights<float> checkpoint;
  checkpoint.up = {up.data(), E, H, M};
  checkpoint.gate = {gate.data(), E, H, M};
  checkpoint.down = {down.data(), E, M, H};
  auto const pack = [&](auto const& packed) {
    moe::pack(exec, checkpoint, moe::orientation::out_in, packed);
  };
  moe::layer_shape const shape{.T = T, .M = M, .H = H, .E = E};
  moe::moe_layer const in_bf16(preset, moe::packed_ffn<moe::swiglu, moe::bf16>{}, shape);
  std::vector<float> const of_bf16 = run(in_bf16, pack);
  // [/pack]
  std::vector<float> const of_half =
      run(moe::moe_layer(preset, moe::packed_ffn<moe::swiglu, moe::half>{}, shape), pack);
  std::vector<float> const of_float =
      run(moe::moe_layer(preset, moe::packed_ffn<moe::swiglu>{}, shape), pack);

  auto const error = [&](std::vector<float> const& out) {
    double off = 0, norm = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      off += std::pow(out[i] - of_float[i], 2);
      norm += std::pow(of_float[i], 2);
    }
    return std::sqrt(off / norm);
  };
  moe::ffn_shape const experts{E, M, H};
  std::printf("float: %zu bytes of experts\n", moe::packed_bytes<float>(experts, true));
  std::printf("bf16:  %zu bytes, outputs within 1%%: %s\n",
              moe::packed_bytes<moe::bf16>(experts, true), error(of_bf16) < 1e-2 ? "yes" : "no");
  std::printf("half:  %zu bytes, outputs within 0.1%%: %s\n",
              moe::packed_bytes<moe::half>(experts, true), error(of_half) < 1e-3 ? "yes" : "no");
  return error(of_bf16) < 1e-2 && error(of_half) < 1e-3 && error(of_bf16) > 0 ? 0 : 1;
}
