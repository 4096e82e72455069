// The same layer code on the CPU and on a GPU: gate, table, dispatch and combine take another executor.
// SPDX-License-Identifier: MIT
//
//   nvcc -std=c++20 -arch=native -I include examples/10_on_a_gpu.cu -o layer && ./layer
//
// The experts here return what they are given, so that the layer returns every token.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/moe.cuh>

namespace example {

constexpr std::int64_t T = 512, M = 256;
constexpr int E = 16, K = 2;
using router = moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised>;
constexpr moe::table_shape shape{.T = T, .K = K, .E = E, .max_rows = T * K};

// [layer]
/// Memory is the executor's: of the host for moe::cpu, of the device for moe::gpu.
template <class Executor, class Experts>
void moe_layer(Executor const& exec, moe::memory room, float const* logits, float const* tokens,
               Experts const& experts, float* out) {
  auto const site = moe::call_site::here();
  moe::routing routing = moe::carve_routing(exec, room, T, K, E);
  moe::routing_table table = moe::carve_table(exec, room, shape);
  moe::matrix_view const rows(room.take<float>(T * K * M, "moe_layer: room", site), T * K, M);

  moe::route(exec, router{}, moe::matrix_view(logits, T, E), {}, room, routing);
  moe::build_table(exec, routing, moe::table_rules{}, room, table);
  moe::dispatch(exec, moe::matrix_view(tokens, T, M), table, rows);
  experts(rows);  // rows of expert e: table.begin[e] to table.begin[e] + table.used[e]
  moe::combine(exec, rows, table, moe::vector_view<float const>(routing.weight, T * K),
               moe::matrix_view(out, T, M));
}

template <class Executor>
std::size_t room_for(Executor const& exec) {
  return moe::routing_bytes(T, K) + moe::table_bytes(shape) + T * K * M * sizeof(float) +
         std::max(moe::route_scratch<router>(exec, E), moe::build_table_scratch(exec, shape)) + 256;
}
// [/layer]

int run() {
  std::vector<float> logits(T * E), tokens(T * M), here(T * M), there(T * M);
  for (int i = 0; i < T * E; ++i) logits[i] = static_cast<float>(i * 37 % 101) / 25;
  for (int i = 0; i < T * M; ++i) tokens[i] = static_cast<float>(i % 19) - 9;

  auto const experts = [](auto) {};
  moe::cpu const cpu;
  moe::buffer const room(room_for(cpu));
  moe_layer(cpu, room, logits.data(), tokens.data(), experts, here.data());

  moe::gpu const gpu;
  moe::gpu_buffer const device_room(room_for(gpu)), in(T * (E + M) * sizeof(float)),
      out(T * M * sizeof(float));
  auto* const x = static_cast<float*>(in.data());  // logits [T,E], tokens [T,M]
  cudaMemcpy(x, logits.data(), T * E * sizeof(float), cudaMemcpyHostToDevice);
  cudaMemcpy(x + T * E, tokens.data(), T * M * sizeof(float), cudaMemcpyHostToDevice);
  moe_layer(gpu, device_room, x, x + T * E, experts, static_cast<float*>(out.data()));
  cudaMemcpy(there.data(), out.data(), out.size(), cudaMemcpyDeviceToHost);

  int wrong = 0;
  for (std::size_t i = 0; i < here.size(); ++i)
    wrong += std::abs(here[i] - tokens[i]) > 1e-5f || std::abs(there[i] - here[i]) > 1e-5f;
  std::printf("%d of %d values differ\n", wrong, static_cast<int>(here.size()));
  return wrong == 0 ? 0 : 1;
}

}  // namespace example

int main() try { return example::run(); } catch (moe::cuda_error const& e) {
  std::printf("skipped: %s\n", e.what());
}
