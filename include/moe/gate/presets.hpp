// Presets: the gates of DeepSpeed, Tutel, Switch and GShard, each with all that follows the gate.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/random.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/preset.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {

// Options carry the names and the defaults of the original, so that a configuration of its can be
// copied. Where an original is random, its random numbers are not ours; where it is wrong, the preset
// is right, and docs/presets.md says how they differ. Every function takes a noise source last, for
// callers who must draw the same numbers as somebody else.

namespace detail {

struct deepspeed_capacity {
  double factor, eval_factor;
  std::int64_t least;
  bool drop;
  int tensor_parallel;
};

constexpr capacity_rule capacity_of(deepspeed_capacity const& c, call_site site) {
  return c.drop ? capacity::deepspeed(
                      {.factor = c.factor, .eval_factor = c.eval_factor, .min_capacity = c.least},
                      site)
                : capacity::dropless(c.tensor_parallel, site);
}

}  // namespace detail

/// What DeepSpeed calls noisy_gate_policy.
enum class noisy_gate : std::uint8_t {
  none,
  jitter,  ///< The router's input is multiplied by U(0.99, 1.01).
  rsample  ///< Gumbel noise on the logits selects the expert (top-1 only; top-k ignores it).
};

struct deepspeed_top1_options {
  double capacity_factor = 1;
  double eval_capacity_factor = 1;
  std::int64_t min_capacity = 4;
  bool drop_tokens = true;
  /// Random token selection: full experts keep random tokens, in training.
  bool use_rts = true;
  bool use_rts_in_evaluation = false;  ///< As the original: evaluation is random, too.
  noisy_gate noisy_gate_policy = noisy_gate::none;
  int tensor_parallel = 1;  ///< Without dropping, C is rounded up to a multiple of it.
};

/// DeepSpeed's top-1 gate: the probability of the chosen expert is the weight, never renormalised.
/// Masked tokens (`used_token`) take no row, but their scores enter the loss.
/// @throws precondition_error if a capacity option is out of range.
/// Source: DeepSpeed, deepspeed/moe/sharded_moe.py, `top1gating`.
template <noise_source Noise = gumbel_noise<>>
constexpr auto deepspeed_top1(deepspeed_top1_options options = {}, Noise noise = {},
                              call_site site = call_site::here()) {
  using original = gate<softmax, sampled<top_k<1>, Noise>, as_scored>;
  bool const sample = options.noisy_gate_policy == noisy_gate::rsample;
  bool const jitter = options.noisy_gate_policy == noisy_gate::jitter;
  return preset<original>{
      .gate = {.select = {.when = sample ? random_when::in_training : random_when::never,
                          .noise = noise}},
      .rules = {.rank = order::token_major,
                .cap = detail::capacity_of(
                    {options.capacity_factor, options.eval_capacity_factor, options.min_capacity,
                     options.drop_tokens, options.tensor_parallel},
                    site),
                .when_full = options.use_rts ? overflow::random : overflow::position},
      .random_overflow_in_evaluation = options.use_rts_in_evaluation,
      .loss = {.masked = load_balance_rule::masked_tokens::scored},
      .input_jitter = jitter ? 0.01f : 0};
}

struct deepspeed_top2_options {
  double capacity_factor = 1;
  double eval_capacity_factor = 1;
  std::int64_t min_capacity = 4;
  bool drop_tokens = true;
  bool top2_2nd_expert_sampling = true;
  bool sample_in_evaluation = false;  ///< As the original: evaluation is random, too.
  bool jitter = false;                ///< noisy_gate_policy = "Jitter".
  int tensor_parallel = 1;            ///< Without dropping, C is rounded up to a multiple of it.
};

/// DeepSpeed's top-2 gate: the second expert is sampled by Gumbel noise on the logits; first choices
/// rank before all second ones; weights are renormalised over what was kept.
/// @throws precondition_error if a capacity option is out of range.
/// Source: DeepSpeed, deepspeed/moe/sharded_moe.py, `top2gating`.
template <noise_source Noise = gumbel_noise<>>
constexpr auto deepspeed_top2(deepspeed_top2_options options = {}, Noise noise = {},
                              call_site site = call_site::here()) {
  using original = gate<softmax, sampled_second<Noise>, as_scored>;
  random_when const when = !options.top2_2nd_expert_sampling ? random_when::never
                           : options.sample_in_evaluation    ? random_when::always
                                                             : random_when::in_training;
  return preset<original>{
      .gate = {.select = {.when = when, .noise = noise}},
      .rules = {.rank = order::choice_major,
                .cap = detail::capacity_of(
                    {options.capacity_factor, options.eval_capacity_factor, options.min_capacity,
                     options.drop_tokens, options.tensor_parallel},
                    site)},
      .kept = kept_weights::renormalised,
      .input_jitter = options.jitter ? 0.01f : 0};
}

struct deepspeed_topk_options {
  int k = 3;
  double capacity_factor = 1;
  double eval_capacity_factor = 1;
  std::int64_t min_capacity = 4;
  bool drop_tokens = true;
  /// drop_policy: `score` is its "probs", `position` its "position".
  overflow drop_policy = overflow::score;
  bool jitter = false;      ///< noisy_gate_policy = "Jitter".
  int tensor_parallel = 1;  ///< Without dropping, C is rounded up to a multiple of it.
};

/// DeepSpeed's top-k gate (k >= 3 there; any k here): full experts keep the highest probabilities,
/// slots go token by token, weights are renormalised over what was kept.
/// @throws precondition_error unless 1 <= k <= 16, or if a capacity option is out of range.
/// Source: DeepSpeed, deepspeed/moe/sharded_moe.py, `topkgating`.
constexpr auto deepspeed_topk(deepspeed_topk_options options = {},
                              call_site site = call_site::here()) {
  using original = gate<softmax, top_k<max_choices>, as_scored>;
  return preset<original>{
      .gate = {.select = top_k<max_choices>(options.k, site)},
      .rules = {.rank = order::token_major,
                .cap = detail::capacity_of(
                    {options.capacity_factor, options.eval_capacity_factor, options.min_capacity,
                     options.drop_tokens, options.tensor_parallel},
                    site),
                .when_full = options.drop_policy},
      .kept = kept_weights::renormalised,
      .loss = {.choices = load_balance_rule::counted::all},
      .input_jitter = options.jitter ? 0.01f : 0};
}

struct tutel_topk_options {
  int k = 1;                   ///< At most E; the original cuts it to E.
  double capacity_factor = 1;  ///< 0: dropless; < 0: dropless up to a bound.
  int alignment = 1;           ///< C is rounded up to a multiple of it.
  double gate_noise = 0;       ///< Standard deviation of the noise on the logits, times E.
  bool batch_prioritized_routing = false;
  bool normalize_gate = true;
  bool is_postscore = true;  ///< False: weights multiply the experts' inputs.
};

/// Tutel's top-any gate: weights are normalised before dropping (one choice never), first choices
/// rank before all second ones. The loss is its GShard loss; for is_gshard_loss = False see
/// importance_and_load.
/// @throws precondition_error unless 1 <= k <= 16 and 0 <= gate_noise <= 1e9, or if a capacity option is out
///         of range.
/// Source: Tutel, tutel/impls/moe_layer.py and fast_dispatch.py, `extract_critical`.
template <noise_source Noise = normal_noise<>>
constexpr auto tutel_topk(tutel_topk_options options = {}, Noise noise = {},
                          call_site site = call_site::here()) {
  expects(options.gate_noise >= 0 && options.gate_noise <= 1e9,
          "tutel_topk: 0 <= gate_noise <= 1e9", site, {{"gate_noise", options.gate_noise}});
  using original = gate<noisy<softmax, Noise>, top_k<max_choices>, renormalised>;
  return preset<original>{
      .gate = {.score = {.scale = static_cast<float>(options.gate_noise),
                         .over_E = true,
                         .when =
                             options.gate_noise > 0 ? random_when::in_training : random_when::never,
                         .noise = noise},
               .select = top_k<max_choices>(options.k, site),
               .weigh = {.from_k = options.normalize_gate ? 2 : max_choices + 1}},
      .rules = {.rank = order::choice_major,
                .cap = capacity::tutel(options.capacity_factor, options.alignment, site),
                .when_full = options.batch_prioritized_routing ? overflow::batch_prioritised
                                                               : overflow::position},
      .apply = options.is_postscore ? weights_apply::after_experts : weights_apply::before_experts};
}

struct switch_transformer_options {
  double capacity_factor = 1.25;
  double eval_capacity_factor = 2;
  std::int64_t min_capacity = 4;
  float jitter = 0.01f;  ///< The router's input is multiplied by U(1 - jitter, 1 + jitter).
};

/// The Switch Transformer's gate: one expert, its probability is the weight, first come first served.
/// @throws precondition_error unless 0 <= jitter <= 1, or if a capacity option is out of range.
/// Source: Fedus et al., "Switch transformers", 2021; Mesh TensorFlow for the rounding of C.
constexpr auto switch_transformer(switch_transformer_options options = {},
                                  call_site site = call_site::here()) {
  expects(options.jitter >= 0 && options.jitter <= 1, "switch_transformer: 0 <= jitter <= 1", site,
          {{"jitter", options.jitter}});
  return preset<gate<softmax, top_k<1>, as_scored>>{
      .rules = {.rank = order::token_major,
                .cap = capacity::switch_transformer({.factor = options.capacity_factor,
                                                     .eval_factor = options.eval_capacity_factor,
                                                     .min_capacity = options.min_capacity},
                                                    site)},
      .input_jitter = options.jitter};
}

struct gshard_options {
  double capacity_factor = 1.2;
  double eval_capacity_factor = 2.4;
  bool random_routing = true;  ///< False: the second expert is always used.
};

/// GShard's gate: two experts, weights normalised over the two; in training the second is used with
/// probability 2 w2 (random routing); first choices rank before all second ones.
/// @throws precondition_error if a capacity option is out of range.
/// Source: Lepikhin et al., "GShard", 2020, algorithm 1; FastMoE for capacities.
template <noise_source Noise = uniform_noise<stream::dispatch>>
constexpr auto gshard(gshard_options options = {}, Noise noise = {},
                      call_site site = call_site::here()) {
  using original = random_second<gate<softmax, top_k<2>, renormalised>, Noise>;
  return preset<original>{
      .gate = {.when = options.random_routing ? random_when::in_training : random_when::never,
               .noise = noise},
      .rules = {.rank = order::choice_major,
                .cap = capacity::gshard({.factor = options.capacity_factor,
                                         .eval_factor = options.eval_capacity_factor},
                                        site)}};
}

}  // namespace moe::inline MOE_ABI
