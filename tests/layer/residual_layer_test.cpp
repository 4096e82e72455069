// residual_layer: gradients of all mixes with every preset and activation, the mix by hand, edges.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/layer/residual_layer.hpp>

#include "case.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::owned_layer;
using moe_test::refusal;
using moe_test::same_bits;
using moe_test::says;
using moe_test::small;

template <class Preset, class Activation>
using layer_of = moe::residual_layer<Preset, moe::ffn<Activation>>;

}  // namespace

TEST_CASE("layer/residual_layer: gradients of every preset, activation and mix") {
  auto const seen =
      moe_test::check_all_gradients([](auto const& preset, auto const& experts, auto const& check) {
        for (auto const mix :
             {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated}) {
          CAPTURE(static_cast<int>(mix));
          check(moe::residual_layer(preset, experts, small, mix, 5));
        }
      });
  CHECK(seen.layers == moe_test::all_presets * 8 * 3);
  // Router and tokens; four experts and the fixed one, with biases; the mix.
  std::int64_t const all = 3 * (12 + 18) + 8 + 3;
  std::int64_t const plain = 4 * (2 * 12 + 4 + 3) + 2 * 15 + 5 + 3;
  std::int64_t const gated = 4 * (3 * 12 + 2 * 4 + 3) + 3 * 15 + 2 * 5 + 3;
  CHECK(seen.derivatives == moe_test::all_presets * 4 * (2 * all + 3 * plain + 3 * gated));
  CHECK(2 * seen.nonzero > seen.derivatives);
  CHECK(seen.dropped > 0);
}

namespace {

/// A router that keeps everything.
auto dropless() {
  return moe::tutel_topk({.k = 2, .capacity_factor = 0});
}
using two = decltype(dropless());
using gelu_layer = layer_of<two, moe::gelu>;

gelu_layer layer_for(std::int64_t T, moe::residual_mix mix, std::int64_t fixed_hidden = 0) {
  return {dropless(), {}, {.T = T, .M = 8, .H = 11, .E = 5, .bias = true}, mix, fixed_hidden};
}

/// The fixed expert on one token, in loops.
std::vector<double> fixed_expert(moe::ffn_weights<double> const& p, double const* x) {
  auto const [P, M, H] = p.shape();
  std::vector<double> y(p.down_bias.row(0), p.down_bias.row(0) + M);
  for (std::int64_t h = 0; h < H; ++h) {
    double u = p.up_bias(0, h);
    for (std::int64_t m = 0; m < M; ++m) u += x[m] * p.up[0](m, h);
    double const hidden = u * 0.5 * std::erfc(-u / std::sqrt(2.0));
    for (std::int64_t m = 0; m < M; ++m) y[static_cast<std::size_t>(m)] += hidden * p.down[0](h, m);
  }
  return y;
}

}  // namespace

TEST_CASE("layer/residual_layer: is the mix of a moe_layer and a dense network") {
  for (auto const mix :
       {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated})
    for (std::int64_t fixed_hidden : {0, 3, 20}) {
      CAPTURE(fixed_hidden);
      std::int64_t const T = 21;
      owned_layer<double, gelu_layer> c(layer_for(T, mix, fixed_hidden), T, 3);
      auto const p = c.weights();
      CHECK(p.fixed.shape().H == (fixed_hidden == 0 ? 11 : fixed_hidden));
      using routed_layer = moe::moe_layer<two, moe::ffn<moe::gelu>>;
      owned_layer<double, routed_layer> routed(c.layer.moe(), T, 3);
      std::copy_n(c.parameters.begin(), routed.parameters.size(), routed.parameters.begin());
      routed.tokens = c.tokens;
      std::vector<std::uint8_t> live(static_cast<std::size_t>(T), 1);
      live[4] = live[20] = 0;
      c.ids.live = routed.ids.live = live.data();
      c.forward();
      routed.forward();
      double worst = 0;
      for (std::int64_t t = 0; t < T; ++t) {
        double const* const x = c.tokens.data() + t * c.M;
        auto const dense = fixed_expert(p.fixed, x);
        double c0 = 1, c1 = 1;
        if (mix == moe::residual_mix::learned) {
          double l[2] = {p.mix_bias[0], p.mix_bias[1]};
          for (std::int64_t m = 0; m < c.M; ++m)
            for (int i : {0, 1}) l[i] += x[m] * p.mix(m, i);
          c0 = std::exp(l[0]) / (std::exp(l[0]) + std::exp(l[1]));
          c1 = 1 - c0;
        }
        if (mix == moe::residual_mix::gated) {
          double l = 0;
          for (std::int64_t m = 0; m < c.M; ++m) l += x[m] * p.mix(m, 0);
          c1 = 1 / (1 + std::exp(-l));
        }
        for (std::int64_t m = 0; m < c.M; ++m) {
          double const want =
              c0 * routed.view(routed.out)(t, m) + c1 * dense[static_cast<std::size_t>(m)];
          double const error = std::abs(c.view(c.out)(t, m) - want);
          worst = moe_test::worse(worst, error);
        }
      }
      CHECK(worst < 1e-12);
      CHECK(c.losses.balance == routed.losses.balance);
    }
}

TEST_CASE("layer/residual_layer: any number of threads gives the same bits") {
  for (auto const mix :
       {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated}) {
    std::int64_t const T = 333;
    gelu_layer const layer = layer_for(T, mix);
    owned_layer<float, gelu_layer> one(layer, T, 4);
    one.forward();
    one.backward({.balance = 0.1});
    for (int threads : {2, 3, 7}) {
      CAPTURE(threads);
      moe::thread_team team(threads);
      owned_layer<float, gelu_layer> many(layer, T, 4, team);
      many.forward();
      many.backward({.balance = 0.1});
      CHECK(same_bits(one.out, many.out));
      CHECK(same_bits(one.dtokens, many.dtokens));
      CHECK(same_bits(one.gradients, many.gradients));
    }
  }
}

TEST_CASE("layer/residual_layer: gradients accumulate, T below the bound, no tokens") {
  for (auto const mix :
       {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated}) {
    owned_layer<double, gelu_layer> exact(layer_for(13, mix), 13, 8),
        roomy(layer_for(50, mix), 13, 8), none(layer_for(5, mix), 0, 8);
    for (auto* c : {&exact, &roomy, &none}) {
      c->forward();
      c->backward({.balance = 0.1});
    }
    CHECK(same_bits(exact.out, roomy.out));
    CHECK(same_bits(exact.dtokens, roomy.dtokens));
    CHECK(same_bits(exact.gradients, roomy.gradients));
    CHECK(none.gradients == std::vector<double>(none.gradients.size(), 0.0));

    auto const once = exact.gradients;
    exact.backward({.balance = 0.1}, moe::update::add);
    double worst = 0;
    for (std::size_t i = 0; i < once.size(); ++i)
      worst = moe_test::worse(worst, std::abs(exact.gradients[i] - 2 * once[i]));
    CHECK(worst < 1e-12);
  }
}

TEST_CASE("layer/residual_layer: for_each_parameter visits every element once") {
  for (auto const mix :
       {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated}) {
    owned_layer<double, gelu_layer> c(layer_for(2, mix, 7), 2, 3);
    std::fill(c.parameters.begin(), c.parameters.end(), 0.0);
    std::fill(c.gradients.begin(), c.gradients.end(), 0.0);
    moe::for_each_parameter(c.weights(), c.dweights(), [&](char const*, auto value, auto gradient) {
      for (std::int64_t i = 0; i < value.size(); ++i) {
        value[i] += 1;
        gradient[i] += 2;
      }
    });
    CHECK(c.parameters == std::vector<double>(c.parameters.size(), 1.0));
    CHECK(c.gradients == std::vector<double>(c.gradients.size(), 2.0));
  }
}

TEST_CASE("layer/residual_layer: hooks are those of the routed part") {
  struct counting {
    int calls = 0;
    void logits(moe::matrix_view<double>) { ++calls; }
    void rows_in(moe::matrix_view<double const>) { ++calls; }
  } hooks;
  owned_layer<double, gelu_layer> c(layer_for(3, moe::residual_mix::add), 3, 8);
  c.forward(hooks);
  CHECK(hooks.calls == 2);
}

TEST_CASE("layer/residual_layer: bad arguments are refused") {
  says(refusal([] { layer_for(3, moe::residual_mix::add, -1); }),
       "residual_layer: fixed_hidden >= 0; got fixed_hidden = -1");
  for (auto const mix :
       {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated}) {
    gelu_layer const layer = layer_for(3, mix);
    owned_layer<double, gelu_layer> c(layer, 3, 8), add(layer_for(3, moe::residual_mix::add), 3, 8);
    auto const x = c.view(c.tokens), y = c.view(c.out);
    auto const forward = [&](auto const& weights, auto in, auto out, moe::memory scratch) {
      return refusal([&] { layer.forward(c.exec, weights, in, c.ids, out, c.saved, scratch); });
    };
    says(
        refusal([&] { c.backward(); }),
        "residual_layer::backward: saved was filled by a forward of the same T, dout is [T,M]; got "
        "filled = 0");
    std::vector<double> larger(32);
    moe::matrix_view<double> const four(larger.data(), 4, 8);
    says(forward(c.weights(), four, y, c.scratch), "residual_layer: T is within the bound");
    says(forward(c.weights(), x, four, c.scratch), "out.rows = 4");
    says(forward(c.weights(), x, x, c.scratch),
         "residual_layer: the output does not overlap tokens");
    says(forward(c.weights(), x, y, {c.scratch.data(), 64}), "scratch");
    if (mix == moe::residual_mix::learned) {
      says(forward(add.weights(), x, y, c.scratch), "residual_layer: a learned mix has");
      says(refusal([&] { layer.forward(c.exec, c.weights(), x, c.ids, y, add.saved, c.scratch); }),
           "residual_layer: saved was made for this layer");
    }
    // A forward that fails in the fixed expert leaves nothing for backward.
    auto two_fixed = c.weights();
    two_fixed.fixed = two_fixed.moe.experts;
    says(forward(two_fixed, x, y, c.scratch), "grouped_gemm: one matrix for each expert");
    says(refusal([&] { c.backward(); }), "filled = 0");
    c.forward();
    says(refusal([&] {
           layer.backward(c.exec, c.weights(), x, {y.data(), 2, 8}, {}, c.saved, c.view(c.dtokens),
                          c.dweights(), moe::update::assign, c.scratch);
         }),
         "dout.rows = 2");
    says(refusal([&] {
           layer.backward(c.exec, c.weights(), x, y, {}, c.saved, c.view(c.dtokens), c.dweights(),
                          moe::update::assign, {c.scratch.data(), 64});
         }),
         "scratch");
    says(refusal([&] {
           layer.template carve_saved<double>({c.saved_bytes.data(), c.saved_bytes.size() / 2});
         }),
         "memory holds");
    says(refusal([&] { c.backward(); }), "nothing was thrown");
  }
}
