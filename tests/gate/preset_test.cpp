// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <support/preset_run.hpp>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/preset.hpp>
#include <moe/gate/presets.hpp>

using moe_test::preset_run;

namespace {

std::vector<float> random_logits(std::int64_t T, int E, std::uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> logits(static_cast<std::size_t>(T * E));
  for (float& l : logits) l = normal(random);
  return logits;
}

/// Calls f with each preset.
template <class F>
void for_each_preset(F const& f) {
  f(moe::deepspeed_top1({.noisy_gate_policy = moe::noisy_gate::rsample}));
  f(moe::deepspeed_top2());
  f(moe::deepspeed_topk());
  f(moe::tutel_topk({.k = 2, .gate_noise = 1, .batch_prioritized_routing = true}));
  f(moe::switch_transformer());
  f(moe::gshard());
}

template <class Run>
bool same_bits(Run const& a, Run const& b) {
  return std::memcmp(&a.loss, &b.loss, sizeof a.loss) == 0 && a.weights == b.weights &&
         *a.table.counts == *b.table.counts &&
         std::equal(a.table.row_of, a.table.row_of + a.table.pairs(), b.table.row_of);
}

}  // namespace

TEST_CASE("gate/preset: worked example") {
  // Both tokens prefer expert 0, which has room for one; logs make the softmax exact.
  std::vector<float> const logits{std::log(0.5f), std::log(0.3f), std::log(0.2f),  //
                                  std::log(0.6f), std::log(0.1f), std::log(0.3f)};
  auto router = moe::deepspeed_top2({.top2_2nd_expert_sampling = false});
  router.rules.cap = moe::capacity::fixed(1);
  preset_run const run(router, logits, 3, moe::batch{.training = true});
  CHECK(run.slot(0, 0) == 0);
  CHECK(run.slot(0, 1) == 0);
  CHECK(run.slot(1, 0) == -1);
  CHECK(run.slot(1, 1) == 0);
  CHECK(run.weights[0] == doctest::Approx(0.5 / 0.8));
  CHECK(run.weights[1] == doctest::Approx(0.3 / 0.8));
  CHECK(run.weights[2] == 0.0f);
  CHECK(run.weights[3] == doctest::Approx(1));   // the survivor takes all
  CHECK(run.loss == doctest::Approx(3 * 0.55));  // both first choices at expert 0
}

TEST_CASE("gate/preset: random overflow and sampling are off outside training unless asked for") {
  auto const logits = random_logits(200, 4, 1);
  auto const slots = [&](auto const& preset, std::uint32_t step, bool training) {
    preset_run const run(preset, logits, 4, moe::batch{.step = step, .training = training});
    return std::vector<std::int32_t>(run.table.row_of, run.table.row_of + run.table.pairs());
  };
  auto const differs = [&](auto const& preset, bool training) {
    return slots(preset, 1, training) != slots(preset, 2, training);
  };
  CHECK(differs(moe::deepspeed_top1(), true));
  CHECK_FALSE(differs(moe::deepspeed_top1(), false));
  CHECK(differs(moe::deepspeed_top1({.use_rts_in_evaluation = true}), false));
  CHECK_FALSE(differs(moe::deepspeed_top1({.use_rts = false}), true));
  CHECK(differs(
      moe::deepspeed_top1({.use_rts = false, .noisy_gate_policy = moe::noisy_gate::rsample}),
      true));
  CHECK_FALSE(differs(
      moe::deepspeed_top1({.use_rts = false, .noisy_gate_policy = moe::noisy_gate::rsample}),
      false));
  CHECK(differs(moe::deepspeed_top2(), true));
  CHECK_FALSE(differs(moe::deepspeed_top2(), false));
  CHECK(differs(moe::deepspeed_top2({.sample_in_evaluation = true}), false));
  CHECK_FALSE(differs(
      moe::deepspeed_top2({.top2_2nd_expert_sampling = false, .sample_in_evaluation = true}),
      false));
  CHECK(differs(moe::gshard(), true));
  CHECK_FALSE(differs(moe::gshard(), false));
  CHECK_FALSE(differs(moe::gshard({.random_routing = false}), true));
  CHECK(differs(moe::tutel_topk({.gate_noise = 1}), true));
  CHECK_FALSE(differs(moe::tutel_topk({.gate_noise = 1}), false));
  CHECK_FALSE(differs(moe::tutel_topk(), true));
}

TEST_CASE("gate/preset: random token selection fills experts with random tokens, in token order") {
  std::int64_t const T = 400;
  std::vector<float> logits(static_cast<std::size_t>(T * 4));
  for (std::size_t t = 0; t < 400; ++t) logits[4 * t] = 5;  // all want expert 0; C = 100
  std::vector<int> kept(400);
  for (std::uint32_t step = 0; step < 50; ++step) {
    preset_run const run(moe::deepspeed_top1(), logits, 4,
                         moe::batch{.step = step, .training = true});
    REQUIRE(run.table.counts->capacity == 100);
    REQUIRE(run.table.counts->kept == 100);
    REQUIRE(run.table.counts->dropped == 300);
    int next = 0;
    for (std::int64_t t = 0; t < T; ++t)
      if (run.slot(t, 0) >= 0) {
        REQUIRE(run.slot(t, 0) == next++);
        ++kept[static_cast<std::size_t>(t)];
      }
  }
  // Each token is kept in 12.5 of 50 steps on average, standard deviation 3.
  CHECK(*std::max_element(kept.begin(), kept.end()) < 28);
  CHECK(std::count(kept.begin(), kept.end(), 0) < 2);
}

TEST_CASE("gate/preset: without dropping nothing is dropped, random selection or not") {
  std::vector<float> logits(400);
  for (std::size_t t = 0; t < 100; ++t) logits[4 * t] = 5;
  for (bool rts : {false, true}) {
    preset_run const run(moe::deepspeed_top1({.drop_tokens = false, .use_rts = rts}), logits, 4,
                         moe::batch{.training = true});
    CHECK(run.table.counts->kept == 100);
    CHECK(run.table.counts->capacity == 100);
  }
  preset_run const prioritised(
      moe::tutel_topk({.k = 2, .capacity_factor = 0, .batch_prioritized_routing = true}),
      random_logits(300, 7, 3), 7, moe::batch{.training = true});
  CHECK(prioritised.table.counts->kept == 600);
  auto const& table = prioritised.table;
  CHECK(table.counts->capacity == *std::max_element(table.wanted, table.wanted + 7));
}

TEST_CASE("gate/preset: a token with NaN is counted, has no weight and no gradient") {
  for_each_preset([](auto const& preset) {
    auto logits = random_logits(20, 5, 4);
    logits[7] = std::numeric_limits<float>::quiet_NaN();
    logits[36] = std::numeric_limits<float>::infinity();
    preset_run const run(preset, logits, 5, moe::batch{.training = true});
    CHECK(run.table.counts->invalid_tokens == 2);
    CHECK(run.loss == run.loss);
    for (std::int64_t t : {1, 7})
      for (int j = 0; j < run.K; ++j) CHECK(run.weights[run.pair(t, j)] == 0);
    auto const d = run.gradient(std::vector<float>(run.weights.size(), 1), 1);
    for (std::size_t i = 0; i < d.size(); ++i) {
      REQUIRE(std::isfinite(d[i]));
      if (i / 5 == 1 || i / 5 == 7) CHECK(d[i] == 0);
    }
  });
}

TEST_CASE("gate/preset: no tokens") {
  for_each_preset([](auto const& preset) {
    preset_run const run(preset, std::vector<float>{}, 5, moe::batch{.training = true});
    CHECK(run.loss == 0);
    CHECK(run.table.counts->kept == 0);
    CHECK(run.gradient({}, 1).empty());
  });
}

TEST_CASE("gate/preset: tokens without candidates and batches of masked ones choose nothing") {
  std::vector<std::uint8_t> const masked(6, 0);
  for_each_preset([&](auto const& preset) {
    std::vector<float> const none(6 * 5, moe::no_score<float>);
    preset_run const empty(preset, none, 5, moe::batch{.training = true});
    CHECK(empty.table.counts->missing == 6 * empty.K);
    preset_run const absent(preset, random_logits(6, 5, 9), 5,
                            moe::batch{.training = true, .live = masked.data()});
    CHECK(absent.table.counts->masked_tokens == 6);
    for (auto const* run : {&empty, &absent}) {
      CHECK(run->table.counts->kept == 0);
      CHECK(run->loss == 0);
      CHECK(run->weights == std::vector<float>(run->weights.size(), 0.0f));
    }
    CHECK(empty.gradient(std::vector<float>(empty.weights.size(), 1), 1) ==
          std::vector<float>(none.size(), 0.0f));
  });
}

TEST_CASE("gate/preset: one expert, as many choices as experts, logits at the end of float") {
  auto const finite = [](auto const& preset, std::vector<float> const& logits, int E) {
    for (bool const training : {false, true}) {
      preset_run const run(preset, logits, E, moe::batch{.training = training});
      CHECK(run.table.counts->missing == 0);
      CHECK(std::isfinite(run.loss));
      for (float w : run.weights) CHECK(std::isfinite(w));
      for (float d : run.gradient(std::vector<float>(run.weights.size(), 1), 1))
        CHECK(std::isfinite(d));
    }
  };
  constexpr float most = std::numeric_limits<float>::max();
  for (int const E : {1, 2, 16}) {
    CAPTURE(E);
    auto logits = random_logits(40, E, 10);
    for (std::size_t i = 0; i < logits.size(); i += 3) logits[i] = i % 2 == 0 ? most : -most;
    finite(moe::deepspeed_topk({.k = E}), logits, E);
    finite(moe::tutel_topk({.k = E, .gate_noise = 1, .batch_prioritized_routing = true}), logits,
           E);
    finite(moe::deepspeed_top1({.noisy_gate_policy = moe::noisy_gate::rsample}), logits, E);
    finite(moe::switch_transformer(), logits, E);
    if (E < 2) continue;
    finite(moe::deepspeed_top2(), logits, E);
    finite(moe::gshard({.random_routing = false}), logits, E);
  }
}

TEST_CASE("gate/preset: the same bits for any number of threads") {
  auto const logits = random_logits(2000, 12, 5);
  std::vector<std::uint8_t> live(2000, 1);
  for (std::size_t t = 0; t < live.size(); t += 9) live[t] = 0;
  moe::batch const tokens{.seed = 3, .training = true, .live = live.data()};
  for_each_preset([&](auto const& preset) {
    preset_run const one(preset, logits, 12, tokens);
    std::vector<float> const dweights = random_logits(2000, one.K, 6);
    for (int threads : {2, 3, 7}) {
      moe::thread_team team(threads);
      preset_run const many(preset, logits, 12, tokens, moe::cpu(team));
      CHECK(same_bits(one, many));
      CHECK(one.gradient(dweights, 0.01) == many.gradient(dweights, 0.01, team));
    }
  });
}

TEST_CASE("gate/preset: padded rows change where rows are, not what is kept") {
  auto const logits = random_logits(64, 6, 7);
  auto router = moe::deepspeed_topk({.capacity_factor = 0.5, .min_capacity = 0});
  preset_run const packed(router, logits, 6, moe::batch{.training = true});
  router.rules.rows = moe::layout::padded;
  preset_run const padded(router, logits, 6, moe::batch{.training = true});
  CHECK(packed.weights == padded.weights);
  CHECK(padded.table.begin[6] == 6 * padded.table.counts->capacity);
  for (std::int64_t t = 0; t < 64; ++t)
    for (int j = 0; j < 3; ++j) CHECK(packed.slot(t, j) == padded.slot(t, j));
}

TEST_CASE("gate/preset: what the caller must apply is said by the preset") {
  CHECK(moe::tutel_topk().apply == moe::weights_apply::after_experts);
  CHECK(moe::tutel_topk({.is_postscore = false}).apply == moe::weights_apply::before_experts);
  CHECK(moe::switch_transformer().input_jitter == 0.01f);
  CHECK(moe::deepspeed_top1().input_jitter == 0);
  CHECK(moe::deepspeed_top1({.noisy_gate_policy = moe::noisy_gate::jitter}).input_jitter == 0.01f);
  CHECK(moe::deepspeed_top2({.jitter = true}).input_jitter == 0.01f);
  CHECK(moe::deepspeed_topk({.jitter = true}).input_jitter == 0.01f);
}

TEST_CASE("gate/preset: refuses short scratch, shapes that disagree, options out of range") {
  auto const router = moe::deepspeed_top2();
  auto const logits = random_logits(300, 5, 8);
  moe::cpu const exec;
  moe::routing_buffer routing(300, 2, 5);
  moe::table_buffer table(moe::preset_table_shape(router, 300, 5));
  std::vector<float> weights(600);
  auto const apply = [&](moe::memory scratch, moe::vector_view<float> w) {
    moe::apply_preset(exec, router, moe::matrix_view(logits, 300, 5), {}, {}, scratch, routing,
                      table, w);
  };
  moe::buffer const scratch(moe::preset_scratch(exec, router, 300, 5));
  CHECK_NOTHROW(apply(scratch, weights));
  CHECK_THROWS_WITH_AS(
      apply(moe::buffer(100), weights),
      doctest::Contains("apply_preset: scratch >= preset_scratch(exec, preset, T, E)"),
      moe::precondition_error);
  CHECK_THROWS_WITH_AS(
      apply(scratch, {weights.data(), 599}),
      doctest::Contains("apply_preset: weights is [T*K]; got size = 599, T = 300, K = 2"),
      moe::precondition_error);
  CHECK_THROWS_WITH_AS(apply(scratch, {weights.data(), 599}), doctest::Contains("preset_test.cpp"),
                       moe::precondition_error);
  std::vector<float> dlogits(1500);
  CHECK_THROWS_WITH_AS(
      moe::apply_preset_backward(exec, router, moe::matrix_view(logits, 300, 5), routing, table,
                                 weights, 1, moe::memory{}, {dlogits, 300, 5}),
      doctest::Contains("apply_preset_backward: scratch >= preset_scratch"),
      moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::deepspeed_topk({.k = 17}), doctest::Contains("top_k: 1 <= k <= MaxK"),
                       moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::tutel_topk({.gate_noise = -1}),
                       doctest::Contains("tutel_topk: 0 <= gate_noise <= 1e9; got gate_noise = -1"),
                       moe::precondition_error);
  CHECK_THROWS_AS(moe::tutel_topk({.gate_noise = 1e300}), moe::precondition_error);
  CHECK_THROWS_AS(moe::tutel_topk({.gate_noise = std::nan("")}), moe::precondition_error);
  for (float const jitter : {-0.01f, 1.01f, std::nanf("")})
    CHECK_THROWS_WITH_AS(moe::switch_transformer({.jitter = jitter}),
                         doctest::Contains("switch_transformer: 0 <= jitter <= 1"),
                         moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::deepspeed_top1({.capacity_factor = 0}),
                       doctest::Contains("capacity::deepspeed"), moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::deepspeed_top1({.drop_tokens = false, .tensor_parallel = 0}),
                       doctest::Contains("capacity::dropless"), moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::switch_transformer({.min_capacity = -1}),
                       doctest::Contains("capacity::switch_transformer"), moe::precondition_error);
}
