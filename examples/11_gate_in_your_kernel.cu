// Run a policy of your own inside a kernel of your own, one token to eight lanes of a warp.
// SPDX-License-Identifier: MIT
//
//   nvcc -std=c++20 -arch=native -I include examples/11_gate_in_your_kernel.cu -o gate && ./gate
//
// The kernel scales each token by the weight of its best expert; prints how many tokens are right.
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/lane_row.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

constexpr int T = 1000, E = 24, M = 64, width = 8;

// [policy]
/// s = l^2 / (1 + l^2): a score policy that knows a row, and nothing of lanes.
struct saturating {
  template <moe::score_row R>
  MOE_HOST_DEVICE void operator()(R& row, moe::token const&) const {
    row.transform([](int, auto l) { return moe::is_candidate(l) ? l * l / (1 + l * l) : l; });
  }
  template <moe::score_row R>
  MOE_HOST_DEVICE void backward(R const& scores, R& grad, moe::token const&) const {
    grad.transform(scores,
                   [](int, auto g, auto s) {  // ds/dl = 2 l (1 - s)^2, and l^2 = s / (1 - s)
                     return moe::is_candidate(s) ? g * 2 * sqrt(s * (1 - s)) * (1 - s) : 0;
                   });
  }
};
using my_gate = moe::gate<saturating, moe::top_k<2>, moe::renormalised>;
// [/policy]

// [kernel]
__global__ void scale_tokens(my_gate gate, float const* logits, float* tokens) {
  moe::cuda_block<128> block;
  moe::sub_warp<moe::cuda_block<128>, width> lanes(block);
  int const t = block.block() * (128 / width) + block.thread() / width;
  if (t >= T) return;  // all lanes of the token together
  using row_type = moe::lane_row<decltype(lanes), (E + width - 1) / width>;
  row_type row(lanes, E, [=](int e) { return logits[t * E + e]; });
  moe::choices<2> chosen;
  gate(row, chosen, {.id = t, .row = t});
  for (int m = lanes.rank(); m < M; m += width) tokens[t * M + m] *= chosen.weight[0];
}
// [/kernel]

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("skipped: no GPU here");
    return 0;
  }
  std::vector<float> logits(T * E), tokens(T * M, 1.0f), expected(T);
  for (int i = 0; i < T * E; ++i) logits[i] = static_cast<float>(i * 37 % 101) / 25 - 2;
  for (int t = 0; t < T; ++t) {  // the same policy on the CPU
    std::vector<float> scores(logits.begin() + t * E, logits.begin() + (t + 1) * E), room(E);
    moe::row_room<float> copies{room.data(), 1};
    moe::array_row<float> row(scores.data(), E, &copies);
    moe::choices<2> chosen;
    my_gate{}(row, chosen, {.id = t, .row = t});
    expected[t] = chosen.weight[0];
  }
  moe::gpu_buffer const logits_there(T * E * sizeof(float)), tokens_there(T * M * sizeof(float));
  auto* const l = static_cast<float*>(logits_there.data());  // [T,E]
  auto* const x = static_cast<float*>(tokens_there.data());  // [T,M]
  cudaMemcpy(l, logits.data(), logits_there.size(), cudaMemcpyHostToDevice);
  cudaMemcpy(x, tokens.data(), tokens_there.size(), cudaMemcpyHostToDevice);
  scale_tokens<<<(T + 15) / 16, 128>>>({}, l, x);
  cudaMemcpy(tokens.data(), x, tokens_there.size(), cudaMemcpyDeviceToHost);
  int right = 0;
  for (int t = 0; t < T; ++t) right += std::abs(tokens[t * M + M - 1] - expected[t]) < 1e-6f;
  std::printf("%d of %d tokens are right\n", right, T);
  return right == T ? 0 : 1;
}
