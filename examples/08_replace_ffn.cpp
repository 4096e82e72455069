// Replace the dense FFN of an existing model by an MoE layer: the same class before and after.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/08_replace_ffn.cpp -o replace -pthread && ./replace
//
// Every expert starts as a copy of the dense FFN: the outputs are the same. Prints the parameters.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

constexpr int T = 16, M = 8, H = 32, E = 4;

// [before]
struct dense_ffn {
  std::vector<float> up, down;  // [M,H], [H,M]

  void forward(float const* x, float* out) const {
    for (int t = 0; t < T; ++t, x += M, out += M) {
      std::fill_n(out, M, 0.0f);
      for (int h = 0; h < H; ++h) {
        float u = 0;
        for (int m = 0; m < M; ++m) u += x[m] * up[std::size_t(m * H + h)];
        for (int m = 0; m < M; ++m) out[m] += std::max(u, 0.0f) * down[std::size_t(h * M + m)];
      }
    }
  }
};
// [/before]

// [after]
class sparse_ffn {
 public:
  explicit sparse_ffn(dense_ffn const& from) {
    for (int e = 0; e < E; ++e) {
      std::copy(from.up.begin(), from.up.end(), weights().experts.up[e].data());
      std::copy(from.down.begin(), from.down.end(), weights().experts.down[e].data());
    }
    for (int i = 0; i < M * E; ++i) values_[std::size_t(i)] = std::cos(1.3f * float(i));
  }
  std::size_t parameters() const { return values_.size(); }

  void forward(float const* x, float* out) {
    layer_.forward(exec_, weights(), {x, T, M}, {}, {out, T, M}, saved_, scratch_);
  }

 private:
  moe::layer_weights<float> weights() { return layer_.carve(values_.data()); }

  moe::cpu exec_;
  decltype(moe::tutel_topk()) router_ = moe::tutel_topk({.k = 2, .capacity_factor = 0});
  moe::moe_layer<decltype(router_), moe::ffn<moe::relu>> layer_{router_, {}, {T, M, H, E}};
  std::vector<float> values_ = std::vector<float>(std::size_t(layer_.parameter_elements()));
  moe::buffer saved_bytes_{layer_.saved_bytes<float>()};
  moe::buffer scratch_{layer_.scratch_bytes<float>(exec_)};
  moe::layer_saved<float> saved_ = layer_.carve_saved<float>(saved_bytes_);
};
// [/after]

int main() {
  dense_ffn dense{std::vector<float>(M * H), std::vector<float>(H * M)};
  std::vector<float> x(T * M), before(x.size()), after(x.size());
  for (std::size_t i = 0; i < M * H; ++i) dense.up[i] = 0.3f * std::sin(0.9f * float(i));
  for (std::size_t i = 0; i < M * H; ++i) dense.down[i] = 0.3f * std::cos(0.8f * float(i));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.7f * float(i));
  sparse_ffn sparse(dense);
  dense.forward(x.data(), before.data());
  sparse.forward(x.data(), after.data());

  float most = 0;
  for (std::size_t i = 0; i < x.size(); ++i) most = std::max(most, std::abs(before[i] - after[i]));
  std::printf("parameters: %d, then %zu\n", 2 * M * H, sparse.parameters());
  std::printf("difference: %s\n", most < 1e-5f ? "below 1e-5" : "too large");
  return most < 1e-5f && before[0] != 0 && sparse.parameters() == 2 * M * H * E + M * E ? 0 : 1;
}
