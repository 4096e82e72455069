// visit_preset and visit_activation: each name gives its type, options arrive, the rest is refused.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <doctest/doctest.h>
#include <string>
#include <string_view>
#include <typeinfo>

#include <moe/layer/visit_preset.hpp>

#include "support/refusal.hpp"

namespace {

using moe_test::refusal;
using moe_test::says;
using rule = moe::capacity_rule::kind;

std::string refusal_of(std::string_view name, moe::preset_options const& options) {
  return refusal([&] { moe::visit_preset(name, options, [](auto const&) {}); });
}

/// What arrived, without the type.
struct seen {
  int k;
  moe::table_rules rules;
  moe::kept_weights kept;
  moe::weights_apply apply;
  float jitter;
  std::type_info const* type;
};
template <class Preset>
seen see(Preset const& p) {
  return {p.gate.k(), p.rules, p.kept, p.apply, p.input_jitter, &typeid(Preset)};
}
seen visit(std::string_view name, moe::preset_options const& options = {}) {
  return moe::visit_preset(name, options, [](auto const& preset) { return see(preset); });
}
void check_same(seen const& a, seen const& b) {
  CHECK(*a.type == *b.type);
  CHECK(a.k == b.k);
  CHECK(a.rules.cap == b.rules.cap);
  CHECK(a.rules.rank == b.rules.rank);
  CHECK(a.rules.when_full == b.rules.when_full);
  CHECK(a.rules.rows == b.rules.rows);
  CHECK(a.kept == b.kept);
  CHECK(a.apply == b.apply);
  CHECK(a.jitter == b.jitter);
}

}  // namespace

TEST_CASE("layer/visit_preset: a name without options is the preset with its defaults") {
  check_same(visit("deepspeed_top1"), see(moe::deepspeed_top1()));
  check_same(visit("deepspeed_top2"), see(moe::deepspeed_top2()));
  check_same(visit("deepspeed_topk"), see(moe::deepspeed_topk()));
  check_same(visit("tutel_topk"), see(moe::tutel_topk()));
  check_same(visit("switch_transformer"), see(moe::switch_transformer()));
  check_same(visit("gshard"), see(moe::gshard()));
}

TEST_CASE("layer/visit_preset: options arrive") {
  moe::preset_options const all{
      .experts = 8, .capacity_factor = 1.5, .eval_capacity_factor = 3, .min_capacity = 7};
  check_same(visit("deepspeed_top1", all),
             see(moe::deepspeed_top1(
                 {.capacity_factor = 1.5, .eval_capacity_factor = 3, .min_capacity = 7})));
  check_same(visit("deepspeed_top2", all),
             see(moe::deepspeed_top2(
                 {.capacity_factor = 1.5, .eval_capacity_factor = 3, .min_capacity = 7})));
  moe::preset_options five = all;
  five.k = 5;
  check_same(visit("deepspeed_topk", five),
             see(moe::deepspeed_topk(
                 {.k = 5, .capacity_factor = 1.5, .eval_capacity_factor = 3, .min_capacity = 7})));
  check_same(visit("switch_transformer", all),
             see(moe::switch_transformer(
                 {.capacity_factor = 1.5, .eval_capacity_factor = 3, .min_capacity = 7})));
  check_same(visit("gshard", {.k = 2, .capacity_factor = 1.5, .eval_capacity_factor = 3}),
             see(moe::gshard({.capacity_factor = 1.5, .eval_capacity_factor = 3})));
  check_same(visit("tutel_topk",
                   {.k = 4, .experts = 4, .capacity_factor = -2.0, .weights_before_experts = true}),
             see(moe::tutel_topk({.k = 4, .capacity_factor = -2, .is_postscore = false})));
  // E = k is enough; an unknown E is never too few.
  CHECK(visit("deepspeed_topk", {.k = 16}).k == 16);
}

TEST_CASE("layer/visit_preset: drop_tokens = false is dropless everywhere") {
  int checked = 0;
  for (auto name : {"deepspeed_top1", "deepspeed_top2", "deepspeed_topk", "tutel_topk",
                    "switch_transformer", "gshard"}) {
    CHECK(visit(name).rules.cap.rule != rule::dropless);
    CHECK(visit(name, {.capacity_factor = 1.5, .drop_tokens = false}).rules.cap.rule ==
          rule::dropless);
    ++checked;
  }
  CHECK(checked == 6);
}

TEST_CASE("layer/visit_preset: what f returns comes back, references too") {
  int const of_caller = 3;
  int const& back =
      moe::visit_preset("gshard", {}, [&](auto const&) -> int const& { return of_caller; });
  CHECK(&back == &of_caller);
}

TEST_CASE("layer/visit_preset: what is wrong is refused, by name") {
  says(refusal_of("top_2", {}),
       "visit_preset: a known preset; got \"top_2\", known: deepspeed_top1, deepspeed_top2, "
       "deepspeed_topk, tutel_topk, switch_transformer, gshard (called at ");
  says(refusal_of("", {}), "got \"\", known");
  says(refusal_of("GShard", {}), "got \"GShard\"");
  // The view need not end where its array does.
  says(refusal_of(std::string_view("gshard!", 7), {}), "got \"gshard!\"");
  says(refusal_of(std::string_view("gshard!", 6), {}), "nothing was thrown");

  says(refusal_of("deepspeed_top1", {.k = 2}),
       "visit_preset: the preset chooses k experts; got k = 2, least = 1, most = 1");
  says(refusal_of("switch_transformer", {.k = 2}), "k = 2, least = 1, most = 1");
  says(refusal_of("deepspeed_top2", {.k = 1}), "k = 1, least = 2, most = 2");
  says(refusal_of("gshard", {.k = 3}), "k = 3, least = 2, most = 2");
  says(refusal_of("deepspeed_topk", {.k = 0}), "k = 0, least = 1, most = 16");
  says(refusal_of("tutel_topk", {.k = 17}), "k = 17, least = 1, most = 16");
  says(refusal_of("tutel_topk", {.k = 5, .experts = 4}),
       "visit_preset: k <= experts; got k = 5, experts = 4");
  says(refusal_of("gshard", {.experts = 1}), "k = 2, experts = 1");  // the default k, too
  says(refusal_of("gshard", {.experts = -1}), "visit_preset: experts >= 0; got experts = -1");

  says(refusal_of("tutel_topk", {.eval_capacity_factor = 1}),
       "visit_preset: the preset has an eval_capacity_factor");
  says(refusal_of("tutel_topk", {.min_capacity = 1}),
       "visit_preset: the preset has a min_capacity");
  says(refusal_of("gshard", {.min_capacity = 1}), "visit_preset: the preset has a min_capacity");
  says(refusal_of("gshard", {.weights_before_experts = true}),
       "visit_preset: the preset has weights_before_experts");
  says(refusal_of("gshard", {.capacity_factor = -1}), "capacity");
}

TEST_CASE("layer/visit_preset: activations by name") {
  int plain = 0, gated = 0;
  auto const value = [&](std::string_view name) {
    return moe::visit_activation(name, [&](auto const& act) -> double {
      if constexpr (moe::is_gated<std::remove_cvref_t<decltype(act)>>) {
        ++gated;
        return act(0.75, 1.5);
      } else {
        ++plain;
        return act(0.75);
      }
    });
  };
  double const sigmoid = 0.75 / (1 + std::exp(-0.75)),
               erf = 0.375 * (1 + std::erf(0.75 / std::sqrt(2.0))),
               tanh = 0.375 * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) *
                                             (0.75 + 0.044715 * 0.421875)));
  CHECK(value("relu") == 0.75);
  CHECK(value("silu") == doctest::Approx(sigmoid).epsilon(1e-12));
  CHECK(value("gelu") == doctest::Approx(erf).epsilon(1e-12));
  CHECK(value("gelu_tanh") == doctest::Approx(tanh).epsilon(1e-12));
  CHECK(value("swiglu") == doctest::Approx(1.5 * sigmoid).epsilon(1e-12));
  CHECK(value("geglu") == doctest::Approx(1.5 * erf).epsilon(1e-12));
  CHECK(value("geglu_tanh") == doctest::Approx(1.5 * tanh).epsilon(1e-12));
  CHECK(value("clamped_swiglu") ==
        doctest::Approx(2.5 * 0.75 / (1 + std::exp(-1.702f * 0.75))).epsilon(1e-7));
  CHECK(plain == 4);
  CHECK(gated == 4);
  says(refusal([&] { value("tanh"); }),
       "visit_activation: a known activation; got \"tanh\", known: relu, silu, gelu, gelu_tanh, "
       "swiglu, geglu, geglu_tanh, clamped_swiglu (called at ");
}
