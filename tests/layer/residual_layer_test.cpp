// residual_layer: gradients of both mixes with every preset and activation, the mix by hand, edges.
// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <string>

#include <moe/core/thread_team.hpp>
#include <moe/layer/residual_layer.hpp>

#include "case.hpp"

namespace {

using moe_test::any_gated;
using moe_test::any_plain;
using moe_test::owned_layer;

template <class Preset, class Activation>
using layer_of = moe::residual_layer<Preset, moe::ffn<Activation>>;

constexpr moe::layer_shape small{.T = 6, .M = 3, .H = 4, .E = 4, .bias = true, .z_loss = true};

struct count {
  int layers = 0;
  std::int64_t derivatives = 0, nonzero = 0, dropped = 0;
};

template <class Activation, class Preset>
void check_activations(Preset const& preset, count& seen) {
  for (int kind = 0; kind < 4; ++kind)
    for (auto const mix : {moe::residual_mix::add, moe::residual_mix::learned}) {
      CAPTURE(Activation::names[kind]);
      CAPTURE(mix == moe::residual_mix::learned);
      bool const recompute = kind % 2 == 1;
      layer_of<Preset, Activation> const layer(
          preset, moe_test::experts_for(preset, Activation{kind}, recompute), small, mix, 5);
      owned_layer<double, layer_of<Preset, Activation>> c(layer, small.T, 100 + 7 * kind);
      std::uint8_t const live[] = {1, 1, 0, 1, 1, 1};
      c.ids.live = live;
      auto const result = moe_test::check_gradients(c);
      CHECK(result.flipped == 0);
      CHECK(result.worst < 2e-8);
      ++seen.layers;
      seen.derivatives += result.checked;
      seen.nonzero += result.nonzero;
      seen.dropped += result.dropped;
    }
}

}  // namespace

TEST_CASE("layer/residual_layer: gradients of every preset, activation and mix") {
  count seen;
  moe_test::for_each_preset([&](char const* name, auto const& preset) {
    CAPTURE(std::string(name));
    check_activations<any_plain>(preset, seen);
    check_activations<any_gated>(preset, seen);
  });
  CHECK(seen.layers == moe_test::all_presets * 8 * 2);
  // Router; four experts and the fixed one, with biases; the mix in half of them; the tokens.
  std::int64_t const both = 2 * (12 + 18) + 8;
  std::int64_t const plain = 4 * (2 * 12 + 4 + 3) + 2 * 15 + 5 + 3;
  std::int64_t const gated = 4 * (3 * 12 + 2 * 4 + 3) + 3 * 15 + 2 * 5 + 3;
  CHECK(seen.derivatives == moe_test::all_presets * 4 * (2 * both + 2 * plain + 2 * gated));
  CHECK(2 * seen.nonzero > seen.derivatives);
  CHECK(seen.dropped > 0);
}
