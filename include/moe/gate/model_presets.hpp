// Presets: the routers of published models, by the names and the defaults of their configurations.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/fixed_experts.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/group_limited.hpp>
#include <moe/gate/preset.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/loss/load_balance.hpp>

namespace moe::inline MOE_ABI {

// All are dropless, and their loss counts all choices. Arrays in options, e_score_correction_bias and so
// on, are the caller's and outlive the preset's use. docs/routers.md has the formulas.

namespace detail {

inline constexpr load_balance_rule all_choices{.choices = load_balance_rule::counted::all};

constexpr float scaling_factor(double factor, call_site site) {
  expects(factor > 0 && factor < 1e30, "model preset: 0 < routed_scaling_factor < 1e30", site,
          {{"routed_scaling_factor", factor}});
  return static_cast<float>(factor);
}

/// Weights that are divided by their sum if `divided`, and then multiplied.
constexpr scaled<renormalised> model_weights(bool divided, double factor, renormalised by,
                                             call_site site) {
  by.from_k = divided ? by.from_k : max_choices + 1;
  return {scaling_factor(factor, site), by};
}

/// DeepSeek-V3 divides by the sum + 1e-20, and only if there are two weights or more.
inline constexpr renormalised by_sum_plus_1e20{.floor = 0, .added = 1e-20f, .from_k = 2};

constexpr auto softmax_top_k(int k, bool norm_topk_prob, call_site site) {
  return preset<gate<softmax, top_k<max_choices>, scaled<renormalised>>>{
      .gate = {.select = top_k<max_choices>(k, site),
               .weigh = model_weights(norm_topk_prob, 1, {}, site)},
      .loss = all_choices};
}

}  // namespace detail

struct mixtral_options {
  int num_experts_per_tok = 2;
  float router_jitter_noise = 0;  ///< The original multiplies what the experts read, too.
};

/// Softmax, top-k, divided by their sum.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16 and 0 <= router_jitter_noise <= 1.
/// Source: Jiang et al., "Mixtral of experts", 2024; configuration of Mixtral-8x7B.
constexpr auto mixtral(mixtral_options const& o = {}, call_site site = call_site::here()) {
  expects(o.router_jitter_noise >= 0 && o.router_jitter_noise <= 1,
          "mixtral: 0 <= router_jitter_noise <= 1", site,
          {{"router_jitter_noise", o.router_jitter_noise}});
  auto router = detail::softmax_top_k(o.num_experts_per_tok, true, site);
  router.input_jitter = o.router_jitter_noise;
  return router;
}

/// Of Qwen's routers and OLMoE's.
struct softmax_router_options {
  int num_experts_per_tok = 8;
  bool norm_topk_prob = false;
};

inline constexpr softmax_router_options qwen2_moe_options{.num_experts_per_tok = 4};
inline constexpr softmax_router_options qwen3_moe_options{.norm_topk_prob = true};
inline constexpr softmax_router_options olmoe_options{};

/// Softmax, top-k, as they are. Its shared expert has a gate of its own, sigmoid(x w): see
/// residual_mix::gated.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16.
/// Source: configuration of Qwen1.5-MoE-A2.7B.
constexpr auto qwen2_moe(softmax_router_options const& o = qwen2_moe_options,
                         call_site site = call_site::here()) {
  return detail::softmax_top_k(o.num_experts_per_tok, o.norm_topk_prob, site);
}

/// Softmax, top-k, divided by their sum.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16.
/// Source: configuration of Qwen3-30B-A3B; the default of its class does not divide.
constexpr auto qwen3_moe(softmax_router_options const& o = qwen3_moe_options,
                         call_site site = call_site::here()) {
  return detail::softmax_top_k(o.num_experts_per_tok, o.norm_topk_prob, site);
}

/// Softmax, top-k, as they are.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16.
/// Source: Muennighoff et al., "OLMoE", 2024; configuration of OLMoE-1B-7B.
constexpr auto olmoe(softmax_router_options const& o = olmoe_options,
                     call_site site = call_site::here()) {
  return detail::softmax_top_k(o.num_experts_per_tok, o.norm_topk_prob, site);
}

struct deepseek_v2_options {
  int num_experts_per_tok = 6;
  int n_group = 8;
  int topk_group = 3;
  bool norm_topk_prob = false;  ///< Weights that are divided by their sum are not scaled.
  double routed_scaling_factor = 16;
};

/// Softmax, top-k of the groups whose best expert is best, times a factor.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16, 1 <= topk_group <= n_group <= 64,
///         0 < routed_scaling_factor < 1e30.
/// Source: "DeepSeek-V2", 2024; its configuration (group_limited_greedy; n_group = 1 is its "greedy").
constexpr auto deepseek_v2(deepseek_v2_options const& o = {}, call_site site = call_site::here()) {
  using original = gate<softmax, group_limited<top_k<max_choices>>, scaled<renormalised>>;
  bool const divided = o.norm_topk_prob && o.num_experts_per_tok > 1;
  return preset<original>{
      .gate = {.select = {o.n_group, o.topk_group, 1,
                          top_k<max_choices>(o.num_experts_per_tok, site), site},
               .weigh = detail::model_weights(divided, divided ? 1 : o.routed_scaling_factor,
                                              detail::by_sum_plus_1e20, site)},
      .loss = detail::all_choices};
}

/// Of the routers with DeepSeek-V3's algorithm.
struct deepseek_v3_options {
  int num_experts_per_tok = 8;
  int n_group = 8;
  int topk_group = 4;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 2.5;
  float const* e_score_correction_bias = nullptr;  ///< [E]; selects, and weighs nothing.
};

inline constexpr deepseek_v3_options kimi_k2_options{
    .n_group = 1, .topk_group = 1, .routed_scaling_factor = 2.827};
inline constexpr deepseek_v3_options glm4_moe_options{
    .n_group = 1, .topk_group = 1, .routed_scaling_factor = 1};

/// Sigmoid; top-k by score + bias of the groups whose two best add up to most; weights from the scores,
/// divided by their sum, times a factor.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16, 1 <= topk_group <= n_group <= 64,
///         0 < routed_scaling_factor < 1e30.
/// Source: "DeepSeek-V3", 2024; its configuration.
constexpr auto deepseek_v3(deepseek_v3_options const& o = {}, call_site site = call_site::here()) {
  using original = gate<sigmoid, biased<group_limited<top_k<max_choices>>>, scaled<renormalised>>;
  return preset<original>{
      .gate = {.select = {{o.n_group, o.topk_group, 2,
                           top_k<max_choices>(o.num_experts_per_tok, site), site},
                          o.e_score_correction_bias},
               .weigh = detail::model_weights(o.norm_topk_prob, o.routed_scaling_factor,
                                              detail::by_sum_plus_1e20, site)},
      .loss = detail::all_choices};
}

/// DeepSeek-V3's algorithm without groups. @throws as deepseek_v3.
/// Source: configuration of Kimi-K2.
constexpr auto kimi_k2(deepseek_v3_options const& o = kimi_k2_options,
                       call_site site = call_site::here()) {
  return deepseek_v3(o, site);
}

/// DeepSeek-V3's algorithm without groups. @throws as deepseek_v3.
/// Source: the configuration class of GLM-4.5; the largest model has routed_scaling_factor = 2.5.
constexpr auto glm4_moe(deepseek_v3_options const& o = glm4_moe_options,
                        call_site site = call_site::here()) {
  return deepseek_v3(o, site);
}

struct deepseek_v4_options {
  int num_experts_per_tok = 6;
  bool norm_topk_prob = true;
  double routed_scaling_factor = 1.5;
  float const* e_score_correction_bias = nullptr;  ///< [E]; selects, and weighs nothing.
};

/// Square root of softplus; top-k by score + bias; weights from the scores, divided by their sum, times a
/// factor.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16, 0 < routed_scaling_factor < 1e30.
/// Source: DeepSeek-V4's inference code; configuration of the smaller model.
constexpr auto deepseek_v4(deepseek_v4_options const& o = {}, call_site site = call_site::here()) {
  using original = gate<sqrt_softplus, biased<top_k<max_choices>>, scaled<renormalised>>;
  return preset<original>{
      .gate = {.select = {top_k<max_choices>(o.num_experts_per_tok, site),
                          o.e_score_correction_bias},
               .weigh = detail::model_weights(o.norm_topk_prob, o.routed_scaling_factor,
                                              detail::by_sum_plus_1e20, site)},
      .loss = detail::all_choices};
}

/// The first layers of DeepSeek-V4: a table names the experts of each word; their weights are those of
/// deepseek_v4.
/// @param tid2eid  [words,k]. @param word  [T]: of the token in row t of the logits.
/// @param o        num_experts_per_tok and the bias take no part.
/// @throws precondition_error as by_table, and deepseek_v4.
constexpr auto deepseek_v4_hash(matrix_view<std::int32_t const> tid2eid, std::int32_t const* word,
                                deepseek_v4_options const& o = {},
                                call_site site = call_site::here()) {
  using original = gate<sqrt_softplus, by_table<max_choices>, scaled<renormalised>>;
  return preset<original>{
      .gate = {.select = by_table<max_choices>(tid2eid, word, site),
               .weigh = detail::model_weights(o.norm_topk_prob, o.routed_scaling_factor,
                                              detail::by_sum_plus_1e20, site)},
      .loss = detail::all_choices};
}

struct llama4_options {
  int num_experts_per_tok = 1;
};

/// Top-k of the logits; the sigmoid of its logit multiplies what an expert reads: `ffn::weights_before`.
/// The preset's scores are logits, of which its loss means nothing.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16.
/// Source: configuration of Llama-4-Scout.
constexpr auto llama4(llama4_options const& o = {}, call_site site = call_site::here()) {
  return preset<gate<identity, top_k<max_choices>, sigmoid_of_selected>>{
      .gate = {.select = top_k<max_choices>(o.num_experts_per_tok, site)},
      .loss = detail::all_choices,
      .apply = weights_apply::before_experts};
}

struct gpt_oss_options {
  int num_experts_per_tok = 4;
  float const* router_bias = nullptr;  ///< [E]: of the router's projection.
};

/// Top-k of the biased logits, softmax over those. The preset's scores are logits, of which its loss
/// means nothing. Its experts are `ffn<clamped_swiglu>` with biases: see `split_interleaved`.
/// @throws precondition_error unless 1 <= num_experts_per_tok <= 16.
/// Source: configuration of gpt-oss-120b.
constexpr auto gpt_oss(gpt_oss_options const& o = {}, call_site site = call_site::here()) {
  return preset<gate<logit_bias<identity>, top_k<max_choices>, softmax_of_selected>>{
      .gate = {.score = {.bias = o.router_bias},
               .select = top_k<max_choices>(o.num_experts_per_tok, site)},
      .loss = detail::all_choices};
}

struct longcat_options {
  int moe_topk = 12;
  double routed_scaling_factor = 6;
  float const* e_score_correction_bias = nullptr;  ///< [E]; selects, and weighs nothing.
};

/// Softmax; top-k by probability + bias; times a factor. E counts the experts with weights and, after
/// them, those that give the token itself: expert_kind::copy in the expert_map.
/// @throws precondition_error unless 1 <= moe_topk <= 16, 0 < routed_scaling_factor < 1e30.
/// Source: "LongCat-Flash", 2025; its configuration (512 experts and 256 copies).
constexpr auto longcat(longcat_options const& o = {}, call_site site = call_site::here()) {
  using original = gate<softmax, biased<top_k<max_choices>>, scaled<as_scored>>;
  return preset<original>{
      .gate = {.select = {top_k<max_choices>(o.moe_topk, site), o.e_score_correction_bias},
               .weigh = {detail::scaling_factor(o.routed_scaling_factor, site), {}}},
      .loss = detail::all_choices};
}

struct moe_plus_plus_options {
  int num_experts =
      32;  ///< All of them: with weights, constant ones, a copy, and last the zero expert.
};

/// Softmax, top 2; the zero expert's weight is 0 before the two are divided by their sum. The kinds of
/// experts stand in the expert_map; constant ones are add_constant_experts. The logits of a layer have those
/// of the layer before added, by a matrix [E,E]: see docs/routers.md.
/// @throws precondition_error unless num_experts >= 2.
/// Source: Jin et al., "MoE++", 2024, and its released code, whose experts read twice the token unless
/// moe_feature_no_mul_topk.
constexpr auto moe_plus_plus(moe_plus_plus_options const& o = {},
                             call_site site = call_site::here()) {
  expects(o.num_experts >= 2, "moe_plus_plus: num_experts >= 2", site,
          {{"num_experts", o.num_experts}});
  return preset<gate<softmax, top_k<2>, without<renormalised>>>{
      .gate = {.weigh = {o.num_experts - 1, 1, {}}}, .loss = detail::all_choices};
}

}  // namespace moe::inline MOE_ABI
