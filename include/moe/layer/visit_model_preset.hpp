// From a configuration read at run time to types: the presets of published models by name.
// SPDX-License-Identifier: MIT
#pragma once

#include <initializer_list>
#include <optional>
#include <string_view>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/gate/model_presets.hpp>
#include <moe/layer/visit_preset.hpp>

namespace moe::inline MOE_ABI {

/// What a model's configuration says of its router. What is not given is the preset's default; what the
/// preset does not know is refused.
struct model_preset_options {
  std::optional<int> num_experts_per_tok{};  ///< LongCat's moe_topk, too.
  int num_experts = 0;  ///< E; 0 = not known here, and k is not held against it. MoE++ needs it.
  std::optional<bool> norm_topk_prob{};
  std::optional<double> routed_scaling_factor{};
  std::optional<int> n_group{};
  std::optional<int> topk_group{};
  /// [E]: e_score_correction_bias, or gpt-oss's router bias. The caller's.
  std::optional<float const*> bias{};
};

/// Of visit_model_preset.
inline constexpr std::initializer_list<char const*> model_preset_names = {
    "mixtral",  "qwen2_moe",   "qwen3_moe", "olmoe",   "deepseek_v2", "deepseek_v3",  "kimi_k2",
    "glm4_moe", "deepseek_v4", "llama4",    "gpt_oss", "longcat",     "moe_plus_plus"};

namespace detail {

/// Takes what is given into a member that there is; `known` says whether there is one.
template <class Member, class Given>
constexpr void take_option(bool known, char const* rule, std::optional<Given> const& given,
                           Member* member, call_site site) {
  expects(known || !given, rule, site);
  if (known && given) *member = *given;
}

/// The options of a preset, with what was given in place of its defaults.
template <class Own>
constexpr Own model_options_of(model_preset_options const& given, Own own, call_site site) {
  int* k = nullptr;
  if constexpr (requires { own.num_experts_per_tok; }) k = &own.num_experts_per_tok;
  if constexpr (requires { own.moe_topk; }) k = &own.moe_topk;
  bool* divide = nullptr;
  if constexpr (requires { own.norm_topk_prob; }) divide = &own.norm_topk_prob;
  double* factor = nullptr;
  if constexpr (requires { own.routed_scaling_factor; }) factor = &own.routed_scaling_factor;
  int *groups = nullptr, *kept = nullptr;
  if constexpr (requires { own.n_group; }) {
    groups = &own.n_group;
    kept = &own.topk_group;
  }
  float const** bias = nullptr;
  if constexpr (requires { own.e_score_correction_bias; }) bias = &own.e_score_correction_bias;
  if constexpr (requires { own.router_bias; }) bias = &own.router_bias;

  auto const take = [site](auto* member, auto const& value, char const* rule) {
    take_option(member != nullptr, rule, value, member, site);
  };
  take(k, given.num_experts_per_tok, "visit_model_preset: the preset has num_experts_per_tok");
  take(divide, given.norm_topk_prob, "visit_model_preset: the preset has norm_topk_prob");
  take(factor, given.routed_scaling_factor,
       "visit_model_preset: the preset has routed_scaling_factor");
  take(groups, given.n_group, "visit_model_preset: the preset has n_group");
  take(kept, given.topk_group, "visit_model_preset: the preset has topk_group");
  take(bias, given.bias, "visit_model_preset: the preset has a bias");
  if constexpr (requires { own.n_group; })
    expects(own.n_group < 1 || given.num_experts % own.n_group == 0,
            "visit_model_preset: num_experts is a multiple of n_group", site,
            {{"num_experts", given.num_experts}, {"n_group", own.n_group}});
  if constexpr (requires { own.num_experts; }) {
    expects(given.num_experts >= 2, "visit_model_preset: num_experts >= 2", site,
            {{"num_experts", given.num_experts}});
    own.num_experts = given.num_experts;
  }
  return own;
}

}  // namespace detail

/// Calls f(preset) with the preset of that name and returns what f returns, which must have the same type
/// for all presets: `visit_preset` for the functions of gate/model_presets.hpp.
///
///     moe::visit_model_preset("deepseek_v3", {.num_experts = 256, .bias = bias.data()},
///                             [&](auto const& preset) { run(preset); });
///
/// @param name  One of model_preset_names. (deepseek_v4_hash has a table.)
/// @throws precondition_error for any other name, and lists these; if there are fewer experts than
///         choices, or their number is no multiple of that of groups; if the preset does not know an option that is given; as the preset itself does.
template <class F>
decltype(auto) visit_model_preset(std::string_view name, model_preset_options const& options, F&& f,
                                  call_site site = call_site::here()) {
  auto const call = [&](auto const& make, auto const& defaults) -> decltype(auto) {
    auto const preset = make(detail::model_options_of(options, defaults, site), site);
    int const k = preset.gate.k();
    expects(options.num_experts == 0 || k <= options.num_experts,
            "visit_model_preset: the preset chooses as many of num_experts", site,
            {{"k", k}, {"num_experts", options.num_experts}});
    return std::forward<F>(f)(preset);
  };
  if (name == "mixtral")
    return call([](auto const& o, call_site at) { return mixtral(o, at); }, mixtral_options{});
  if (name == "qwen2_moe")
    return call([](auto const& o, call_site at) { return qwen2_moe(o, at); }, qwen2_moe_options);
  if (name == "qwen3_moe")
    return call([](auto const& o, call_site at) { return qwen3_moe(o, at); }, qwen3_moe_options);
  if (name == "olmoe")
    return call([](auto const& o, call_site at) { return olmoe(o, at); }, olmoe_options);
  if (name == "deepseek_v2")
    return call([](auto const& o, call_site at) { return deepseek_v2(o, at); },
                deepseek_v2_options{});
  if (name == "deepseek_v3")
    return call([](auto const& o, call_site at) { return deepseek_v3(o, at); },
                deepseek_v3_options{});
  if (name == "kimi_k2")
    return call([](auto const& o, call_site at) { return kimi_k2(o, at); }, kimi_k2_options);
  if (name == "glm4_moe")
    return call([](auto const& o, call_site at) { return glm4_moe(o, at); }, glm4_moe_options);
  if (name == "deepseek_v4")
    return call([](auto const& o, call_site at) { return deepseek_v4(o, at); },
                deepseek_v4_options{});
  if (name == "llama4")
    return call([](auto const& o, call_site at) { return llama4(o, at); }, llama4_options{});
  if (name == "gpt_oss")
    return call([](auto const& o, call_site at) { return gpt_oss(o, at); }, gpt_oss_options{});
  if (name == "longcat")
    return call([](auto const& o, call_site at) { return longcat(o, at); }, longcat_options{});
  if (name == "moe_plus_plus")
    return call([](auto const& o, call_site at) { return moe_plus_plus(o, at); },
                moe_plus_plus_options{});
  detail::refuse_name("visit_model_preset: a known preset", name, model_preset_names, site);
}

}  // namespace moe::inline MOE_ABI
