// From a configuration read at run time to types: presets and activations by name.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/random.hpp>
#include <moe/core/types.hpp>
#include <moe/expert/activation.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/presets.hpp>
#include <moe/routing/capacity.hpp>

namespace moe::inline MOE_ABI {

/// What a configuration says of a router, for any preset. What is not given is the preset's default;
/// what the preset does not know is refused.
struct preset_options {
  std::optional<int> k{};  ///< Choices per token.
  int experts = 0;         ///< E; 0 = not known here, and k is not held against it.
  std::optional<double> capacity_factor{};
  std::optional<double> eval_capacity_factor{};
  std::optional<std::int64_t> min_capacity{};
  bool drop_tokens = true;              ///< False: dropless, whatever the factors are.
  bool weights_before_experts = false;  ///< tutel_topk alone.
};

namespace detail {

/// Throws "function: known name; got "name"; known: a, b, c".
[[noreturn]] inline void refuse_name(char const* rule, std::string_view name,
                                     std::initializer_list<char const*> known, call_site site) {
  std::string message = rule;
  message += "; got \"" + std::string(name) + "\", known:";
  char const* separator = " ";
  for (char const* each : known) {
    message += separator;
    message += each;
    separator = ", ";
  }
  throw precondition_error(message, site);
}

/// The options of a preset, with what was given in place of its defaults.
template <class Own>
constexpr Own options_of(preset_options const& given, int k, call_site site) {
  Own own;
  if constexpr (requires { own.k; }) own.k = k;
  own.capacity_factor = given.capacity_factor.value_or(own.capacity_factor);
  if constexpr (requires { own.eval_capacity_factor; })
    own.eval_capacity_factor = given.eval_capacity_factor.value_or(own.eval_capacity_factor);
  else
    expects(!given.eval_capacity_factor, "visit_preset: the preset has an eval_capacity_factor",
            site);
  if constexpr (requires { own.min_capacity; })
    own.min_capacity = given.min_capacity.value_or(own.min_capacity);
  else
    expects(!given.min_capacity, "visit_preset: the preset has a min_capacity", site);
  if constexpr (requires { own.is_postscore; })
    own.is_postscore = !given.weights_before_experts;
  else
    expects(!given.weights_before_experts, "visit_preset: the preset has weights_before_experts",
            site);
  return own;
}

}  // namespace detail

/// Calls f(preset) with the preset of that name and returns what f returns, which must have the same
/// type for all presets. f is instantiated for each of them: let it make the layer and run it, or
/// put it behind an interface of the caller.
///
///     moe::visit_preset("deepspeed_top2", {.experts = 64, .capacity_factor = 1.25},
///                       [&](auto const& preset) { run(moe::moe_layer(preset, experts, shape)); });
///
/// @param name  deepspeed_top1, deepspeed_top2, deepspeed_topk, tutel_topk, switch_transformer or
///              gshard: the functions of gate/presets.hpp.
/// @throws precondition_error for any other name, and lists these; if the preset cannot choose k
///         experts (top1 and switch_transformer 1, top2 and gshard 2, the others 1 to 16) or there are
///         fewer experts; if it does not know an option that is given; as the preset itself does.
template <class F>
decltype(auto) visit_preset(std::string_view name, preset_options const& options, F&& f,
                            call_site site = call_site::here()) {
  expects(options.experts >= 0, "visit_preset: experts >= 0", site, {{"experts", options.experts}});
  auto const choices = [&](int least, int most, int usual) {
    int const k = options.k.value_or(usual);
    expects(k >= least && k <= most, "visit_preset: the preset chooses k experts", site,
            {{"k", k}, {"least", least}, {"most", most}});
    expects(options.experts == 0 || k <= options.experts, "visit_preset: k <= experts", site,
            {{"k", k}, {"experts", options.experts}});
    return k;
  };
  auto const call = [&](auto preset) -> decltype(auto) {
    if (!options.drop_tokens) preset.rules.cap = capacity::dropless();
    return std::forward<F>(f)(std::as_const(preset));
  };
  if (name == "deepspeed_top1")
    return call(
        deepspeed_top1(detail::options_of<deepspeed_top1_options>(options, choices(1, 1, 1), site),
                       gumbel_noise<>{}, site));
  if (name == "deepspeed_top2")
    return call(
        deepspeed_top2(detail::options_of<deepspeed_top2_options>(options, choices(2, 2, 2), site),
                       gumbel_noise<>{}, site));
  if (name == "deepspeed_topk") {
    int const k = choices(1, max_choices, deepspeed_topk_options{}.k);
    return call(deepspeed_topk(detail::options_of<deepspeed_topk_options>(options, k, site), site));
  }
  if (name == "tutel_topk") {
    int const k = choices(1, max_choices, tutel_topk_options{}.k);
    return call(tutel_topk(detail::options_of<tutel_topk_options>(options, k, site),
                           normal_noise<>{}, site));
  }
  if (name == "switch_transformer")
    return call(switch_transformer(
        detail::options_of<switch_transformer_options>(options, choices(1, 1, 1), site), site));
  if (name == "gshard")
    return call(gshard(detail::options_of<gshard_options>(options, choices(2, 2, 2), site),
                       uniform_noise<stream::dispatch>{}, site));
  detail::refuse_name("visit_preset: a known preset", name,
                      {"deepspeed_top1", "deepspeed_top2", "deepspeed_topk", "tutel_topk",
                       "switch_transformer", "gshard"},
                      site);
}

/// Calls f(activation) with the activation of that name and returns what f returns.
/// @param name  relu, silu, gelu, gelu_tanh, swiglu, geglu, geglu_tanh or clamped_swiglu.
/// @throws precondition_error for any other name, and lists these.
template <class F>
decltype(auto) visit_activation(std::string_view name, F&& f, call_site site = call_site::here()) {
  if (name == "relu") return std::forward<F>(f)(relu{});
  if (name == "silu") return std::forward<F>(f)(silu{});
  if (name == "gelu") return std::forward<F>(f)(gelu{});
  if (name == "gelu_tanh") return std::forward<F>(f)(gelu_tanh{});
  if (name == "swiglu") return std::forward<F>(f)(swiglu{});
  if (name == "geglu") return std::forward<F>(f)(geglu{});
  if (name == "geglu_tanh") return std::forward<F>(f)(geglu_tanh{});
  if (name == "clamped_swiglu") return std::forward<F>(f)(clamped_swiglu{});
  detail::refuse_name(
      "visit_activation: a known activation", name,
      {"relu", "silu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "clamped_swiglu"},
      site);
}

}  // namespace moe::inline MOE_ABI
