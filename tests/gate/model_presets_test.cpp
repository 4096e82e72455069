// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <numeric>
#include <random>
#include <string>
#include <support/gradient.hpp>
#include <support/instrumented.hpp>
#include <support/laws.hpp>
#include <support/preset_run.hpp>
#include <support/reference_routers.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/gate/model_presets.hpp>

namespace {

namespace reference = moe_test::reference;
using moe_test::preset_run;
using moe_test::refusal;
using moe_test::says;
using reference::router;

constexpr double none = moe::no_score<double>;

/// What a random case may set of a preset; everything else is the preset's default.
struct random_case {
  int E = 1, T = 1, K = 1;
  int groups = 1, kept = 1;
  double factor = 1;
  bool divide = false;
  std::vector<double> logits;  ///< [T,E], floats
  std::vector<float> bias;     ///< [E] or empty
  std::vector<std::int32_t> table, word;

  float const* bias_or_null() const { return bias.empty() ? nullptr : bias.data(); }
  std::vector<double> exact_bias() const { return {bias.begin(), bias.end()}; }
};

random_case draw(std::uint32_t seed, bool gaps = true) {
  std::mt19937 random(seed);
  auto const number = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  random_case c;
  c.K = number(1, 8);
  c.groups = number(1, 4) == 1 ? 1 : number(2, 8);
  c.kept = number(1, c.groups);
  c.E = std::max({2, c.K, c.groups * number(1, seed % 10 == 0 ? 40 : 12)});
  if (number(0, 4) == 0) c.E += number(0, 3);  // groups that do not divide it
  c.T = number(1, 6);
  c.factor = std::vector<double>{1, 2.5, 16, 0.5}[static_cast<std::size_t>(number(0, 3))];
  c.divide = number(0, 1) == 1;
  std::normal_distribution<float> normal(0, 1.5f);
  for (int i = 0; i < c.T * c.E; ++i)
    c.logits.push_back(gaps && number(0, 30) == 0 ? none : double(normal(random)));
  if (number(0, 3) > 0)  // of either sign, and larger than any score
    for (int e = 0; e < c.E; ++e) c.bias.push_back(0.7f * normal(random));
  for (int w = 0; w < 5; ++w) {
    std::vector<std::int32_t> order(static_cast<std::size_t>(c.E));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    c.table.insert(c.table.end(), order.begin(), order.begin() + c.K);
  }
  for (int t = 0; t < c.T; ++t) c.word.push_back(number(0, 4));
  return c;
}

/// 1,000 random cases of one preset against the formulas, in float and in double: experts exactly.
/// @param make  make(case, t, router&) gives the library's preset, and sets the reference of token t.
template <class Make>
void compare(char const* name, Make const& make) {
  constexpr int all = moe_test::cases(1000);
  int skipped = 0, tokens = 0, short_of = 0;
  for (std::uint32_t seed = 1; seed <= all; ++seed) {
    random_case const c = draw(seed);
    std::vector<float> const narrow(c.logits.begin(), c.logits.end());
    router first;
    auto const preset = make(c, 0, first);
    preset_run const in_float(preset, narrow, c.E, moe::batch{});
    preset_run const in_double(preset, c.logits, c.E, moe::batch{});
    int const K = preset.gate.k();
    for (int t = 0; t < c.T; ++t) {
      router r;
      make(c, t, r);
      auto const begin = c.logits.begin() + t * c.E;
      auto const expected = reference::route(r, {begin, begin + c.E});
      CAPTURE(name);
      CAPTURE(seed);
      CAPTURE(t);
      ++tokens;
      REQUIRE(static_cast<int>(expected.expert.size()) == K);
      auto const same = [&](auto const& run, double tolerance) {
        for (int j = 0; j < K; ++j) {
          auto const i = static_cast<std::size_t>(j);
          REQUIRE(run.expert(t, j) == expected.expert[i]);
          double const w = static_cast<double>(run.weights[run.pair(t, j)]);
          REQUIRE(std::abs(w - expected.weight[i]) <= tolerance * (1 + expected.weight[i]));
        }
      };
      if (expected.margin > 1e-11) same(in_double, 1e-12);
      if (expected.margin > 1e-5)
        same(in_float, 3e-6);
      else
        ++skipped;
      short_of += std::count(expected.expert.begin(), expected.expert.end(), -1) > 0 ? 1 : 0;
    }
  }
  MESSAGE(std::string(name), ": ", tokens, " tokens, ", skipped, " too close to call in float, ",
          short_of, " with fewer candidates than choices");
  CHECK(skipped < tokens / 50);
  CHECK(tokens > 2 * all);
}

/// The gradient of weights and loss, against central differences of the preset itself in double.
template <class Make>
void check_gradient(Make const& make, bool with_loss = true) {
  int checked = 0;
  for (std::uint32_t seed = 1; seed <= 40; ++seed) {
    random_case const c = draw(seed);
    router r;
    auto const preset = make(c, 0, r);
    preset_run const run(preset, c.logits, c.E, moe::batch{});
    std::vector<double> dweights;
    for (std::size_t i = 0; i < run.weights.size(); ++i) dweights.push_back(0.5 - double(i % 4));
    double const dloss = with_loss ? 0.7 : 0;
    auto const dlogits = run.gradient(dweights, dloss);
    bool clear = true;
    for (int t = 0; t < c.T; ++t) {
      router own;
      make(c, t, own);
      auto const begin = c.logits.begin() + t * c.E;
      clear = clear && reference::route(own, {begin, begin + c.E}).margin > 1e-3;
    }
    if (!clear) continue;  // a step could change a choice
    CAPTURE(seed);
    ++checked;
    moe_test::check_gradient(
        [&](std::vector<double> const& l) {
          preset_run const there(preset, l, c.E, moe::batch{});
          double sum = dloss * there.loss;
          for (std::size_t i = 0; i < dweights.size(); ++i) sum += dweights[i] * there.weights[i];
          return sum;
        },
        c.logits, dlogits);
  }
  CHECK(checked > 10);
}

template <class Make>
void check_preset(char const* name, Make const& make, bool with_loss = true) {
  compare(name, make);
  check_gradient(make, with_loss);
}

/// experts and weights of one token.
template <class Preset>
std::vector<double> routed(Preset const& preset, std::vector<double> const& logits) {
  preset_run const run(preset, logits, static_cast<int>(logits.size()), moe::batch{});
  std::vector<double> both(run.routing.expert, run.routing.expert + run.K);
  both.insert(both.end(), run.weights.begin(), run.weights.end());
  return both;
}

void check_routed(std::vector<double> const& found, std::vector<double> const& expected) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) CHECK(found[i] == doctest::Approx(expected[i]));
}

double const two = std::log(2.0), three = std::log(3.0), four = std::log(4.0), ten = std::log(10.0);

}  // namespace

TEST_CASE("gate/mixtral: equals its formula, with its gradient") {
  check_preset("mixtral", [](random_case const& c, int, router& r) {
    r.k = c.K;
    r.divide = true;
    return moe::mixtral({.num_experts_per_tok = c.K});
  });
}

TEST_CASE("gate/qwen2_moe, qwen3_moe, olmoe: equal their formulas, with their gradients") {
  auto const make = [](auto const& preset) {
    return [=](random_case const& c, int, router& r) {
      r.k = c.K;
      r.divide = c.divide;
      return preset(moe::softmax_router_options{c.K, c.divide});
    };
  };
  check_preset("qwen2_moe", make([](auto const& o) { return moe::qwen2_moe(o); }));
  check_preset("qwen3_moe", make([](auto const& o) { return moe::qwen3_moe(o); }));
  check_preset("olmoe", make([](auto const& o) { return moe::olmoe(o); }));
}

TEST_CASE("gate/deepseek_v2: equals its formula, with its gradient") {
  check_preset("deepseek_v2", [](random_case const& c, int, router& r) {
    bool const divide = c.divide && c.K > 1;
    r = {.groups = c.groups, .kept_groups = c.kept, .k = c.K, .divide = divide};
    r.factor = divide ? 1 : c.factor;
    return moe::deepseek_v2({c.K, c.groups, c.kept, c.divide, c.factor});
  });
}

TEST_CASE("gate/deepseek_v3, kimi_k2, glm4_moe: equal their formulas, with their gradients") {
  auto const make = [](auto const& preset, bool groups) {
    return [=](random_case const& c, int, router& r) {
      r = {.score = router::scores::sigmoid,
           .selection_bias = c.exact_bias(),
           .groups = groups ? c.groups : 1,
           .kept_groups = groups ? c.kept : 1,
           .best_of_group = 2,
           .k = c.K,
           .divide = c.divide && c.K > 1,
           .added_to_sum = 1e-20,
           .factor = c.factor};
      return preset(moe::deepseek_v3_options{c.K, r.groups, r.kept_groups, c.divide, c.factor,
                                             c.bias_or_null()});
    };
  };
  check_preset("deepseek_v3", make([](auto const& o) { return moe::deepseek_v3(o); }, true));
  check_preset("kimi_k2", make([](auto const& o) { return moe::kimi_k2(o); }, false));
  check_preset("glm4_moe", make([](auto const& o) { return moe::glm4_moe(o); }, false));
}

TEST_CASE("gate/deepseek_v4: equals its formula, with its gradient") {
  check_preset("deepseek_v4", [](random_case const& c, int, router& r) {
    r = {.score = router::scores::root_of_softplus,
         .selection_bias = c.exact_bias(),
         .k = c.K,
         .divide = c.divide && c.K > 1,
         .added_to_sum = 1e-20,
         .factor = c.factor};
    return moe::deepseek_v4({c.K, c.divide, c.factor, c.bias_or_null()});
  });
}

TEST_CASE("gate/deepseek_v4_hash: equals its formula, with its gradient") {
  check_preset("deepseek_v4_hash", [](random_case const& c, int t, router& r) {
    auto const own = c.table.begin() + c.word[static_cast<std::size_t>(t)] * c.K;
    r = {.score = router::scores::root_of_softplus,
         .k = c.K,
         .given = {own, own + c.K},
         .divide = c.divide && c.K > 1,
         .added_to_sum = 1e-20,
         .factor = c.factor};
    for (int& e : r.given)
      if (c.logits[static_cast<std::size_t>(t * c.E + e)] == none) e = -1;
    return moe::deepseek_v4_hash({c.table.data(), 5, c.K}, c.word.data(),
                                 {c.K, c.divide, c.factor, nullptr});
  });
}

TEST_CASE("gate/llama4: equals its formula, with its gradient") {
  check_preset(
      "llama4",
      [](random_case const& c, int, router& r) {
        r = {.score = router::scores::logits,
             .k = c.K,
             .weight = router::weights::sigmoid_of_chosen};
        return moe::llama4({c.K});
      },
      false);
}

TEST_CASE("gate/gpt_oss: equals its formula, with its gradient") {
  check_preset(
      "gpt_oss",
      [](random_case const& c, int, router& r) {
        r = {.score = router::scores::logits,
             .logit_bias = c.exact_bias(),
             .k = c.K,
             .weight = router::weights::softmax_over_chosen,
             .divide = true};
        return moe::gpt_oss({c.K, c.bias_or_null()});
      },
      false);
}

TEST_CASE("gate/longcat: equals its formula, with its gradient") {
  check_preset("longcat", [](random_case const& c, int, router& r) {
    r = {.selection_bias = c.exact_bias(), .k = c.K, .factor = c.factor};
    return moe::longcat({c.K, c.factor, c.bias_or_null()});
  });
}

TEST_CASE("gate/moe_plus_plus: equals its formula, with its gradient") {
  check_preset("moe_plus_plus", [](random_case const& c, int, router& r) {
    r = {.k = 2, .zero_expert = c.E - 1, .divide = true};
    return moe::moe_plus_plus({c.E});
  });
}

TEST_CASE("gate/model_presets: worked examples") {
  // p = {1, 4, 3, 2} / 10.
  std::vector<double> const logits{0, four, three, two};
  check_routed(routed(moe::mixtral(), logits), {1, 2, 4 / 7.0, 3 / 7.0});
  check_routed(routed(moe::qwen2_moe({2, false}), logits), {1, 2, 0.4, 0.3});
  check_routed(routed(moe::qwen3_moe({2, true}), logits), {1, 2, 4 / 7.0, 3 / 7.0});
  check_routed(routed(moe::olmoe({3, false}), logits), {1, 2, 3, 0.4, 0.3, 0.2});
  // Groups {0, 1} and {2, 3}: maxima 0.4 and 0.3.
  check_routed(routed(moe::deepseek_v2({2, 2, 1, false, 16}), logits), {1, 0, 6.4, 1.6});
  // s = {1/2, 4/5, 3/4, 2/3}: sums of two 1.3 and 1.4167, so that experts 2 and 3 are chosen.
  check_routed(routed(moe::deepseek_v3({2, 2, 1, true, 2.5, nullptr}), logits),
               {2, 3, 2.5 * 9 / 17, 2.5 * 8 / 17});
  // A bias moves the choice to experts 0 and 1, whose weights are 1/2 and 4/5 over 1.3.
  float const bias[] = {10, 0, 0, 0};
  check_routed(routed(moe::deepseek_v3({2, 2, 1, true, 2.5, bias}), logits),
               {0, 1, 2.5 * 5 / 13, 2.5 * 8 / 13});
  check_routed(routed(moe::kimi_k2({1, 1, 1, true, 2.827, nullptr}), logits), {1, 0.8 * 2.827});
  check_routed(routed(moe::glm4_moe({2, 1, 1, true, 1, nullptr}), logits),
               {1, 2, 0.8 / 1.55, 0.75 / 1.55});
  double const a = std::sqrt(std::log(5.0)), b = std::sqrt(std::log(4.0));
  check_routed(routed(moe::deepseek_v4({2, true, 1.5, nullptr}), logits),
               {1, 2, 1.5 * a / (a + b), 1.5 * b / (a + b)});
  std::int32_t const table[] = {9, 9, 2, 1}, word[] = {1};
  check_routed(routed(moe::deepseek_v4_hash({table, 2, 2}, word), logits),
               {2, 1, 1.5 * b / (a + b), 1.5 * a / (a + b)});
  check_routed(routed(moe::llama4(), logits), {1, 0.8});
  check_routed(routed(moe::gpt_oss({2, bias}), {0, 10, 10 + three, 9}), {2, 0, 0.75, 0.25});
  check_routed(routed(moe::longcat({2, 6, bias}), logits), {0, 1, 0.6, 2.4});
  // The zero expert is the last: chosen, it leaves all the weight to the other.
  check_routed(routed(moe::moe_plus_plus({4}), {0, four, two, three}), {1, 3, 1, 0});
  check_routed(routed(moe::moe_plus_plus({4}), logits), {1, 2, 4 / 7.0, 3 / 7.0});
}

TEST_CASE("gate/mixtral: softmax, top-k and division are top-k and softmax") {
  for (unsigned seed = 0; seed < 200; ++seed) {
    auto const logits = moe_test::law_scores<double>(8, seed, 0, 0, 2);
    check_routed(routed(moe::mixtral(), logits), routed(moe::gpt_oss({2, nullptr}), logits));
  }
}

TEST_CASE("gate/llama4: of logits whose sigmoids are both 1 the higher wins") {
  std::vector<float> const logits{20, 30, 25};
  preset_run const run(moe::llama4(), logits, 3, moe::batch{});
  CHECK(run.expert(0, 0) == 1);
  CHECK(run.weights[0] == 1);
  CHECK(moe::llama4().apply == moe::weights_apply::before_experts);
  CHECK(moe::mixtral().apply == moe::weights_apply::after_experts);
}

TEST_CASE("gate/model_presets: the defaults of the configurations") {
  CHECK(moe::mixtral().gate.k() == 2);
  CHECK(moe::mixtral({.router_jitter_noise = 0.25f}).input_jitter == 0.25f);
  CHECK(moe::qwen2_moe().gate.k() == 4);
  CHECK(moe::qwen3_moe().gate.k() == 8);
  CHECK(moe::olmoe().gate.k() == 8);
  CHECK(moe::deepseek_v2().gate.k() == 6);
  CHECK(moe::deepseek_v3().gate.k() == 8);
  CHECK(moe::deepseek_v4().gate.k() == 6);
  CHECK(moe::llama4().gate.k() == 1);
  CHECK(moe::gpt_oss().gate.k() == 4);
  CHECK(moe::longcat().gate.k() == 12);
  CHECK(moe::moe_plus_plus().gate.k() == 2);
  // Weights of equal logits: the factor, divided or not.
  auto const sum = [](auto const& preset, int E) {
    preset_run const run(preset, std::vector<float>(static_cast<std::size_t>(E), 0.0f), E,
                         moe::batch{});
    double total = 0;
    for (float const w : run.weights) total += double(w);
    return total;
  };
  CHECK(sum(moe::qwen2_moe(), 60) == doctest::Approx(4.0 / 60));
  CHECK(sum(moe::qwen3_moe(), 128) == doctest::Approx(1));
  CHECK(sum(moe::olmoe(), 64) == doctest::Approx(8.0 / 64));
  CHECK(sum(moe::deepseek_v2(), 160) == doctest::Approx(16 * 6.0 / 160));
  CHECK(sum(moe::deepseek_v3(), 256) == doctest::Approx(2.5));
  CHECK(sum(moe::kimi_k2(), 384) == doctest::Approx(2.827));
  CHECK(sum(moe::glm4_moe(), 160) == doctest::Approx(1));
  CHECK(sum(moe::deepseek_v4(), 256) == doctest::Approx(1.5));
  CHECK(sum(moe::longcat(), 768) == doctest::Approx(6 * 12.0 / 768));
}

TEST_CASE("gate/model_presets: options out of range are refused") {
  says(refusal([] { moe::mixtral({.num_experts_per_tok = 17}); }), "top_k: 1 <= k <= MaxK");
  says(refusal([] { moe::mixtral({.router_jitter_noise = 2}); }),
       "mixtral: 0 <= router_jitter_noise <= 1; got router_jitter_noise = 2");
  says(refusal([] { moe::deepseek_v2({.topk_group = 9}); }), "group_limited: 1 <= kept <= groups");
  says(refusal([] { moe::deepseek_v3({.n_group = 0}); }), "group_limited: 1 <= kept <= groups");
  says(refusal([] { moe::moe_plus_plus({1}); }), "moe_plus_plus: num_experts >= 2");
  says(refusal([] { moe::longcat({.moe_topk = 0}); }), "top_k: 1 <= k <= MaxK");
  char const* const factor = "0 < routed_scaling_factor < 1e30";
  says(refusal([] { moe::longcat({.routed_scaling_factor = 1e39}); }), factor);
  says(refusal([] { moe::deepseek_v2({.routed_scaling_factor = 0}); }), factor);
  says(refusal([] { moe::deepseek_v3({.routed_scaling_factor = std::nan("")}); }), factor);
  says(refusal([] { moe::deepseek_v4({.routed_scaling_factor = -1}); }), factor);
}
