// SPDX-License-Identifier: MIT
#include <cstddef>
#include <doctest/doctest.h>
#include <string>
#include <support/preset_run.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <utility>
#include <vector>

#include <moe/layer/visit_model_preset.hpp>

namespace {

using moe_test::refusal;
using moe_test::says;

constexpr int E = 32;

/// Experts and weights of some tokens.
template <class Preset>
std::vector<float> run(Preset const& preset) {
  auto const logits = moe_test::normals<float>(7 * E, 3);
  moe_test::preset_run const made(preset, logits, E, moe::batch{});
  std::vector<float> both = made.weights;
  for (std::size_t i = 0; i < made.weights.size(); ++i)
    both.push_back(static_cast<float>(made.routing.expert[i]));
  both.push_back(preset.apply == moe::weights_apply::before_experts ? 1.0f : 0.0f);
  return both;
}

std::vector<float> visited(char const* name, moe::model_preset_options const& options = {}) {
  return moe::visit_model_preset(name, options, [](auto const& preset) { return run(preset); });
}

std::string refusal_of(char const* name, moe::model_preset_options const& options = {}) {
  return refusal([&] { visited(name, options); });
}

}  // namespace

TEST_CASE("layer/visit_model_preset: without options the presets' own defaults") {
  CHECK(visited("mixtral") == run(moe::mixtral()));
  CHECK(visited("qwen2_moe") == run(moe::qwen2_moe()));
  CHECK(visited("qwen3_moe") == run(moe::qwen3_moe()));
  CHECK(visited("olmoe") == run(moe::olmoe()));
  CHECK(visited("deepseek_v2") == run(moe::deepseek_v2()));
  CHECK(visited("deepseek_v3") == run(moe::deepseek_v3()));
  CHECK(visited("kimi_k2") == run(moe::kimi_k2()));
  CHECK(visited("glm4_moe") == run(moe::glm4_moe()));
  CHECK(visited("deepseek_v4") == run(moe::deepseek_v4()));
  CHECK(visited("llama4") == run(moe::llama4()));
  CHECK(visited("gpt_oss") == run(moe::gpt_oss()));
  CHECK(visited("longcat") == run(moe::longcat()));
  CHECK(visited("moe_plus_plus", {.num_experts = E}) == run(moe::moe_plus_plus({E})));
  CHECK(visited("moe_plus_plus", {.num_experts = 16}) == run(moe::moe_plus_plus({16})));
  CHECK(run(moe::moe_plus_plus({16})) != run(moe::moe_plus_plus({E})));
}

TEST_CASE("layer/visit_model_preset: options arrive") {
  auto const bias = moe_test::normals<float>(E, 4);
  moe::model_preset_options const all{.num_experts_per_tok = 3,
                                      .num_experts = E,
                                      .norm_topk_prob = false,
                                      .routed_scaling_factor = 3,
                                      .n_group = 4,
                                      .topk_group = 2,
                                      .bias = bias.data()};
  CHECK(visited("deepseek_v3", all) == run(moe::deepseek_v3({3, 4, 2, false, 3, bias.data()})));
  auto no_bias = all;
  no_bias.bias.reset();
  CHECK(visited("deepseek_v2", no_bias) == run(moe::deepseek_v2({3, 4, 2, false, 3})));
  CHECK(visited("gpt_oss", {.num_experts_per_tok = 2, .bias = bias.data()}) ==
        run(moe::gpt_oss({2, bias.data()})));
  CHECK(visited("longcat", {.num_experts_per_tok = 5, .bias = bias.data()}) ==
        run(moe::longcat({5, 6, bias.data()})));
  CHECK(visited("qwen2_moe", {.norm_topk_prob = true}) == run(moe::qwen2_moe({4, true})));
  CHECK(visited("qwen2_moe", {.norm_topk_prob = true}) != visited("qwen2_moe"));
}

TEST_CASE("layer/visit_model_preset: unknown names and options are refused") {
  says(refusal_of("mixtrall"),
       "visit_model_preset: a known preset; got \"mixtrall\", known: mixtral, qwen2_moe");
  says(refusal_of("mixtral", {.norm_topk_prob = true}),
       "visit_model_preset: the preset has norm_topk_prob");
  says(refusal_of("olmoe", {.routed_scaling_factor = 2}),
       "visit_model_preset: the preset has routed_scaling_factor");
  says(refusal_of("deepseek_v4", {.n_group = 2}), "visit_model_preset: the preset has n_group");
  says(refusal_of("longcat", {.topk_group = 2}), "visit_model_preset: the preset has topk_group");
  says(refusal_of("llama4", {.bias = nullptr}), "visit_model_preset: the preset has a bias");
  says(refusal_of("moe_plus_plus", {.num_experts_per_tok = 2, .num_experts = E}),
       "visit_model_preset: the preset has num_experts_per_tok");
  says(refusal_of("moe_plus_plus"), "visit_model_preset: num_experts >= 2; got num_experts = 0");
  says(refusal_of("kimi_k2", {.num_experts = E, .n_group = 5}),
       "visit_model_preset: num_experts is a multiple of n_group; got num_experts = 32, n_group = "
       "5");
  says(refusal_of("mixtral", {.num_experts_per_tok = 17}), "top_k: 1 <= k <= MaxK");
  says(refusal_of("mixtral", {.num_experts_per_tok = 9, .num_experts = 8}),
       "visit_model_preset: the preset chooses as many of num_experts; got k = 9, num_experts = 8");
  says(refusal_of("deepseek_v3", {.topk_group = 9}), "group_limited: 1 <= kept <= groups");
}
