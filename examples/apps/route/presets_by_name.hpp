// Every preset by its name: those of published systems, which have capacities, and those of models.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include <moe/gate/model_presets.hpp>
#include <moe/layer/visit_preset.hpp>

#include "logits_file.hpp"

namespace route_app {

/// What a model's router may be told besides the number of choices.
struct model_options {
  std::optional<int> n_group, topk_group;
  std::vector<float> bias;  ///< [E], or empty: by which experts are selected.

  bool any() const { return n_group || topk_group || !bias.empty(); }
};

inline constexpr char const* model_names =
    "mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, kimi_k2, glm4_moe, "
    "deepseek_v4, "
    "llama4, gpt_oss, longcat, moe_plus_plus";

/// The options of a model with what was given in place of its own; what it does not know is refused.
template <class Own>
Own options_of(std::string const& name, Own own, moe::preset_options const& given,
               model_options const& model) {
  if (given.capacity_factor || given.eval_capacity_factor || given.min_capacity)
    throw input_error(name + " drops nothing and has no capacity");
  auto const refuse = [&](char const* what) { return input_error(name + " has no " + what); };
  if constexpr (requires { own.num_experts_per_tok; })
    own.num_experts_per_tok = given.k.value_or(own.num_experts_per_tok);
  else if constexpr (requires { own.moe_topk; })
    own.moe_topk = given.k.value_or(own.moe_topk);
  else if (given.k)
    throw refuse("--k: it is 2");
  if constexpr (requires { own.n_group; }) {
    own.n_group = model.n_group.value_or(own.n_group);
    own.topk_group = model.topk_group.value_or(own.topk_group);
    if (given.experts % own.n_group != 0)
      throw input_error(name + ": " + std::to_string(given.experts) +
                        " experts are no multiple of " + std::to_string(own.n_group) +
                        " groups (--groups)");
  } else if (model.n_group || model.topk_group) {
    throw refuse("groups of experts");
  }
  float const* const bias = model.bias.empty() ? nullptr : model.bias.data();
  if constexpr (requires { own.e_score_correction_bias; })
    own.e_score_correction_bias = bias;
  else if constexpr (requires { own.router_bias; })
    own.router_bias = bias;
  else if (bias != nullptr)
    throw refuse("bias of experts");
  if constexpr (requires { own.num_experts; }) own.num_experts = given.experts;
  return own;
}

/// Calls f(preset) with the preset of that name.
/// @param given  `experts` is E.
/// @throws input_error, or precondition_error, for other names and for what the preset does not know.
template <class F>
void visit_any_preset(std::string const& name, moe::preset_options const& given,
                      model_options const& model, F const& f) {
  auto const own = [&](auto const& usual) { return options_of(name, usual, given, model); };
  using like_v3 = moe::deepseek_v3_options;
  using softmax_router = moe::softmax_router_options;
  if (name == "mixtral") return f(moe::mixtral(own(moe::mixtral_options{})));
  if (name == "qwen2_moe") return f(moe::qwen2_moe(own(softmax_router{.num_experts_per_tok = 4})));
  if (name == "qwen3_moe") return f(moe::qwen3_moe(own(softmax_router{.norm_topk_prob = true})));
  if (name == "olmoe") return f(moe::olmoe(own(softmax_router{})));
  if (name == "deepseek_v2") return f(moe::deepseek_v2(own(moe::deepseek_v2_options{})));
  if (name == "deepseek_v3") return f(moe::deepseek_v3(own(like_v3{})));
  if (name == "kimi_k2")
    return f(
        moe::kimi_k2(own(like_v3{.n_group = 1, .topk_group = 1, .routed_scaling_factor = 2.827})));
  if (name == "glm4_moe")
    return f(
        moe::glm4_moe(own(like_v3{.n_group = 1, .topk_group = 1, .routed_scaling_factor = 1})));
  if (name == "deepseek_v4") return f(moe::deepseek_v4(own(moe::deepseek_v4_options{})));
  if (name == "llama4") return f(moe::llama4(own(moe::llama4_options{})));
  if (name == "gpt_oss") return f(moe::gpt_oss(own(moe::gpt_oss_options{})));
  if (name == "longcat") return f(moe::longcat(own(moe::longcat_options{})));
  if (name == "moe_plus_plus") return f(moe::moe_plus_plus(own(moe::moe_plus_plus_options{})));
  moe::visit_preset(name, given, [&](auto const& preset) {
    if (model.any()) throw input_error(name + " has neither groups nor a bias");
    f(preset);
  });
}

}  // namespace route_app
