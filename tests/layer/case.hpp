// Layers that own their memory, all presets and all activations, for the tests of layer/.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <string>
#include <utility>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/expert/activation.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

#include "support/instrumented.hpp"
#include "support/random.hpp"
#include "support/same_bits.hpp"

namespace moe_test {

/// Any activation of one argument, chosen at run time: one instantiation of a layer for all of them.
struct any_plain {
  static constexpr bool gated = false;
  static constexpr char const* names[] = {"relu", "silu", "gelu", "gelu_tanh"};
  int kind = 0;

  template <class V, class F>
  static V pick(int kind, F const& f) {
    switch (kind) {
      case 0:
        return f(moe::relu{});
      case 1:
        return f(moe::silu{});
      case 2:
        return f(moe::gelu{});
      default:
        return f(moe::gelu_tanh{});
    }
  }
  template <std::floating_point V>
  V operator()(V x) const {
    return pick<V>(kind, [&](auto a) { return a(x); });
  }
  template <std::floating_point V>
  V derivative(V x) const {
    return pick<V>(kind, [&](auto a) { return a.derivative(x); });
  }
};

/// Any gated activation, chosen at run time. The clamp is so low that it is reached.
struct any_gated {
  static constexpr bool gated = true;
  static constexpr char const* names[] = {"swiglu", "geglu", "geglu_tanh", "clamped_swiglu"};
  int kind = 0;

  template <class R, class F>
  static R pick(int kind, F const& f) {
    switch (kind) {
      case 0:
        return f(moe::swiglu{});
      case 1:
        return f(moe::geglu{});
      case 2:
        return f(moe::geglu_tanh{});
      default:
        return f(moe::clamped_swiglu{.limit = 0.6f});
    }
  }
  template <std::floating_point V>
  V operator()(V gate, V up) const {
    return pick<V>(kind, [&](auto a) { return a(gate, up); });
  }
  template <std::floating_point V>
  moe::gate_and_up<V> derivative(V gate, V up) const {
    return pick<moe::gate_and_up<V>>(kind, [&](auto a) { return a.derivative(gate, up); });
  }
};
static_assert(moe::activation<any_plain> && moe::activation<any_gated>);

/// Instrumented builds take three: the others differ in their gates, which have tests of their own.
inline constexpr int all_presets = instrumented ? 3 : 9;

/// Calls f(name, preset) for each of all_presets presets: each function of gate/presets.hpp, with
/// everything on that is random, and so little room that experts overflow.
template <class F>
void for_each_preset(F&& f) {
  f("deepspeed_top1, rsample",
    moe::deepspeed_top1({.min_capacity = 1, .noisy_gate_policy = moe::noisy_gate::rsample}));
  f("tutel_topk, weights before",
    moe::tutel_topk({.k = 2, .capacity_factor = 0.7, .is_postscore = false}));
  f("gshard", moe::gshard({.capacity_factor = 0.7}));
  if constexpr (!instrumented) {
    f("deepspeed_top1, jitter",
      moe::deepspeed_top1({.min_capacity = 1, .noisy_gate_policy = moe::noisy_gate::jitter}));
    f("deepspeed_top2", moe::deepspeed_top2({.capacity_factor = 0.7, .min_capacity = 1}));
    f("deepspeed_topk", moe::deepspeed_topk({.k = 3, .capacity_factor = 0.7, .min_capacity = 1}));
    f("tutel_topk, weights after", moe::tutel_topk({.k = 2, .capacity_factor = 0.7}));
    f("tutel_topk, noise and priority",
      moe::tutel_topk(
          {.k = 3, .capacity_factor = 0.7, .gate_noise = 1, .batch_prioritized_routing = true}));
    f("switch_transformer", moe::switch_transformer({.capacity_factor = 0.7, .min_capacity = 1}));
  }
}

/// Experts that apply weights where the preset wants them.
template <class Activation, class Preset>
moe::ffn<Activation> experts_for(Preset const& preset, Activation act = {},
                                 bool recompute = false) {
  return {.act = act,
          .weights_before = preset.apply == moe::weights_apply::before_experts,
          .recompute = recompute};
}

/// A layer with parameters, tokens, and all memory that it needs.
template <class V, class Layer>
struct owned_layer {
  using saved_type = decltype(std::declval<Layer const&>().template carve_saved<V>(moe::memory{}));

  Layer layer;
  moe::cpu exec;
  std::int64_t T, M;  ///< T of the calls; at most the layer's.
  std::vector<V> parameters, gradients, tokens, dout, out, dtokens;
  moe::buffer saved_bytes, scratch;
  saved_type saved;
  moe::batch ids{.first_id = 11, .seed = 5, .step = 3, .training = true};
  moe::layer_losses losses;

  owned_layer(Layer const& made, std::int64_t token_count, unsigned seed, moe::cpu const& on = {})
      : layer(made),
        exec(on),
        T(token_count),
        M(layer.shape().M),
        parameters(normals<V>(layer.parameter_elements(), seed, 0, 0.5)),
        gradients(parameters.size(), V(1e30)),
        tokens(normals<V>(T * M, seed + 1)),
        dout(normals<V>(T * M, seed + 2)),
        out(tokens.size(), V(1e30)),
        dtokens(tokens.size(), V(1e30)),
        saved_bytes(layer.template saved_bytes<V>()),
        scratch(layer.template scratch_bytes<V>(exec)),
        saved(layer.template carve_saved<V>(saved_bytes)) {}
  owned_layer(owned_layer const&) = delete;
  owned_layer& operator=(owned_layer const&) = delete;

  auto weights() { return layer.carve(parameters.data()); }
  auto dweights() { return layer.carve(gradients.data()); }
  moe::matrix_view<V> view(std::vector<V>& of) const { return {of.data(), T, M}; }

  template <class Hooks = moe::no_hooks>
  void forward(Hooks&& hooks = {}) {
    losses = layer.forward(exec, weights(), view(tokens), ids, view(out), saved, scratch, hooks);
  }
  void backward(moe::loss_weights const& by = {}, moe::update how = moe::update::assign) {
    layer.backward(exec, weights(), view(tokens), view(dout), by, saved, view(dtokens), dweights(),
                   how, scratch);
  }
};

/// The part of what a layer saves that its routed experts do.
template <class Saved>
auto const& routed_part(Saved const& saved) {
  if constexpr (requires { saved.moe; })
    return saved.moe;
  else
    return saved;
}

/// What gradient_error has found out.
struct gradient_check {
  double worst = 0;          ///< Greatest |analytic - numeric| / max(1, |numeric|).
  std::int64_t checked = 0;  ///< Derivatives.
  std::int64_t dropped = 0;  ///< Pairs that the capacity refused.
  std::int64_t flipped = 0;  ///< Forwards in which another expert or row was chosen.
  std::int64_t nonzero = 0;  ///< Derivatives that are not 0.
};

/// Compares every derivative of a layer with central differences.
template <class Layer>
gradient_check check_gradients(owned_layer<double, Layer>& c) {
  moe::loss_weights const by{.balance = 0.3, .z = c.layer.shape().z_loss ? 0.2 : 0};
  c.forward();
  c.backward(by);
  gradient_check result;
  auto const& routed = routed_part(c.saved);
  std::int64_t const pairs = c.T * routed.routed.K;
  std::vector<std::int32_t> const experts(routed.routed.expert, routed.routed.expert + pairs);
  std::vector<std::int32_t> const rows(routed.table.row_of, routed.table.row_of + pairs);
  result.dropped = routed.table.counts->dropped;
  auto const total = [&] {
    c.forward();
    if (!std::equal(experts.begin(), experts.end(), routed.routed.expert) ||
        !std::equal(rows.begin(), rows.end(), routed.table.row_of))
      ++result.flipped;
    double sum = by.balance * c.losses.balance + by.z * c.losses.z;
    for (std::size_t i = 0; i < c.out.size(); ++i) sum += c.out[i] * c.dout[i];
    return sum;
  };
  auto const compare = [&](std::vector<double>& x, std::vector<double> const& gradient) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      double const middle = x[i], h = 1e-5;
      x[i] = middle + h;
      double const above = total();
      x[i] = middle - h;
      double const below = total();
      x[i] = middle;
      double const numeric = (above - below) / (2 * h);
      double const error = std::abs(gradient[i] - numeric) / std::max(1.0, std::abs(numeric));
      result.worst = error <= result.worst ? result.worst : error;  // NaN is the worst
      ++result.checked;
      if (numeric != 0) ++result.nonzero;
    }
  };
  compare(c.parameters, c.gradients);
  compare(c.tokens, c.dtokens);
  return result;
}

/// A layer whose derivatives can all be computed numerically.
inline constexpr moe::layer_shape small{
    .T = 6, .M = 3, .H = 4, .E = 4, .bias = true, .z_loss = true};

/// What check_all_gradients has seen.
struct gradient_count {
  int layers = 0;
  std::int64_t derivatives = 0, nonzero = 0, dropped = 0;
};

/// Checks the gradients of the layers of every preset and activation, one token being masked.
/// @param for_each_layer  for_each_layer(preset, experts, check) calls check(layer) for each layer of
///                        shape `small` that it makes of the two.
template <class ForEachLayer>
gradient_count check_all_gradients(ForEachLayer const& for_each_layer) {
  gradient_count seen;
  std::uint8_t const live[] = {1, 1, 1, 0, 1, 1};
  auto const kinds_of = [&]<class Activation>(Activation, auto const& preset) {
    for (int kind = 0; kind < 4; ++kind) {
      CAPTURE(Activation::names[kind]);
      auto const experts = experts_for(preset, Activation{kind}, kind % 2 == 1);
      for_each_layer(preset, experts, [&](auto const& layer) {
        owned_layer<double, std::decay_t<decltype(layer)>> c(layer, small.T,
                                                             300 + 7 * static_cast<unsigned>(kind));
        c.ids.live = live;
        auto const result = check_gradients(c);
        CHECK(result.flipped == 0);
        CHECK(result.worst < 2e-8);
        ++seen.layers;
        seen.derivatives += result.checked;
        seen.nonzero += result.nonzero;
        seen.dropped += result.dropped;
      });
    }
  };
  for_each_preset([&](char const* name, auto const& preset) {
    CAPTURE(std::string(name));
    kinds_of(any_plain{}, preset);
    kinds_of(any_gated{}, preset);
  });
  return seen;
}

}  // namespace moe_test
