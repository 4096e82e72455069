// moe_layer: gradients with every preset and activation, a slow reference, laws, hooks, bad input.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/layer/moe_layer.hpp>

#include "case.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::experts_for;
using moe_test::owned_layer;
using moe_test::refusal;
using moe_test::same_bits;
using moe_test::says;
using moe_test::small;

template <class Preset, class Activation>
using layer_of = moe::moe_layer<Preset, moe::ffn<Activation>>;
template <class V, class Preset, class Activation>
using owned = owned_layer<V, layer_of<Preset, Activation>>;

/// A dropless router of two softmax probabilities that are normalised over the two.
auto two_of(bool weights_before = false) {
  return moe::tutel_topk({.k = 2, .capacity_factor = 0, .is_postscore = !weights_before});
}
using two = decltype(two_of());

/// silu(x gate + b) (x up + b) down + b of expert e, times w before or after.
std::vector<double> slow_expert(moe::ffn_weights<double> const& p, std::int64_t e,
                                double const* token, double w, bool before) {
  std::int64_t const M = p.shape().M, H = p.shape().H;
  std::vector<double> y(static_cast<std::size_t>(M));
  for (std::int64_t m = 0; m < M; ++m) y[static_cast<std::size_t>(m)] = p.down_bias(e, m);
  for (std::int64_t h = 0; h < H; ++h) {
    double g = p.gate_bias(e, h), u = p.up_bias(e, h);
    for (std::int64_t m = 0; m < M; ++m) {
      g += (before ? w : 1) * token[m] * p.gate[e](m, h);
      u += (before ? w : 1) * token[m] * p.up[e](m, h);
    }
    double const hidden = g / (1 + std::exp(-g)) * u;
    for (std::int64_t m = 0; m < M; ++m) y[static_cast<std::size_t>(m)] += hidden * p.down[e](h, m);
  }
  if (!before)
    for (double& v : y) v *= w;
  return y;
}

struct slow_result {
  std::vector<double> out;
  moe::layer_losses losses;
};

/// The layer of two_of: every expert for every token, with weight 0 where it was not chosen.
slow_result slow_layer(moe::layer_weights<double> const& p, moe::matrix_view<double> x,
                       bool before) {
  std::int64_t const T = x.rows(), M = x.cols(), E = p.router.cols();
  slow_result result;
  std::vector<double> first(static_cast<std::size_t>(E)), mean(first.size());
  for (std::int64_t t = 0; t < T; ++t) {
    std::vector<double> s(first.size());
    double sum = 0;
    for (std::int64_t e = 0; e < E; ++e) {
      double l = 0;
      for (std::int64_t m = 0; m < M; ++m) l += x(t, m) * p.router(m, e);
      sum += s[static_cast<std::size_t>(e)] = std::exp(l);
    }
    result.losses.z += std::log(sum) * std::log(sum) / static_cast<double>(T);
    std::size_t a = 0;
    for (std::size_t e = 1; e < s.size(); ++e)
      if (s[e] > s[a]) a = e;
    std::size_t b = a == 0 ? 1 : 0;
    for (std::size_t e = 0; e < s.size(); ++e)
      if (e != a && s[e] > s[b]) b = e;
    ++first[a];
    for (std::size_t e = 0; e < s.size(); ++e) mean[e] += s[e] / sum;
    std::vector<double> y(static_cast<std::size_t>(M));
    for (std::size_t e = 0; e < s.size(); ++e) {
      double const w = e == a || e == b ? s[e] / (s[a] + s[b]) : 0;
      if (w == 0) continue;
      auto const part = slow_expert(p.experts, static_cast<std::int64_t>(e), x.row(t), w, before);
      for (std::size_t m = 0; m < y.size(); ++m) y[m] += part[m];
    }
    result.out.insert(result.out.end(), y.begin(), y.end());
  }
  auto const n = static_cast<double>(T);
  for (std::size_t e = 0; e < first.size(); ++e)
    result.losses.balance += static_cast<double>(E) * (first[e] / n) * (mean[e] / n);
  return result;
}

double distance(std::vector<double> const& a, std::vector<double> const& b) {
  REQUIRE(a.size() == b.size());
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    double const d = std::abs(a[i] - b[i]);
    most = moe_test::worse(most, d);
  }
  return most;
}

moe::layer_shape shape_of(std::int64_t T) {
  return {.T = T, .M = 8, .H = 11, .E = 5, .bias = true, .z_loss = true};
}

}  // namespace

TEST_CASE("layer/moe_layer: gradients of every preset and activation") {
  auto const seen =
      moe_test::check_all_gradients([](auto const& preset, auto const& experts, auto const& check) {
        check(moe::moe_layer(preset, experts, small));
      });
  CHECK(seen.layers == moe_test::all_presets * 8);
  std::int64_t const plain = 12 + 4 * (2 * 12 + 4 + 3) + 18;
  std::int64_t const gated = 12 + 4 * (3 * 12 + 2 * 4 + 3) + 18;
  CHECK(seen.derivatives == moe_test::all_presets * 4 * (plain + gated));
  CHECK(2 * seen.nonzero > seen.derivatives);
  CHECK(seen.dropped > 0);
}

TEST_CASE("layer/moe_layer: equals a loop over all experts, and its losses") {
  for (bool before : {false, true})
    for (std::int64_t T : {1, 2, 37}) {
      CAPTURE(before);
      CAPTURE(T);
      auto const preset = two_of(before);
      owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), shape_of(T)}, T,
                                        static_cast<unsigned>(T));
      c.ids.training = false;
      c.forward();
      auto const slow = slow_layer(c.weights(), c.view(c.tokens), before);
      CHECK(distance(c.out, slow.out) < 1e-12);
      CHECK(std::abs(c.losses.balance - slow.losses.balance) < 1e-12);
      CHECK(std::abs(c.losses.z - slow.losses.z) < 1e-12);
    }
}

TEST_CASE("layer/moe_layer: equal experts, dropless, are one dense network") {
  auto const preset = two_of();
  std::int64_t const T = 23;
  owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), shape_of(T)}, T, 9);
  auto const all = c.weights().experts;
  auto const repeat = [](double* data, std::int64_t each, std::int64_t times) {
    for (std::int64_t e = 1; e < times; ++e) std::copy_n(data, each, data + e * each);
  };
  for (auto const& part : {all.up, all.gate, all.down})
    repeat(part.data(), part.rows() * part.cols(), part.count());
  for (auto const& part : {all.up_bias, all.gate_bias, all.down_bias})
    repeat(part.data(), part.cols(), part.rows());
  c.forward();
  std::vector<double> dense;
  for (std::int64_t t = 0; t < T; ++t)
    for (double v : slow_expert(all, 0, c.tokens.data() + t * c.M, 1, false)) dense.push_back(v);
  CHECK(distance(c.out, dense) < 1e-12);
}

TEST_CASE("layer/moe_layer: any number of threads gives the same bits") {
  auto const check = [](auto const& preset) {
    using preset_type = std::remove_cvref_t<decltype(preset)>;
    std::int64_t const T = 333;
    moe::layer_shape shape = shape_of(T);
    shape.H = 40;
    layer_of<preset_type, moe::swiglu> const layer(preset, experts_for<moe::swiglu>(preset), shape);
    owned<float, preset_type, moe::swiglu> one(layer, T, 4);
    one.forward();
    one.backward({.balance = 0.1, .z = 0.01});
    for (int threads : {2, 3, 7}) {
      CAPTURE(threads);
      moe::thread_team team(threads);
      owned<float, preset_type, moe::swiglu> many(layer, T, 4, team);
      many.forward();
      many.backward({.balance = 0.1, .z = 0.01});
      CHECK(same_bits(one.out, many.out));
      CHECK(same_bits(one.dtokens, many.dtokens));
      CHECK(same_bits(one.gradients, many.gradients));
      CHECK(one.losses.balance == many.losses.balance);
      CHECK(one.losses.z == many.losses.z);
    }
  };
  check(moe::deepspeed_top1({.noisy_gate_policy = moe::noisy_gate::jitter}));
  check(moe::tutel_topk({.k = 3, .gate_noise = 1, .batch_prioritized_routing = true}));
}

TEST_CASE("layer/moe_layer: gradients accumulate") {
  auto const preset = moe::switch_transformer({.capacity_factor = 0.8});
  layer_of<decltype(preset), moe::gelu> const layer(preset, {}, shape_of(19));
  owned_layer<double, std::remove_cv_t<decltype(layer)>> c(layer, 19, 6);
  c.forward();
  c.backward({.balance = 0.1, .z = 0.2});
  auto const once = c.gradients;
  auto const dtokens = c.dtokens;
  std::fill(c.gradients.begin(), c.gradients.end(), 0.0);
  for (int i = 0; i < 2; ++i) c.backward({.balance = 0.1, .z = 0.2}, moe::update::add);
  double worst = 0;
  for (std::size_t i = 0; i < once.size(); ++i)
    worst = moe_test::worse(worst, std::abs(c.gradients[i] - 2 * once[i]));
  CHECK(worst < 1e-12);
  CHECK(same_bits(c.dtokens, dtokens));  // of the tokens: assigned
}

TEST_CASE("layer/moe_layer: recomputing gives the same bits and saves less") {
  auto const preset = two_of();
  layer_of<two, moe::swiglu> const keeps(preset, experts_for<moe::swiglu>(preset), shape_of(17));
  layer_of<two, moe::swiglu> const again(preset, experts_for<moe::swiglu>(preset, {}, true),
                                         shape_of(17));
  owned<double, two, moe::swiglu> a(keeps, 17, 3), b(again, 17, 3);
  for (auto* c : {&a, &b}) {
    c->forward();
    c->backward({.balance = 0.1});
  }
  CHECK(same_bits(a.out, b.out));
  CHECK(same_bits(a.gradients, b.gradients));
  CHECK(same_bits(a.dtokens, b.dtokens));
  CHECK(again.saved_bytes<double>() < keeps.saved_bytes<double>());
}

TEST_CASE("layer/moe_layer: fewer tokens than the bound are as if the bound were lower") {
  auto const preset = moe::deepspeed_top2({.capacity_factor = 0.6, .min_capacity = 1});
  using preset_type = std::remove_cv_t<decltype(preset)>;
  owned<double, preset_type, moe::gelu> exact({preset, {}, shape_of(13)}, 13, 8),
      roomy({preset, {}, shape_of(50)}, 13, 8);
  for (auto* c : {&exact, &roomy}) {
    c->forward();
    c->backward({.balance = 0.1, .z = 0.1});
  }
  CHECK(exact.saved.table.counts->dropped > 0);
  CHECK(same_bits(exact.out, roomy.out));
  CHECK(same_bits(exact.dtokens, roomy.dtokens));
  CHECK(same_bits(exact.gradients, roomy.gradients));
}

TEST_CASE("layer/moe_layer: no tokens") {
  for (std::int64_t bound : {0, 5}) {
    auto const preset = two_of();
    owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), shape_of(bound)},
                                      0, 8);
    c.forward();
    CHECK(c.losses.balance == 0);
    CHECK(c.losses.z == 0);
    c.backward({.balance = 0.1, .z = 0.1});
    CHECK(c.gradients == std::vector<double>(c.gradients.size(), 0.0));  // assigned
  }
}

TEST_CASE("layer/moe_layer: masked tokens give nothing and get nothing") {
  auto const preset = two_of();
  owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), shape_of(4)}, 4, 8);
  std::uint8_t const live[] = {1, 0, 1, 0};
  c.ids.live = live;
  c.forward();
  c.backward({.balance = 0.1, .z = 0.1});
  for (std::int64_t t : {0, 1, 2, 3}) {
    double out = 0, dtokens = 0;
    for (std::int64_t m = 0; m < c.M; ++m) {
      out += std::abs(c.view(c.out)(t, m));
      dtokens += std::abs(c.view(c.dtokens)(t, m));
    }
    CHECK((out > 0) == (live[t] == 1));
    CHECK((dtokens > 0) == (live[t] == 1));
  }
  // The live ones are as if they were alone.
  owned<double, two, moe::swiglu> alone({preset, experts_for<moe::swiglu>(preset), shape_of(2)}, 2,
                                        8);
  for (std::int64_t m = 0; m < c.M; ++m)
    for (std::int64_t t : {0, 1}) {
      alone.view(alone.tokens)(t, m) = c.view(c.tokens)(2 * t, m);
      alone.view(alone.dout)(t, m) = c.view(c.dout)(2 * t, m);
    }
  alone.forward();
  alone.backward({.balance = 0.1, .z = 0.1});
  CHECK(distance(alone.gradients, c.gradients) < 1e-12);
  CHECK(std::abs(alone.losses.balance - c.losses.balance) < 1e-12);
  CHECK(std::abs(alone.losses.z - c.losses.z) < 1e-12);
}

TEST_CASE("layer/moe_layer: a token that is no number reaches nothing but itself") {
  moe_test::for_each_preset([&](char const* name, auto const& preset) {
    CAPTURE(std::string(name));
    for (bool masked : {false, true}) {
      CAPTURE(masked);
      moe::moe_layer const layer(preset, experts_for<moe::swiglu>(preset), shape_of(9));
      owned_layer<double, std::remove_cv_t<decltype(layer)>> c(layer, 9, 3);
      std::vector<std::uint8_t> live(9, 1);
      live[4] = masked ? 0 : 1;
      c.ids.live = live.data();
      c.view(c.tokens)(4, 5) = std::numeric_limits<double>::quiet_NaN();
      c.forward();
      c.backward({.balance = 0.1, .z = 0.1});
      CHECK(c.saved.table.counts->invalid_tokens == (masked ? 0 : 1));
      CHECK(std::isfinite(c.losses.balance));
      CHECK(std::isfinite(c.losses.z));
      for (auto const* values : {&c.out, &c.dtokens, &c.gradients}) {
        bool finite = true;
        for (double v : *values) finite = finite && std::isfinite(v);
        CHECK(finite);
      }
      for (std::int64_t m = 0; m < c.M; ++m) CHECK(c.view(c.out)(4, m) == 0);
    }
  });
}

TEST_CASE("layer/moe_layer: no token has an expert") {
  auto const preset = two_of();
  owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), shape_of(7)}, 7, 8);
  std::uint8_t const live[7] = {};
  c.ids.live = live;
  c.forward();
  CHECK(c.out == std::vector<double>(c.out.size(), 0.0));
  c.backward({.balance = 0.1, .z = 0.1});
  CHECK(c.dtokens == std::vector<double>(c.dtokens.size(), 0.0));
  CHECK(c.gradients == std::vector<double>(c.gradients.size(), 0.0));
  std::fill(c.gradients.begin(), c.gradients.end(), 3.0);
  c.backward({.balance = 0.1, .z = 0.1}, moe::update::add);
  CHECK(c.gradients == std::vector<double>(c.gradients.size(), 3.0));
}

TEST_CASE("layer/moe_layer: gradients where an extent is 1, and where all experts are chosen") {
  moe::layer_shape const shapes[] = {
      {.T = 5, .M = 1, .H = 3, .E = 3}, {.T = 5, .M = 3, .H = 1, .E = 3},
      {.T = 5, .M = 3, .H = 2, .E = 1}, {.T = 1, .M = 3, .H = 2, .E = 3},
      {.T = 5, .M = 3, .H = 2, .E = 2}, {.T = 1, .M = 1, .H = 1, .E = 1}};
  for (moe::layer_shape shape : shapes)
    for (int k : {1, shape.E}) {
      CAPTURE(shape.M);
      CAPTURE(shape.H);
      CAPTURE(shape.E);
      CAPTURE(k);
      shape.bias = shape.z_loss = true;
      moe::moe_layer const layer(moe::tutel_topk({.k = k, .capacity_factor = 0}),
                                 moe::ffn<moe::swiglu>{}, shape);
      owned_layer<double, std::remove_cv_t<decltype(layer)>> c(layer, shape.T, 21);
      auto const result = moe_test::check_gradients(c);
      CHECK(result.flipped == 0);
      CHECK(result.worst < 2e-8);
      CHECK(result.nonzero > 0);
    }
}

TEST_CASE("layer/moe_layer: saved memory serves batches of other sizes, scratch other layers") {
  auto const preset = moe::deepspeed_top2({.capacity_factor = 0.8, .min_capacity = 1});
  using preset_type = std::remove_cv_t<decltype(preset)>;
  using layer = layer_of<preset_type, moe::swiglu>;
  owned_layer<double, layer> c({preset, {}, shape_of(20)}, 20, 8),
      other({preset, {}, shape_of(33)}, 33, 9);
  for (std::int64_t T : {20, 3, 0, 11}) {
    CAPTURE(T);
    owned_layer<double, layer> fresh({preset, {}, shape_of(20)}, T, 30 + static_cast<unsigned>(T));
    c.T = T;
    c.tokens = fresh.tokens;
    c.dout = fresh.dout;
    c.parameters = fresh.parameters;
    c.out.assign(fresh.out.size(), 1e30);
    c.dtokens.assign(fresh.out.size(), 1e30);
    auto const step = [](auto& of, moe::memory scratch, auto const& between) {
      of.losses = of.layer.forward(of.exec, of.weights(), of.view(of.tokens), of.ids,
                                   of.view(of.out), of.saved, scratch);
      between();
      of.layer.backward(of.exec, of.weights(), of.view(of.tokens), of.view(of.dout),
                        {.balance = 0.1}, of.saved, of.view(of.dtokens), of.dweights(),
                        moe::update::assign, scratch);
    };
    // Another layer runs in the same scratch between forward and backward.
    step(c, other.scratch, [&] { step(other, other.scratch, [] {}); });
    step(fresh, fresh.scratch, [] {});
    CHECK(same_bits(c.out, fresh.out));
    CHECK(same_bits(c.dtokens, fresh.dtokens));
    CHECK(same_bits(c.gradients, fresh.gradients));
    CHECK(c.losses.balance == fresh.losses.balance);
  }
}

TEST_CASE("layer/moe_layer: micro batches add up to the batch; shared experts have one gradient") {
  auto const preset = two_of();
  using layer = layer_of<two, moe::swiglu>;
  layer const made(preset, experts_for<moe::swiglu>(preset), shape_of(12));
  owned_layer<double, layer> whole(made, 12, 3), part(made, 5, 3);
  whole.forward();
  whole.backward();
  std::vector<double> const tokens = whole.tokens, dout = whole.dout;
  std::fill(part.gradients.begin(), part.gradients.end(), 0.0);
  for (std::int64_t first : {0, 5, 10}) {
    part.T = std::min<std::int64_t>(5, 12 - first);
    part.tokens.assign(tokens.begin() + first * 8, tokens.begin() + (first + part.T) * 8);
    part.dout.assign(dout.begin() + first * 8, dout.begin() + (first + part.T) * 8);
    part.forward();
    part.backward({}, moe::update::add);
  }
  CHECK(distance(part.gradients, whole.gradients) < 1e-12);

  // Two layers of one pool: routers of their own, the same experts, whose gradients both add to.
  owned_layer<double, layer> a(made, 12, 3), b(made, 12, 50);
  std::copy(a.parameters.begin() + 40, a.parameters.end(), b.parameters.begin() + 40);
  std::vector<double> pool(a.gradients.size(), 0.0), sum(pool);
  for (auto* c : {&a, &b}) {
    c->forward();
    c->backward();
    for (std::size_t i = 40; i < sum.size(); ++i) sum[i] += c->gradients[i];
    moe::layer_weights<double> gradients = c->dweights();
    gradients.experts = made.carve(pool.data()).experts;
    made.backward(c->exec, c->weights(), c->view(c->tokens), c->view(c->dout), {}, c->saved,
                  c->view(c->dtokens), gradients, moe::update::add, c->scratch);
  }
  CHECK(distance(pool, sum) < 1e-12);
}

TEST_CASE("layer/moe_layer: a step of an optimiser is seen by the next forward") {
  auto const preset = two_of();
  layer_of<two, moe::swiglu> const layer(preset, experts_for<moe::swiglu>(preset), shape_of(17));
  owned<double, two, moe::swiglu> c(layer, 17, 3), fresh(layer, 17, 3);
  c.forward();
  c.backward({.balance = 0.1});
  auto const before = c.out;
  for (std::size_t i = 0; i < c.parameters.size(); ++i) c.parameters[i] -= 0.01 * c.gradients[i];
  c.forward();
  fresh.parameters = c.parameters;
  fresh.forward();
  CHECK(same_bits(c.out, fresh.out));
  CHECK(!same_bits(c.out, before));
}

TEST_CASE("layer/moe_layer: for_each_parameter visits every element once") {
  auto const preset = two_of();
  owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), shape_of(2)}, 2, 3);
  std::fill(c.parameters.begin(), c.parameters.end(), 0.0);
  std::fill(c.gradients.begin(), c.gradients.end(), 0.0);
  std::int64_t elements = 0;
  std::string first;
  moe::for_each_parameter(c.weights(), c.dweights(),
                          [&](char const* name, auto value, auto gradient) {
                            if (first.empty()) first = name;
                            elements += value.size();
                            for (std::int64_t i = 0; i < value.size(); ++i) {
                              value[i] += 1;
                              gradient[i] += 2;
                            }
                          });
  CHECK(first == "router");
  CHECK(elements == c.layer.parameter_elements());
  CHECK(c.parameters == std::vector<double>(c.parameters.size(), 1.0));
  CHECK(c.gradients == std::vector<double>(c.gradients.size(), 2.0));
}

namespace {

template <class Case>
struct recording_hooks {
  Case& c;
  std::string order;
  std::vector<double> in, out, result;

  void logits(moe::matrix_view<double> l) {
    order += "l";
    CHECK(l.rows() == c.T);
    CHECK(l.cols() == c.layer.shape().E);
  }
  void routed(moe::basic_routing<double> const& r, moe::routing_table const& table,
              moe::vector_view<double const> weights) {
    order += "r";
    CHECK(r.T == c.T);
    CHECK(table.T == c.T);
    CHECK(weights.size() == c.T * r.K);
    CHECK(std::abs(weights[0] + weights[1] - 1) < 1e-15);
  }
  void rows_in(moe::matrix_view<double const> rows) {
    order += "i";
    in.assign(rows.data(), rows.data() + rows.rows() * rows.cols());
  }
  void rows_out(moe::matrix_view<double const> rows) {
    order += "o";
    out.assign(rows.data(), rows.data() + rows.rows() * rows.cols());
  }
  void output(moe::matrix_view<double const> y) {
    order += "y";
    result.assign(y.data(), y.data() + y.rows() * y.cols());
  }
};

}  // namespace

TEST_CASE("layer/moe_layer: hooks see each stage and change nothing") {
  for (bool before : {false, true}) {
    CAPTURE(before);
    auto const preset = two_of(before);
    layer_of<two, moe::swiglu> const layer(preset, experts_for<moe::swiglu>(preset), shape_of(9));
    owned<double, two, moe::swiglu> plain(layer, 9, 3), c(layer, 9, 3);
    plain.forward();
    plain.backward();
    recording_hooks<decltype(c)> hooks{c, {}, {}, {}, {}};
    c.forward(hooks);
    c.backward();
    CHECK(hooks.order == "lrioy");
    CHECK(same_bits(plain.out, c.out));
    CHECK(same_bits(plain.gradients, c.gradients));
    CHECK(same_bits(hooks.result, c.out));
    // Each row is its token, or its token times the weight, and what the token's expert gives.
    REQUIRE(hooks.in.size() == static_cast<std::size_t>(2 * 9 * c.M));
    for (std::int64_t i = 0; i < 2 * 9; ++i) {
      std::int64_t const row = c.saved.table.row_of[i];
      double const w = before ? c.saved.weights[i] : 1;
      auto const y = slow_expert(c.weights().experts, c.saved.routed.expert[i],
                                 c.tokens.data() + i / 2 * c.M, w, before);
      for (std::int64_t m = 0; m < c.M; ++m) {
        auto const at = static_cast<std::size_t>(row * c.M + m);
        CHECK(hooks.in[at] == w * c.view(c.tokens)(i / 2, m));
        CHECK(std::abs(hooks.out[at] - y[static_cast<std::size_t>(m)]) < 1e-12);
      }
    }
  }
}

TEST_CASE("layer/moe_layer: what a hook does to the logits counts, in backward too") {
  struct hide_expert_1 {
    void logits(moe::matrix_view<double> l) const {
      for (std::int64_t t = 0; t < l.rows(); ++t) {
        l(t, 1) = -std::numeric_limits<double>::infinity();
        l(t, 2) += 0.5;
      }
    }
  };
  auto const preset = two_of();
  owned<double, two, moe::swiglu> c({preset, experts_for<moe::swiglu>(preset), small}, small.T, 3);
  c.forward();
  bool chosen = false;
  for (int i = 0; i < 2 * small.T; ++i) chosen = chosen || c.saved.routed.expert[i] == 1;
  CHECK(chosen);
  c.forward(hide_expert_1{});
  for (int i = 0; i < 2 * small.T; ++i) CHECK(c.saved.routed.expert[i] != 1);
  c.backward({.balance = 0.3, .z = 0.2});
  auto const total = [&] {
    c.forward(hide_expert_1{});
    double sum = 0.3 * c.losses.balance + 0.2 * c.losses.z;
    for (std::size_t i = 0; i < c.out.size(); ++i) sum += c.out[i] * c.dout[i];
    return sum;
  };
  for (std::size_t i = 0; i < 12; ++i) {  // the router
    CAPTURE(i);
    double const middle = c.parameters[i];
    c.parameters[i] = middle + 1e-5;
    double const above = total();
    c.parameters[i] = middle - 1e-5;
    double const numeric = (above - total()) / 2e-5;
    c.parameters[i] = middle;
    CHECK(std::abs(c.gradients[i] - numeric) < 1e-8);
    CHECK((c.gradients[i] == 0) == (i % 4 == 1));
  }
}

TEST_CASE("layer/moe_layer: bad shapes of a layer are refused") {
  auto const make = [&](moe::layer_shape const& shape, bool before = false) {
    return refusal([&] { layer_of<two, moe::relu>(two_of(before), moe::ffn<moe::relu>{}, shape); });
  };
  says(make({.T = -1, .M = 1, .H = 1, .E = 2}),
       "moe_layer: T >= 0, M >= 1, H >= 1, E >= 1; got "
       "T = -1, M = 1, H = 1, E = 2");
  says(make({.T = 1, .M = 0, .H = 1, .E = 2}), "M = 0");
  says(make({.T = 1, .M = 1, .H = 0, .E = 2}), "H = 0");
  says(make({.T = 1, .M = 1, .H = 1, .E = 0}), "E = 0");
  says(make({.T = 1, .M = 1, .H = 1, .E = 1}), "moe_layer: 1 <= K <= E; got K = 2, E = 1");
  says(make({.T = 1, .M = 1, .H = 1, .E = 2}, true),
       "moe_layer: preset and experts agree on where weights apply; got preset before experts = 1, "
       "experts.weights_before = 0");
  says(make({.T = 1, .M = 1, .H = 1, .E = 2}), "nothing was thrown");
}

TEST_CASE("layer/moe_layer: bad arguments are refused") {
  auto const preset = two_of();
  moe::layer_shape shape = shape_of(5);
  shape.H = 40;
  shape.z_loss = false;
  layer_of<two, moe::swiglu> const layer(preset, experts_for<moe::swiglu>(preset), shape);
  owned<double, two, moe::swiglu> c(layer, 5, 3);
  auto const forward = [&](moe::matrix_view<double> x, moe::matrix_view<double> out,
                           moe::memory scratch) {
    return refusal([&] { layer.forward(c.exec, c.weights(), x, c.ids, out, c.saved, scratch); });
  };
  auto const backward = [&] { return refusal([&] { c.backward(); }); };
  auto const x = c.view(c.tokens), y = c.view(c.out);
  std::vector<double> larger(6 * 8);
  moe::matrix_view<double> const six(larger.data(), 6, 8);

  says(backward(), "moe_layer::backward: saved was filled by a forward of the same T");
  says(forward(six, six, c.scratch),
       "moe_layer: T is within the bound of the layer, and saved was "
       "made for this layer; got T = 6, most = 5, saved's most = 5");
  says(forward({x.data(), 5, 7}, y, c.scratch), "tokens.cols = 7");
  says(forward(x, {y.data(), 4, 8}, c.scratch), "other rows = 4");
  says(forward(x, {y.data(), 5, 7}, c.scratch), "other cols = 7");
  says(forward(x, x, c.scratch), "moe_layer: the output does not overlap tokens");
  says(forward(x, y, {c.scratch.data(), 100}), "scratch");
  says(forward(x, y, c.scratch), "nothing was thrown");
  says(refusal([&] { c.backward({.z = 0.1}); }),
       "moe_layer::backward: a z coefficient needs layer_shape::z_loss; got z = 0.1");
  says(refusal([&] {
         layer.backward(c.exec, c.weights(), x, y, {}, c.saved, c.view(c.dtokens), c.dweights(),
                        moe::update::assign, {c.scratch.data(), 100});
       }),
       "moe_layer: scratch holds scratch_bytes<V>(exec)");
  says(refusal([&] {
         auto bad = c.dweights();
         bad.router = {bad.router.data(), 8, 4};
         layer.backward(c.exec, c.weights(), x, y, {}, c.saved, c.view(c.dtokens), bad,
                        moe::update::assign, c.scratch);
       }),
       "moe_layer::backward: the router's gradient is [M,E]; got rows = 8, cols = 4");
  says(refusal([&] {
         layer.backward(c.exec, c.weights(), x, {y.data(), 4, 8}, {}, c.saved, c.view(c.dtokens),
                        c.dweights(), moe::update::assign, c.scratch);
       }),
       "moe_layer::backward: dout is [T,M]; got rows = 4");
  says(
      refusal([&] { layer.carve_saved<double>({c.saved_bytes.data(), c.saved_bytes.size() / 2}); }),
      "moe_layer::carve_saved: memory holds saved_bytes()");
  // Experts of another number or width, larger ones, and gradients of another shape.
  auto const with_experts = [&](moe::ffn_shape const& of) {
    std::vector<double> values(static_cast<std::size_t>(moe::ffn_elements(of, true, true)));
    auto weights = c.weights();
    weights.experts = moe::carve_ffn(values.data(), of, true, true);
    return refusal([&] { layer.forward(c.exec, weights, x, c.ids, y, c.saved, c.scratch); });
  };
  says(with_experts({4, 8, 40}),
       "ffn: the table has P experts, tokens are [T,M]; got table.P = 5, P = 4");
  says(with_experts({5, 7, 40}), "tokens.cols = 8, M = 7");
  says(with_experts({5, 8, 400}), "ffn: saved >= saved_bytes");
  says(refusal([&] {
         auto weights = c.weights();
         weights.experts.down = weights.experts.up;
         layer.forward(c.exec, weights, x, c.ids, y, c.saved, c.scratch);
       }),
       "ffn: down is [P,H,M]");
  says(refusal([&] {
         auto weights = c.weights();
         weights.router = {weights.router.data(), 8, 4};
         layer.forward(c.exec, weights, x, c.ids, y, c.saved, c.scratch);
       }),
       "router.rows = 8, router.cols = 4");
  c.forward();
  says(refusal([&] {
         auto bad = c.dweights();
         bad.experts = bad.experts.expert(0);
         layer.backward(c.exec, c.weights(), x, y, {}, c.saved, c.view(c.dtokens), bad,
                        moe::update::assign, c.scratch);
       }),
       "ffn: gradients have the parts and shape of the weights");
  says(backward(), "nothing was thrown");
  c.T = 3;
  says(backward(), "filled = 1, saved T = 5, T = 3");

  // Saved of layers of other shapes; of the same T, too.
  auto const other = [&](moe::layer_shape const& of) {
    owned<double, two, moe::swiglu> o({preset, experts_for<moe::swiglu>(preset), of}, of.T, 3);
    return refusal([&] { layer.forward(c.exec, c.weights(), x, c.ids, y, o.saved, c.scratch); });
  };
  moe::layer_shape more = shape;
  more.T = 9;
  says(other(more), "saved was made for this layer");
  more = shape;
  more.E = 4;
  says(other(more), "saved was made for this layer");
  more = shape;
  more.H = 3;
  says(other(more), "saved");
}
