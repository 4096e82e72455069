// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <support/instrumented.hpp>
#include <support/preset_run.hpp>
#include <support/reference_presets.hpp>
#include <vector>

#include <moe/gate/presets.hpp>

namespace {

namespace reference = moe_test::reference;
using moe_test::given_noise;
using moe_test::preset_run;
using reference::full;
using reference::original;

constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

/// One random case; every array also in float, for the library to read.
struct random_case {
  reference::problem p;
  std::vector<float> selection, noise, withdraw, priority;
  std::vector<std::uint8_t> live;
  moe::batch tokens;

  template <class Random>
  int draw(Random& random, int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  }

  explicit random_case(std::uint32_t seed, bool clean = false) {
    std::mt19937 random(seed);
    auto const chance = [&](double odds) {
      return std::uniform_real_distribution<double>(0, 1)(random) < odds;
    };
    p.gate = static_cast<original>(draw(random, 0, 5));
    bool const one = p.gate == original::deepspeed_top1 || p.gate == original::switch_transformer;
    bool const two = p.gate == original::deepspeed_top2 || p.gate == original::gshard;
    p.K = one ? 1 : two ? 2 : draw(random, 1, 4);
    p.E = draw(random, p.K, 20);
    p.T = clean ? draw(random, 1, 12) : draw(random, 1, 64);

    auto const floats = [&](std::vector<double>& slow, std::vector<float>& fast, int n,
                            auto distribution) {
      fast.resize(static_cast<std::size_t>(n));
      for (float& v : fast) v = static_cast<float>(distribution(random));
      slow.assign(fast.begin(), fast.end());
    };
    std::vector<float> logits;
    floats(p.logits, logits, p.T * p.E, std::normal_distribution<double>(0, 1.5));
    std::extreme_value_distribution<double> const gumbel;
    std::uniform_real_distribution<double> const uniform(0, 1);

    bool const deepspeed = p.gate <= original::deepspeed_topk;
    p.drop = !deepspeed || chance(0.8);
    p.factor =
        std::array{0.25, 0.5, 1.0, 1.05, 1.25, 2.0}[static_cast<std::size_t>(draw(random, 0, 5))];
    p.min_capacity = chance(0.5) ? 0 : draw(random, 1, 8);
    if (p.gate == original::tutel) {
      if (chance(0.4)) p.factor = chance(0.5) ? 0 : -p.factor;
      p.alignment = chance(0.7) ? 1 : draw(random, 2, 4);
      p.normalise = chance(0.5);
      if (chance(0.4)) p.when_full = full::batch_prioritised;
      if (chance(0.5)) {
        floats(p.noise, noise, p.T * p.E, std::normal_distribution<double>(0, 1));
        for (double& n : p.noise) n *= static_cast<double>(0.75f) / p.E;
      }
    }
    if (p.gate == original::deepspeed_topk && chance(0.6)) p.when_full = full::score;
    if (p.gate == original::deepspeed_top1 && chance(0.6)) {
      p.when_full = full::given;
      floats(p.priority, priority, p.T * p.E, uniform);
    }
    if ((p.gate == original::deepspeed_top1 || p.gate == original::deepspeed_top2) && chance(0.6))
      floats(p.selection, selection, p.T * p.E, gumbel);
    if (p.gate == original::gshard && chance(0.8)) floats(p.withdraw, withdraw, p.T, uniform);

    live.assign(static_cast<std::size_t>(p.T), 1);
    if (chance(0.4))
      for (auto& l : live) l = chance(0.2) ? 0 : 1;
    p.live.assign(live.begin(), live.end());
    if (!clean && chance(0.15))
      for (double& l : p.logits)
        if (chance(0.1)) l = minus_infinity;
    if (!clean && chance(0.1))
      p.logits[static_cast<std::size_t>(draw(random, 0, p.T * p.E - 1))] = std::nan("");
    tokens = {.training = true, .live = live.data()};
    // GShard's second choice is withdrawn in training alone.
    if (p.gate == original::gshard && p.withdraw.empty()) tokens.training = false;
  }

  /// Calls f with the library's preset of this case.
  template <class F>
  void with_preset(F const& f) const {
    given_noise const by_selection{selection.data(), p.E}, by_noise{noise.data(), p.E};
    auto const prioritised = [&](auto const& preset) {
      if (p.when_full == full::given)
        f(preset.with_overflow(given_noise{priority.data(), p.E}));
      else
        f(preset);
    };
    switch (p.gate) {
      case original::deepspeed_top1:
        prioritised(moe::deepspeed_top1(
            {.capacity_factor = p.factor,
             .min_capacity = p.min_capacity,
             .drop_tokens = p.drop,
             .use_rts = false,
             .noisy_gate_policy =
                 p.selection.empty() ? moe::noisy_gate::none : moe::noisy_gate::rsample},
            by_selection));
        break;
      case original::deepspeed_top2:
        f(moe::deepspeed_top2({.capacity_factor = p.factor,
                               .min_capacity = p.min_capacity,
                               .drop_tokens = p.drop,
                               .top2_2nd_expert_sampling = !p.selection.empty()},
                              by_selection));
        break;
      case original::deepspeed_topk:
        f(moe::deepspeed_topk({.k = p.K,
                               .capacity_factor = p.factor,
                               .min_capacity = p.min_capacity,
                               .drop_tokens = p.drop,
                               .drop_policy = p.when_full == full::score
                                                  ? moe::overflow::score
                                                  : moe::overflow::position}));
        break;
      case original::tutel: {
        moe::tutel_topk_options const options{
            .k = p.K,
            .capacity_factor = p.factor,
            .alignment = p.alignment,
            .gate_noise = p.noise.empty() ? 0 : 0.75,
            .batch_prioritized_routing = p.when_full == full::batch_prioritised,
            .normalize_gate = p.normalise};
        if (p.noise.empty())
          f(moe::tutel_topk(options));
        else
          f(moe::tutel_topk(options, by_noise));
        break;
      }
      case original::switch_transformer:
        f(moe::switch_transformer({.capacity_factor = p.factor, .min_capacity = p.min_capacity}));
        break;
      case original::gshard:
        f(moe::gshard({.capacity_factor = p.factor, .eval_capacity_factor = p.factor},
                      given_noise{withdraw.data(), 1}));
        break;
    }
  }
};

/// The number of things that differ between a preset and the reference.
template <class Run>
int differences(Run const& run, reference::result const& expected, double tolerance) {
  int wrong = 0;
  if (run.table.counts->capacity != expected.C) ++wrong;
  for (int e = 0; e < run.E; ++e)
    if (run.table.wanted[e] != expected.wanted[static_cast<std::size_t>(e)]) ++wrong;
  for (std::int64_t t = 0; t < run.T; ++t)
    for (int j = 0; j < run.K; ++j) {
      std::size_t const i = run.pair(t, j);
      if (std::max(run.expert(t, j), -1) != expected.expert[i]) ++wrong;
      if (run.slot(t, j) != expected.slot[i]) ++wrong;
      if (!(std::abs(static_cast<double>(run.weights[i]) - expected.weight[i]) < tolerance))
        ++wrong;
    }
  if (!(std::abs(run.loss - expected.loss) < tolerance * (1 + expected.loss))) ++wrong;
  return wrong;
}

}  // namespace

TEST_CASE("gate/presets: equal the formulas on random input, in float") {
  constexpr int all = moe_test::cases(12000);
  int compared = 0, skipped = 0, dropped = 0;
  std::array<int, 6> of_each{};
  for (std::uint32_t seed = 1; seed <= all; ++seed) {
    random_case const c(seed);
    auto const expected = reference::run(c.p);
    if (expected.margin < 5e-6) {
      ++skipped;
      continue;
    }
    std::vector<float> const logits(c.p.logits.begin(), c.p.logits.end());
    c.with_preset([&](auto const& preset) {
      preset_run const run(preset, logits, c.p.E, c.tokens);
      CAPTURE(seed);
      CAPTURE(static_cast<int>(c.p.gate));
      REQUIRE(differences(run, expected, 3e-6) == 0);
      dropped += run.table.counts->dropped > 0 ? 1 : 0;
    });
    ++compared;
    ++of_each[static_cast<std::size_t>(c.p.gate)];
  }
  MESSAGE("compared ", compared, ", skipped as too close to call ", skipped, ", with drops ",
          dropped);
  CHECK(compared > all / 100 * 99);
  CHECK(compared + skipped == all);
  CHECK(dropped > all / 3);
  for (int n : of_each) CHECK(n > all / 8);
}

TEST_CASE("gate/presets: equal the formulas on random input, in double") {
  constexpr int all = moe_test::cases(1000);
  int compared = 0;
  for (std::uint32_t seed = 50001; seed <= 50000 + all; ++seed) {
    random_case const c(seed);
    auto const expected = reference::run(c.p);
    if (expected.margin < 1e-6) continue;  // overflow compares scores as float
    c.with_preset([&](auto const& preset) {
      preset_run const run(preset, c.p.logits, c.p.E, c.tokens);
      CAPTURE(seed);
      REQUIRE(differences(run, expected, 1e-12) == 0);
    });
    ++compared;
  }
  CHECK(compared > all / 20 * 19);
}

TEST_CASE("gate/presets: gradients are the central differences of the formulas") {
  constexpr int all = moe_test::cases(600);
  int compared = 0;
  for (std::uint32_t seed = 1; seed <= all; ++seed) {
    random_case c(seed, true);
    auto const expected = reference::run(c.p);
    if (expected.margin < 1e-3) continue;  // a step could change a decision
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::vector<double> dweights(static_cast<std::size_t>(c.p.T * c.p.K));
    for (double& d : dweights) d = normal(random);
    double const dloss = normal(random);
    auto const objective = [&] {
      auto const r = reference::run(c.p);
      double sum = dloss * r.loss;
      for (std::size_t i = 0; i < dweights.size(); ++i) sum += dweights[i] * r.weight[i];
      return sum;
    };
    c.with_preset([&](auto const& preset) {
      preset_run const run(preset, c.p.logits, c.p.E, c.tokens);
      auto const dlogits = run.gradient(dweights, dloss);
      for (std::size_t i = 0; i < dlogits.size(); ++i) {
        double const before = c.p.logits[i], h = 1e-5;
        c.p.logits[i] = before + h;
        double const up = objective();
        c.p.logits[i] = before - h;
        double const down = objective();
        c.p.logits[i] = before;
        CAPTURE(seed);
        CAPTURE(i);
        REQUIRE(std::abs(dlogits[i] - (up - down) / (2 * h)) < 1e-8 * (1 + std::abs(dlogits[i])));
      }
    });
    ++compared;
  }
  MESSAGE("compared ", compared, " of ", all, " gradients");
  CHECK(compared > all / 3 * 2);
}
