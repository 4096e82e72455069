// How many rows one expert takes at most: the capacity rules of the published systems, as values.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// How many rows C one segment (physical expert, source) takes at most. Made by the functions of
/// namespace `capacity`; `rows_of` gives C.
struct capacity_rule {
  enum class kind : std::uint8_t { dropless, fixed, deepspeed, tutel, gshard, switch_transformer };

  kind rule = kind::dropless;
  double factor = 1;       ///< In training.
  double eval_factor = 1;  ///< Otherwise; Tutel knows only one factor.
  std::int64_t rows = 0;   ///< fixed: C. deepspeed, switch_transformer: the least C.
  int multiple = 1;        ///< C is rounded up to a multiple of it.

  friend constexpr bool operator==(capacity_rule const&, capacity_rule const&) = default;
};

namespace capacity {

/// C is the load of the fullest segment: nothing is dropped. It shows in padded tables only.
/// @param multiple  Rounds C up (DeepSpeed without dropping: the tensor-parallel size).
/// @throws precondition_error unless multiple >= 1.
constexpr capacity_rule dropless(int multiple = 1, call_site site = call_site::here()) {
  expects(multiple >= 1, "capacity::dropless: multiple >= 1", site, {{"multiple", multiple}});
  return {.rule = capacity_rule::kind::dropless, .multiple = multiple};
}

/// C as given.
/// @throws precondition_error unless rows >= 1.
constexpr capacity_rule fixed(std::int64_t rows, call_site site = call_site::here()) {
  expects(rows >= 1, "capacity::fixed: rows >= 1", site, {{"rows", rows}});
  return {.rule = capacity_rule::kind::fixed, .rows = rows};
}

struct deepspeed_options {
  double factor = 1;
  double eval_factor = 1;
  std::int64_t min_capacity = 4;
};

/// C = max(min_capacity, ceil(T / E * (factor * K))), rounded as DeepSpeed does: T / E and factor * K
/// in double, then each to float, their product and ceil in float. T = 20, E = 3, K = 1, factor =
/// 1.05 gives 7 (arithmetic in double would give 8).
/// Source: DeepSpeed, deepspeed/moe/sharded_moe.py, `_capacity`.
/// @throws precondition_error unless both factors are finite and > 0, and min_capacity >= 0.
constexpr capacity_rule deepspeed(deepspeed_options options = {},
                                  call_site site = call_site::here()) {
  expects(options.factor > 0 && options.factor <= 1e9 && options.eval_factor > 0 &&
              options.eval_factor <= 1e9 && options.min_capacity >= 0,
          "capacity::deepspeed: 0 < factor, eval_factor <= 1e9, min_capacity >= 0", site,
          {{"factor", options.factor},
           {"eval_factor", options.eval_factor},
           {"min_capacity", options.min_capacity}});
  return {.rule = capacity_rule::kind::deepspeed,
          .factor = options.factor,
          .eval_factor = options.eval_factor,
          .rows = options.min_capacity};
}

/// factor > 0: C = K * int(factor * ceil(T / E)). factor = 0: C = the greatest load. factor < 0:
/// C = min(the greatest load, K * int(-factor * ceil(T / E))). Rounded up to a multiple of alignment.
/// Source: Tutel, tutel/impls/fast_dispatch.py, `extract_critical`.
/// @throws precondition_error unless |factor| <= 1e9 and alignment >= 1.
constexpr capacity_rule tutel(double factor = 1, int alignment = 1,
                              call_site site = call_site::here()) {
  expects(factor >= -1e9 && factor <= 1e9 && alignment >= 1,
          "capacity::tutel: |factor| <= 1e9, alignment >= 1", site,
          {{"factor", factor}, {"alignment", alignment}});
  return {.rule = capacity_rule::kind::tutel,
          .factor = factor,
          .eval_factor = factor,
          .multiple = alignment};
}

struct gshard_options {
  double factor = 1.2;
  double eval_factor = 2.4;
};

/// C = ceil(factor * T) * K / E in integers, as FastMoE rounds GShard's capacity.
/// Source: FastMoE, fmoe/gates/gshard_gate.py.
/// @throws precondition_error unless both factors are finite and > 0.
constexpr capacity_rule gshard(gshard_options options = {}, call_site site = call_site::here()) {
  expects(options.factor > 0 && options.factor <= 1e9 && options.eval_factor > 0 &&
              options.eval_factor <= 1e9,
          "capacity::gshard: 0 < factor, eval_factor <= 1e9", site,
          {{"factor", options.factor}, {"eval_factor", options.eval_factor}});
  return {.rule = capacity_rule::kind::gshard,
          .factor = options.factor,
          .eval_factor = options.eval_factor};
}

struct switch_options {
  double factor = 1.25;
  double eval_factor = 2;
  std::int64_t min_capacity = 4;
};

/// C = max(min_capacity, min(T, int(factor * T / E))).
/// Source: Mesh TensorFlow, mesh_tensorflow/transformer/moe.py.
/// @throws precondition_error unless both factors are finite and > 0, and min_capacity >= 0.
constexpr capacity_rule switch_transformer(switch_options options = {},
                                           call_site site = call_site::here()) {
  expects(options.factor > 0 && options.factor <= 1e9 && options.eval_factor > 0 &&
              options.eval_factor <= 1e9 && options.min_capacity >= 0,
          "capacity::switch_transformer: 0 < factor, eval_factor <= 1e9, min_capacity >= 0", site,
          {{"factor", options.factor},
           {"eval_factor", options.eval_factor},
           {"min_capacity", options.min_capacity}});
  return {.rule = capacity_rule::kind::switch_transformer,
          .factor = options.factor,
          .eval_factor = options.eval_factor,
          .rows = options.min_capacity};
}

}  // namespace capacity

/// Whether C follows from T, E and K alone, so that the host knows it before any token is routed.
MOE_HOST_DEVICE constexpr bool is_static(capacity_rule const& rule) noexcept {
  return rule.rule != capacity_rule::kind::dropless &&
         !(rule.rule == capacity_rule::kind::tutel && !(rule.factor > 0));
}

/// C: the most rows of one segment.
///
/// @param T         Tokens of this call, masked ones included.
/// @param E         Logical experts, of any kind.
/// @param K         Choices per token.
/// @param training  Chooses between factor and eval_factor.
/// @param max_load  Pairs that want the fullest segment, its share if an expert has replicas. Read
///                  only if the rule is not static.
/// @return In [0, 2^31 - 1]; greater values are cut to that.
MOE_HOST_DEVICE inline std::int64_t rows_of(capacity_rule const& rule, std::int64_t T, int E, int K,
                                            bool training, std::int64_t max_load) noexcept {
  using kind = capacity_rule::kind;
  constexpr std::int64_t most = 0x7fffffff;
  auto const cut = [](double x) { return x >= 0x7fffffff ? most : static_cast<std::int64_t>(x); };
  double const factor = training ? rule.factor : rule.eval_factor;
  double const tokens = static_cast<double>(T);
  std::int64_t C = 0;
  switch (rule.rule) {
    case kind::dropless:
      C = max_load;
      break;
    case kind::fixed:
      C = rule.rows;
      break;
    case kind::deepspeed: {
      float const share = static_cast<float>(tokens / E);
      float const slack = static_cast<float>(factor * K);
      C = cut(std::ceil(share * slack));
      C = C < rule.rows ? rule.rows : C;
      break;
    }
    case kind::tutel: {
      std::int64_t const share = (T + E - 1) / E;
      double const f = rule.factor;
      C = f == 0 ? max_load : K * cut((f < 0 ? -f : f) * static_cast<double>(share));
      if (f < 0 && max_load < C) C = max_load;
      break;
    }
    case kind::gshard:
      C = cut(std::ceil(factor * tokens)) * K / E;
      break;
    case kind::switch_transformer:
      C = cut(factor * tokens / E);
      C = T < C ? T : C;
      C = C < rule.rows ? rule.rows : C;
      break;
  }
  C = C < 0 ? 0 : C < most ? C : most;
  C = (C + rule.multiple - 1) / rule.multiple * rule.multiple;
  return C < most ? C : most;
}

}  // namespace moe::inline MOE_ABI
