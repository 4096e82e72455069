// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <string>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/layer/soft_moe.hpp>

#include "support/same_bits.hpp"

namespace {

using moe_test::same_bits;

using layer_type = moe::soft_moe<moe::ffn<moe::gelu>>;
using gated_type = moe::soft_moe<moe::ffn<moe::swiglu>>;
using moe_test::says;

/// A layer with parameters, tokens, and all memory that it needs.
template <class V, class Layer = layer_type>
struct owned {
  Layer layer;
  moe::cpu exec;
  std::int64_t T, M;
  std::vector<V> parameters, gradients, tokens, dout, out, dtokens;
  moe::buffer saved_bytes, scratch;
  moe::soft_moe_saved<V> saved;
  moe::batch ids;

  owned(moe::soft_moe_shape const& shape, std::int64_t token_count, unsigned seed,
        moe::cpu const& on = {})
      : layer({}, shape),
        exec(on),
        T(token_count),
        M(shape.M),
        parameters(moe_test::normals<V>(layer.parameter_elements(), seed, 0, 0.5)),
        gradients(parameters.size(), V(1e30)),
        tokens(moe_test::normals<V>(T * M, seed + 1)),
        dout(moe_test::normals<V>(T * M, seed + 2)),
        out(tokens.size(), V(1e30)),
        dtokens(tokens.size(), V(1e30)),
        saved_bytes(layer.template saved_bytes<V>()),
        scratch(layer.template scratch_bytes<V>(exec)),
        saved(layer.template carve_saved<V>(saved_bytes)) {
    weights().scale[0] = V(2.5);
  }
  owned(owned const&) = delete;
  owned& operator=(owned const&) = delete;

  auto weights() { return layer.carve(parameters.data()); }
  moe::matrix_view<V> view(std::vector<V>& of) const { return {of.data(), T, M}; }
  void forward() { layer.forward(exec, weights(), view(tokens), ids, view(out), saved, scratch); }
  void backward(moe::update how = moe::update::assign) {
    layer.backward(exec, weights(), view(tokens), view(dout), saved, view(dtokens),
                   layer.carve(gradients.data()), how, scratch);
  }
  double loss() {
    forward();
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += double(dout[i]) * double(out[i]);
    return sum;
  }
};

double gelu(double x) {
  return x * 0.5 * std::erfc(-x / std::sqrt(2.0));
}

/// The layer in loops, as its formulas are written.
std::vector<double> slow(owned<double>& c) {
  auto const p = c.weights();
  auto const& shape = c.layer.shape();
  std::int64_t const L = c.layer.L(), H = shape.H, M = c.M;
  std::int64_t const S = shape.sequence == 0 ? c.T : shape.sequence;
  std::vector<double> out(c.tokens.size(), 0.0);
  auto const x = c.view(c.tokens);
  for (std::int64_t t0 = 0; t0 < c.T; t0 += S) {
    std::vector<std::vector<double>> z(static_cast<std::size_t>(S),
                                       std::vector<double>(static_cast<std::size_t>(L)));
    auto const at = [&](std::int64_t t, std::int64_t l) -> double& {
      return z[static_cast<std::size_t>(t)][static_cast<std::size_t>(l)];
    };
    for (std::int64_t t = 0; t < S; ++t)
      for (std::int64_t l = 0; l < L; ++l) {
        double xx = 0, pp = 0, xp = 0;
        for (std::int64_t m = 0; m < M; ++m) {
          xx += x(t0 + t, m) * x(t0 + t, m);
          pp += p.phi(m, l) * p.phi(m, l);
          xp += x(t0 + t, m) * p.phi(m, l);
        }
        at(t, l) = p.scale[0] * xp / ((std::sqrt(xx) + 1e-6) * (std::sqrt(pp) + 1e-6));
      }
    for (std::int64_t l = 0; l < L; ++l) {
      std::vector<double> in(static_cast<std::size_t>(M)), y(static_cast<std::size_t>(M));
      double total = 0;
      for (std::int64_t t = 0; t < S; ++t)
        if (c.ids.is_live(t0 + t)) total += std::exp(at(t, l));
      for (std::int64_t t = 0; t < S; ++t)
        for (std::int64_t m = 0; m < M && c.ids.is_live(t0 + t); ++m)
          in[static_cast<std::size_t>(m)] += std::exp(at(t, l)) / total * x(t0 + t, m);
      std::int64_t const e = l / shape.slots;
      for (std::int64_t m = 0; m < M; ++m)
        y[static_cast<std::size_t>(m)] = p.experts.down_bias(e, m);
      for (std::int64_t h = 0; h < H; ++h) {
        double u = p.experts.up_bias(e, h);
        for (std::int64_t m = 0; m < M; ++m)
          u += in[static_cast<std::size_t>(m)] * p.experts.up[e](m, h);
        for (std::int64_t m = 0; m < M; ++m)
          y[static_cast<std::size_t>(m)] += gelu(u) * p.experts.down[e](h, m);
      }
      for (std::int64_t t = 0; t < S; ++t) {
        if (!c.ids.is_live(t0 + t)) continue;
        double row = 0;
        for (std::int64_t k = 0; k < L; ++k) row += std::exp(at(t, k));
        for (std::int64_t m = 0; m < M; ++m)
          out[static_cast<std::size_t>((t0 + t) * M + m)] +=
              std::exp(at(t, l)) / row * y[static_cast<std::size_t>(m)];
      }
    }
  }
  return out;
}

moe::soft_moe_shape const small{
    .T = 6, .M = 4, .H = 5, .E = 3, .slots = 2, .sequence = 3, .bias = true};

}  // namespace

TEST_CASE("layer/soft_moe: one feature and two slots by hand") {
  // M = 1: norms are signs (but for eps). Tokens 2 and -3, phi 5 and -1, scale = ln 3: logits are
  // (ln 3, -ln 3; -ln 3, ln 3), so that softmax over either side is (0.9, 0.1; 0.1, 0.9).
  owned<double> c({.T = 2, .M = 1, .H = 1, .E = 2}, 2, 1);
  auto const p = c.weights();
  p.phi(0, 0) = 5;
  p.phi(0, 1) = -1;
  p.scale[0] = std::log(3.0);
  c.tokens = {2, -3};
  c.forward();
  for (int t : {0, 1})
    for (int l : {0, 1}) {
      double const expected = t == l ? 0.9 : 0.1;
      CHECK(c.saved.dispatch(t, l) == doctest::Approx(expected).epsilon(1e-5));
      CHECK(c.saved.combine(t, l) == doctest::Approx(expected).epsilon(1e-5));
    }
  CHECK(c.saved.slots_in(0, 0) == doctest::Approx(0.9 * 2 - 0.1 * 3).epsilon(1e-5));
  CHECK(c.saved.slots_in(1, 0) == doctest::Approx(0.1 * 2 - 0.9 * 3).epsilon(1e-5));
  double const y0 = gelu(1.5 * p.experts.up[0](0, 0)) * p.experts.down[0](0, 0);
  double const y1 = gelu(-2.5 * p.experts.up[1](0, 0)) * p.experts.down[1](0, 0);
  CHECK(c.out[0] == doctest::Approx(0.9 * y0 + 0.1 * y1).epsilon(1e-5));
  CHECK(c.out[1] == doctest::Approx(0.1 * y0 + 0.9 * y1).epsilon(1e-5));
}

TEST_CASE("layer/soft_moe: agrees with its formulas in loops") {
  for (unsigned seed = 0; seed < 12; ++seed) {
    CAPTURE(seed);
    std::int64_t const S = 1 + seed % 5, n = 1 + seed % 3;
    owned<double> c({.T = S * n + (seed % 2 == 0 ? 0 : S),
                     .M = 3 + seed % 4,
                     .H = 6,
                     .E = 1 + static_cast<int>(seed % 4),
                     .slots = 1 + static_cast<int>(seed % 3),
                     .sequence = S,
                     .bias = true},
                    S * n, seed);
    std::vector<std::uint8_t> live(static_cast<std::size_t>(c.T), 1);
    if (seed % 4 == 3) live[0] = live[live.size() - 1] = 0;
    c.ids.live = live.data();
    c.forward();
    auto const expected = slow(c);
    for (std::size_t i = 0; i < expected.size(); ++i)
      CHECK(c.out[i] == doctest::Approx(expected[i]).epsilon(1e-11));
  }
  owned<double> whole({.T = 9, .M = 4, .H = 6, .E = 2, .slots = 40, .bias = true}, 7, 3);
  whole.forward();  // one sequence of seven tokens, 80 slots
  auto const expected = slow(whole);
  for (std::size_t i = 0; i < expected.size(); ++i)
    CHECK(whole.out[i] == doctest::Approx(expected[i]).epsilon(1e-11));
}

TEST_CASE("layer/soft_moe: gradients of everything agree with central differences") {
  auto const check = [](auto& c) {
    c.loss();
    c.backward();
    auto const parameters = c.parameters, tokens = c.tokens;
    auto const gradients = c.gradients, dtokens = c.dtokens;
    moe_test::check_gradient(
        [&](std::vector<double> const& v) {
          c.parameters = v;
          return c.loss();
        },
        parameters, gradients);
    c.parameters = parameters;
    moe_test::check_gradient(
        [&](std::vector<double> const& v) {
          c.tokens = v;
          return c.loss();
        },
        tokens, dtokens);
  };
  owned<double> plain(small, 6, 1);
  check(plain);
  owned<double, gated_type> gated(small, 6, 2);
  check(gated);
  owned<double> masked(small, 6, 3);
  std::vector<std::uint8_t> const live{1, 1, 0, 0, 1, 1};
  masked.ids.live = live.data();
  check(masked);
  for (std::size_t m = 8; m < 16; ++m) {
    CHECK(masked.out[m] == 0);
    CHECK(masked.dtokens[m] == 0);
  }
}

TEST_CASE("layer/soft_moe: tokens of one sequence do not see another") {
  owned<double> c(small, 6, 4);
  c.forward();
  auto const before = c.out;
  for (std::size_t i = 12; i < 24; ++i) c.tokens[i] += 1;
  c.forward();
  for (std::size_t i = 0; i < 24; ++i) CHECK((c.out[i] == before[i]) == (i < 12));
  // Within a sequence, each sees all: not causal.
  c.tokens[11] += 1;
  c.forward();
  for (std::size_t i = 0; i < 12; ++i) CHECK(c.out[i] != before[i]);
}

TEST_CASE("layer/soft_moe: softmaxes sum to one; a token of zeros is one, too") {
  owned<float> c({.T = 10, .M = 8, .H = 4, .E = 3, .slots = 2}, 10, 5);
  std::fill_n(c.tokens.begin(), 8, 0.0f);
  c.forward();
  c.backward();
  for (std::int64_t l = 0; l < 6; ++l) {
    double sum = 0;
    for (std::int64_t t = 0; t < 10; ++t) sum += c.saved.dispatch(t, l);
    CHECK(sum == doctest::Approx(1).epsilon(1e-5));
  }
  for (std::int64_t t = 0; t < 10; ++t) {
    double sum = 0;
    for (std::int64_t l = 0; l < 6; ++l) sum += c.saved.combine(t, l);
    CHECK(sum == doctest::Approx(1).epsilon(1e-5));
  }
  for (std::int64_t l = 0; l < 6; ++l) CHECK(c.saved.combine(0, l) == doctest::Approx(1 / 6.0));
  for (float const g : c.dtokens) CHECK(std::isfinite(g));
}

TEST_CASE("layer/soft_moe: threads change nothing, gradients accumulate, T below the bound") {
  moe::soft_moe_shape const shape{.T = 96, .M = 12, .H = 9, .E = 5, .slots = 3, .sequence = 24};
  owned<float> one(shape, 96, 6);
  one.forward();
  one.backward();
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    owned<float> many(shape, 96, 6, team);
    many.forward();
    many.backward();
    CHECK(same_bits(one.out, many.out));
    CHECK(same_bits(one.dtokens, many.dtokens));
    CHECK(same_bits(one.gradients, many.gradients));
  }
  auto wide = shape;
  wide.T = 240;
  owned<float> roomy(wide, 96, 6);
  roomy.forward();
  roomy.backward();
  CHECK(same_bits(one.out, roomy.out));
  CHECK(same_bits(one.gradients, roomy.gradients));

  auto const once = one.gradients;
  one.backward(moe::update::add);
  for (std::size_t i = 0; i < once.size(); ++i)
    CHECK(one.gradients[i] == doctest::Approx(2 * once[i]).epsilon(1e-5));

  owned<float> none(shape, 0, 6);
  none.forward();
  none.backward();
  CHECK(none.gradients == std::vector<float>(none.gradients.size(), 0.0f));
}

TEST_CASE("layer/soft_moe: for_each_parameter visits every element once") {
  owned<double> c(small, 6, 1);
  std::fill(c.parameters.begin(), c.parameters.end(), 0.0);
  std::fill(c.gradients.begin(), c.gradients.end(), 0.0);
  moe::for_each_parameter(c.weights(), c.layer.carve(c.gradients.data()),
                          [&](char const*, auto value, auto gradient) {
                            for (std::int64_t i = 0; i < value.size(); ++i) {
                              value[i] += 1;
                              gradient[i] += 2;
                            }
                          });
  CHECK(c.parameters == std::vector<double>(c.parameters.size(), 1.0));
  CHECK(c.gradients == std::vector<double>(c.gradients.size(), 2.0));
}

TEST_CASE("layer/soft_moe: bad arguments are refused") {
  using moe_test::refusal;
  auto const made = [](moe::soft_moe_shape const& shape) {
    return refusal([&] { layer_type({}, shape); });
  };
  says(made({.T = 1, .M = 1, .H = 1, .E = 1, .slots = 0}), "soft_moe: T >= 0, M >= 1");
  says(made({.T = 1, .M = 1, .H = 1, .E = 1, .sequence = -1}), "sequence = -1");
  says(made({.T = 1 << 20, .M = 1, .H = 1, .E = 1 << 12, .sequence = 1}), "fit 32-bit ids");
  owned<double> c(small, 6, 1), other({.T = 6, .M = 4, .H = 5, .E = 2, .slots = 2}, 6, 1);
  says(refusal([&] { c.backward(); }), "saved was filled by a forward of the same T");
  std::vector<double> larger(36);
  auto const forward = [&](auto const& weights, moe::matrix_view<double> in,
                           moe::matrix_view<double> out, auto& saved, moe::memory scratch) {
    return refusal([&] { c.layer.forward(c.exec, weights, in, c.ids, out, saved, scratch); });
  };
  auto const x = c.view(c.tokens), y = c.view(c.out);
  says(forward(c.weights(), {larger.data(), 9, 4}, y, c.saved, c.scratch), "T = 9, most = 6");
  says(forward(c.weights(), {larger.data(), 4, 4}, y, c.saved, c.scratch), "multiple of sequence");
  says(forward(c.weights(), x, x, c.saved, c.scratch), "do not overlap");
  says(forward(c.weights(), x, {larger.data(), 3, 4}, c.saved, c.scratch), "other rows = 3");
  says(forward(other.weights(), x, y, c.saved, c.scratch), "phi is [M,L]");
  says(forward(c.weights(), x, y, other.saved, c.scratch), "saved was made for this layer");
  says(forward(c.weights(), x, y, c.saved, {c.scratch.data(), 64}), "scratch");
  says(refusal([&] { c.backward(); }), "saved T = -1");  // the last forward failed
  says(refusal(
           [&] { c.layer.carve_saved<double>({c.saved_bytes.data(), c.saved_bytes.size() / 2}); }),
       "memory holds saved_bytes");
  c.forward();
  says(refusal([&] {
         c.layer.backward(c.exec, c.weights(), x, {y.data(), 3, 4}, c.saved, c.view(c.dtokens),
                          c.layer.carve(c.gradients.data()), moe::update::assign, c.scratch);
       }),
       "dout is [T,M]");
  says(refusal([&] {
         c.layer.backward(c.exec, c.weights(), x, y, c.saved, c.view(c.dtokens),
                          other.layer.carve(c.gradients.data()), moe::update::assign, c.scratch);
       }),
       "the gradients of phi and scale");
  CHECK(refusal([&] { c.backward(); }) == "nothing was thrown");
}
