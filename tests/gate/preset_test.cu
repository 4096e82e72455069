#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/gpu.cuh>
#include <moe/gate/jitter.cuh>
#include <moe/gate/preset.cuh>
#include <moe/gate/presets.hpp>
#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>

#include "support/device.cuh"

using moe_test::on_device;

namespace {

constexpr std::int64_t T = 4096;
constexpr int E = 64;

/// What a preset makes of logits, and the gradient of a loss of all of it.
struct outcome {
  std::vector<std::int32_t> expert, row_of;
  std::vector<float> weights, dlogits;
  moe::table_counts counts;
  double loss = -1;
};

struct problem {
  std::vector<float> logits = std::vector<float>(T * E), dweights;
  std::vector<std::uint8_t> live = std::vector<std::uint8_t>(T, 1);

  explicit problem(int K) {
    std::mt19937 random(5);
    for (float& l : logits) l = static_cast<float>(random() >> 8) * 0x1p-22f - 2;
    for (std::size_t t = 0; t < T; ++t) logits[t * E] += 1;  // crowded
    for (std::size_t t = 3; t < T; t += 10) live[t] = 0;
    logits[7 * E + 2] = -moe::no_score<float>;
    for (std::int64_t i = 0; i < T * K; ++i) dweights.push_back(static_cast<float>(i % 7) - 3);
  }
};

template <class Preset>
outcome on_cpu(Preset const& preset, problem const& p) {
  moe::cpu const exec;
  int const K = preset.gate.k();
  moe::routing_buffer routed(T, K, E);
  moe::table_buffer table(moe::preset_table_shape(preset, T, E));
  moe::buffer const scratch(moe::preset_scratch(exec, preset, T, E));
  moe::matrix_view<float const> const logits(p.logits.data(), T, E);
  outcome o;
  o.weights.resize(p.dweights.size());
  o.dlogits.resize(p.logits.size());
  moe::batch const tokens{.seed = 9, .step = 4, .training = true, .live = p.live.data()};
  o.loss = moe::apply_preset(exec, preset, logits, tokens, {}, scratch, routed, table, o.weights);
  moe::apply_preset_backward(exec, preset, logits, routed, table, p.dweights, 0.5, scratch,
                             {o.dlogits.data(), T, E});
  o.expert.assign(routed.expert, routed.expert + T * K);
  o.row_of.assign(table.row_of, table.row_of + T * K);
  o.counts = *table.counts;
  return o;
}

template <class Preset>
outcome on_gpu(Preset const& preset, problem const& p) {
  int const K = preset.gate.k();
  auto const shape = moe::preset_table_shape(preset, T, E);
  on_device<float> const logits(p.logits), dweights(p.dweights), weights(p.dweights.size()),
      dlogits(p.logits.size());
  on_device<std::uint8_t> const live(p.live);
  on_device<double> const loss(1);
  moe::gpu_buffer const arrays(moe::routing_bytes(T, K) + moe::table_bytes(shape)),
      scratch(moe::preset_scratch(moe::gpu(), preset, T, E));
  moe::matrix_view<float const> const in(logits.data(), T, E);
  moe::batch const tokens{.seed = 9, .step = 4, .training = true, .live = live.data()};
  moe::routing routed;
  moe::routing_table table;
  moe_test::replay_as_graph([&](moe::gpu const& exec) {
    moe::memory from = arrays;
    routed = moe::carve_routing(exec, from, T, K, E);
    table = moe::carve_table(exec, from, shape);
    moe::apply_preset(exec, preset, in, tokens, {}, scratch, routed, table, {weights.data(), T * K},
                      loss.data());
    moe::apply_preset_backward(exec, preset, in, routed, table, {dweights.data(), T * K}, 0.5,
                               scratch, {dlogits.data(), T, E});
  });
  auto const fetch = [](auto* to, auto const* from, std::size_t count) {
    moe::detail::check_cuda(cudaMemcpy(to, from, count * sizeof(*to), cudaMemcpyDeviceToHost),
                            "fetch", {});
  };
  outcome o;
  o.expert.resize(p.dweights.size());
  o.row_of.resize(p.dweights.size());
  fetch(o.expert.data(), routed.expert, o.expert.size());
  fetch(o.row_of.data(), table.row_of, o.row_of.size());
  fetch(&o.counts, table.counts, 1);
  o.weights = weights.get();
  o.dlogits = dlogits.get();
  o.loss = loss.get()[0];
  return o;
}

template <class Preset>
void check_preset(Preset const& preset) {
  problem const p(preset.gate.k());
  outcome const expected = on_cpu(preset, p), found = on_gpu(preset, p);
  // Exponentials differ in their last bits, so that close scores may change places: rarely.
  std::size_t other_experts = 0, other_rows = 0;
  for (std::size_t i = 0; i < expected.expert.size(); ++i) {
    other_experts += found.expert[i] == expected.expert[i] ? 0 : 1;
    other_rows += found.row_of[i] == expected.row_of[i] ? 0 : 1;
  }
  CHECK(other_experts <= 2);
  if (other_experts == 0) {
    CHECK(other_rows <= 2);
    CHECK(found.counts == expected.counts);
  }
  CHECK(found.loss == doctest::Approx(expected.loss).epsilon(1e-5));
  double difference = 0, size = 0;
  for (std::size_t i = 0; i < expected.dlogits.size(); ++i) {
    double const d =
        static_cast<double>(found.dlogits[i]) - static_cast<double>(expected.dlogits[i]);
    difference += d * d;
    size += static_cast<double>(expected.dlogits[i]) * static_cast<double>(expected.dlogits[i]);
  }
  CHECK(difference <= 1e-6 * size);
}

}  // namespace

TEST_CASE("gate/preset on a GPU: what the CPU makes, in a graph") {
  MOE_NEEDS_GPU();
  check_preset(moe::deepspeed_top2({.capacity_factor = 0.7}));
  check_preset(
      moe::tutel_topk({.k = 4, .capacity_factor = 0.9, .batch_prioritized_routing = true}));
}

TEST_CASE("gate/jitter on a GPU: the elements of the CPU") {
  MOE_NEEDS_GPU();
  constexpr std::int64_t M = 1027;
  std::vector<float> tokens(T * M), expected(T * M);
  for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<float>(i % 13) - 6.5f;
  moe::batch const ids{.first_id = 1000, .seed = 5, .step = 2, .training = true};
  moe::jitter(moe::cpu{}, moe::matrix_view<float const>(tokens.data(), T, M), 0.1f, ids,
              moe::matrix_view<float>(expected.data(), T, M));
  on_device<float> const there(tokens);
  moe::matrix_view<float> const view(there.data(), T, M);
  moe::jitter(moe::gpu(), view, 0.1f, ids, view);
  auto const found = there.get();
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    wrong += found[i] == doctest::Approx(expected[i]).epsilon(1e-6) ? 0 : 1;
  CHECK(wrong == 0);
}
