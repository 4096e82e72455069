#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/gate/preset.cuh>
#include <moe/gate/presets.hpp>

#include "emulator/emulated_gpu.hpp"

using moe_test::emulated_gpu;

namespace {

constexpr std::int64_t T = 90;
constexpr int E = 12;

/// What a preset makes of these logits, and the gradient of a loss of everything it makes.
struct outcome {
  std::vector<std::int32_t> expert, row_of;
  std::vector<float> weights, dlogits;
  moe::table_counts counts;
  double loss = -1;
};

template <class Executor, class Preset>
outcome apply(Executor const& exec, Preset const& preset, bool training) {
  std::mt19937 random(5);
  std::vector<float> logits(T * E);
  for (float& l : logits) l = static_cast<float>(random() >> 8) * 0x1p-22f - 2;
  for (std::int64_t t = 0; t < T; ++t) logits[static_cast<std::size_t>(t * E)] += 1;  // crowded
  std::vector<std::uint8_t> live(T, 1);
  for (std::size_t t = 3; t < T; t += 10) live[t] = 0;
  logits[7 * E + 2] = -moe::no_score<float>;
  moe::batch const tokens{.seed = 9, .step = 4, .training = training, .live = live.data()};

  int const K = preset.gate.k();
  moe::routing_buffer routed(T, K, E);
  moe::table_buffer table(moe::preset_table_shape(preset, T, E));
  std::vector<std::byte> scratch(moe::preset_scratch(exec, preset, T, E));
  moe::memory const room(scratch.data(), scratch.size());
  moe::matrix_view<float const> const in(logits.data(), T, E);
  outcome o;
  o.weights.resize(static_cast<std::size_t>(T * K));
  if constexpr (moe::kernel_executor<Executor>)
    moe::apply_preset(exec, preset, in, tokens, {}, room, routed, table, o.weights, &o.loss);
  else
    o.loss = moe::apply_preset(exec, preset, in, tokens, {}, room, routed, table, o.weights);
  o.expert.assign(routed.expert, routed.expert + T * K);
  o.row_of.assign(table.row_of, table.row_of + T * K);
  o.counts = *table.counts;

  std::vector<float> dweights;
  for (std::int64_t i = 0; i < T * K; ++i) dweights.push_back(static_cast<float>(i % 7) - 3);
  o.dlogits.resize(logits.size(), 99);
  moe::apply_preset_backward(exec, preset, in, routed, table, dweights, 0.5, room,
                             {o.dlogits.data(), T, E});
  return o;
}

template <class Preset>
void check_preset(Preset const& preset) {
  for (bool const training : {true, false}) {
    outcome const expected = apply(moe::cpu{}, preset, training);
    moe_test::on_emulator([&](emulated_gpu const& exec) {
      outcome const found = apply(exec, preset, training);
      CHECK(found.expert == expected.expert);
      CHECK(found.row_of == expected.row_of);
      CHECK(found.counts == expected.counts);
      // Scores are added up in float within a chunk of tokens.
      CHECK(found.loss == doctest::Approx(expected.loss).epsilon(1e-6));
      for (std::size_t i = 0; i < found.weights.size(); ++i) {
        bool const same = found.weights[i] == doctest::Approx(expected.weights[i]).epsilon(1e-6);
        CHECK(same);
      }
      for (std::size_t i = 0; i < found.dlogits.size(); ++i) {
        bool const same =
            found.dlogits[i] == doctest::Approx(expected.dlogits[i]).epsilon(1e-4).scale(0.1);
        CHECK(same);
      }
    });
  }
}

}  // namespace

TEST_CASE("gate/preset on kernels: DeepSpeed's, masked tokens in the loss, random and by score") {
  check_preset(moe::deepspeed_top1({.capacity_factor = 0.8}));
  check_preset(moe::deepspeed_top2({.capacity_factor = 0.7}));
}

TEST_CASE("gate/preset on kernels: Tutel's and Switch's, by position and by priority") {
  check_preset(
      moe::tutel_topk({.k = 3, .capacity_factor = 0.9, .batch_prioritized_routing = true}));
  check_preset(moe::switch_transformer({.capacity_factor = 0.9}));
}

TEST_CASE("gate/preset on kernels: a loss that nobody asked for") {
  auto const preset = moe::deepspeed_top2({});
  emulated_gpu const exec;
  std::vector<float> logits(10 * E, 1.0f), weights(20);
  moe::routing_buffer routed(10, 2, E);
  moe::table_buffer table(moe::preset_table_shape(preset, 10, E));
  moe::buffer const scratch(moe::preset_scratch(exec, preset, 10, E));
  moe::apply_preset(exec, preset, moe::matrix_view<float const>(logits.data(), 10, E), {}, {},
                    scratch, routed, table, weights, nullptr);
  CHECK(table.counts->kept + table.counts->dropped == 20);
}
