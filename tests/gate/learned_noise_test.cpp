// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <support/gradient.hpp>
#include <support/laws.hpp>
#include <support/preset_run.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/learned_noise.hpp>
#include <moe/gate/relu_normalised.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using moe_test::given_noise;
using moe_test::law_score;
using moe_test::refusal;
using moe_test::says;

/// A gate's weights in double, times 1, 2, ..., added up; and the gradient of that.
template <class Gate>
struct run {
  std::int64_t T;
  int E;
  moe::cpu exec{};
  moe::batch tokens{};

  double objective(Gate const& gate, std::vector<double> const& logits) const {
    moe::basic_routing_buffer<double> out(T, gate.k(), E);
    route(gate, logits, out);
    double sum = 0;
    for (std::int64_t i = 0; i < T * gate.k(); ++i) sum += double(i + 1) * out.weight[i];
    return sum;
  }
  std::vector<double> gradient(Gate const& gate, std::vector<double> const& logits) const {
    moe::basic_routing_buffer<double> out(T, gate.k(), E);
    route(gate, logits, out);
    std::vector<double> dweights, dlogits(logits.size());
    for (std::int64_t i = 0; i < T * gate.k(); ++i) dweights.push_back(double(i + 1));
    moe::buffer const scratch(moe::route_scratch<Gate, double>(exec, E));
    moe::route_backward(exec, gate, moe::matrix_view(logits, T, E), out,
                        moe::matrix_view(dweights, T, gate.k()), {}, scratch,
                        moe::matrix_view(dlogits, T, E));
    return dlogits;
  }

 private:
  void route(Gate const& gate, std::vector<double> const& logits,
             moe::basic_routing<double>& out) const {
    moe::buffer const scratch(moe::route_scratch<Gate, double>(exec, E));
    moe::route(exec, gate, moe::matrix_view(logits, T, E), tokens, scratch, out);
  }
};

}  // namespace

TEST_CASE("gate/learned_noise: keeps the laws of score policies") {
  moe_test::score_policy_laws(moe::learned_noise<moe::softmax>{});
  // The law's token has row 3; the rows it makes of its own have 5 logits.
  auto const width = moe_test::normals<float>(4 * 5, 3);
  moe_test::law_options options{.sizes = {5}};
  options.token.training = true;
  moe_test::score_policy_laws(moe::learned_noise<moe::softmax>{.width = {width.data(), 4, 5}},
                              options);
}

TEST_CASE("gate/learned_noise: a worked example") {
  // softplus(0) = log 2, softplus(log 3) = log 4.
  std::vector<double> const width{9, 9, 9, 0, std::log(3.0), 0};
  std::vector<float> const noise{0, 0, 0, 1, -2, 5};
  moe::learned_noise<moe::identity, double, given_noise> p{.width = {width.data(), 2, 3},
                                                           .noise = {noise.data(), 3}};
  std::vector<double> const logits{1, 2, moe::no_score<double>};
  auto const s = law_score(p, logits, {.row = 1, .training = true});
  CHECK(s[0] == doctest::Approx(1 + std::log(2.0)));
  CHECK(s[1] == doctest::Approx(2 - 2 * std::log(4.0)));
  CHECK(s[2] == moe::no_score<double>);
  CHECK(law_score(p, logits, {.row = 1}) == logits);  // not in evaluation
  p.least = 0.5f;
  p.when = moe::random_when::always;
  CHECK(law_score(p, logits, {.row = 1})[1] == doctest::Approx(1 - 2 * std::log(4.0)));
  p.when = moe::random_when::never;
  CHECK(law_score(p, logits, {.row = 1, .training = true}) == logits);
  p.when = moe::random_when::always;
  says(refusal([&] { law_score(p, logits, {.row = 2}); }),
       "learned_noise: width is [T,E]; got E = 3");
  says(refusal([&] { law_score(p, std::vector<double>{1, 2}, {.row = 1}); }), "got E = 2");
}

TEST_CASE("gate/learned_noise: noisy top-k, with the gradient of logits and of widths") {
  constexpr int T = 5, E = 7;
  using gate =
      moe::gate<moe::learned_noise<moe::identity, double>, moe::top_k<3>, moe::softmax_of_selected>;
  auto logits = moe_test::normals(T * E, 1);
  logits[3] = moe::no_score<double>;
  auto const width = moe_test::normals(T * E, 2);
  run<gate> const r{T, E, {}, {.first_id = 40, .seed = 3, .step = 9, .training = true}};
  auto const with = [&](std::vector<double> const& w) {
    return gate{.score = {.width = {w.data(), T, E}}};
  };
  auto const dlogits = r.gradient(with(width), logits);
  moe_test::check_gradient([&](auto const& l) { return r.objective(with(width), l); }, logits,
                           dlogits);
  std::vector<double> dwidth(width.size(), 99);
  moe::learned_noise_backward(r.exec, with(width).score, moe::matrix_view(dlogits, T, E), r.tokens,
                              moe::matrix_view(dwidth, T, E));
  moe_test::check_gradient([&](auto const& w) { return r.objective(with(w), logits); }, width,
                           dwidth);
  double most = 0;
  for (double const d : dwidth) most = std::max(most, std::abs(d));
  CHECK(most > 0.1);
  // Without training there is no noise and no gradient of it.
  moe::learned_noise_backward(r.exec, with(width).score, moe::matrix_view(dlogits, T, E), {},
                              moe::matrix_view(dwidth, T, E));
  CHECK(dwidth == std::vector<double>(width.size(), 0.0));
  says(refusal([&] {
         moe::learned_noise_backward(r.exec, with(width).score, moe::matrix_view(dlogits, T, E), {},
                                     moe::matrix_view(dwidth, E, T));
       }),
       "learned_noise_backward: width, dlogits and dwidth are [T,E]");
}

TEST_CASE("gate/relu_normalised: a worked example") {
  // ||(3, -4)|| = 5; the expert that is no candidate adds nothing to the norm.
  moe::relu_normalised<> const p{.scale = 10};
  float const none = moe::no_score<float>;
  CHECK(law_score(p, std::vector<float>{3, none, -4}, {}) == std::vector<float>{6, none, 0});
  CHECK(law_score(p, std::vector<float>{0, 0}, {}) == std::vector<float>{0, 0});
  CHECK(law_score(p, std::vector<float>{none, none}, {}) == std::vector<float>{none, none});
  // Logits that are as low as they come are no mask: they would swallow the norm.
  CHECK(law_score(p, std::vector<float>{3, -3e38f}, {}) == std::vector<float>{0, 0});
}

TEST_CASE("gate/relu_normalised: float agrees with double, candidates are kept") {
  for (int const E : moe_test::law_sizes) {
    auto const logits = moe_test::law_scores<float>(E, 3, 0.3);
    auto const s = law_score(moe::relu_normalised<>{2.5f}, logits, {});
    auto const exact =
        law_score(moe::relu_normalised<double>{2.5f}, moe_test::law_cast<double>(logits), {});
    for (std::size_t e = 0; e < s.size(); ++e) {
      CHECK(moe::is_candidate(s[e]) == moe::is_candidate(logits[e]));
      if (moe::is_candidate(s[e])) CHECK(moe_test::law_close(double(s[e]), exact[e], 1e-6));
    }
  }
}

TEST_CASE("gate/relu_normalised: gradients of the logits and of the scale") {
  constexpr int T = 4, E = 9;
  using gate = moe::gate<moe::relu_normalised<double>, moe::top_k<3>, moe::as_scored>;
  auto logits = moe_test::normals(T * E, 5);
  logits[2] = logits[30] = moe::no_score<double>;
  run<gate> const r{T, E};
  auto const with = [&](std::vector<double> const& l, float scale = 1.5f) {
    return gate{.score = {scale, {l.data(), T, E}}};
  };
  moe_test::check_gradient([&](auto const& l) { return r.objective(with(l), l); }, logits,
                           r.gradient(with(logits), logits));
  double const objective = r.objective(with(logits), logits);
  double const h = 0x1p-10;
  double const dscale = (r.objective(with(logits, 1.5f + float(h)), logits) -
                         r.objective(with(logits, 1.5f - float(h)), logits)) /
                        (2 * h);
  CHECK(dscale == doctest::Approx(objective / 1.5).epsilon(1e-9));
  // All 0: the norm is its floor.
  CHECK(r.gradient(with(std::vector<double>(T * E)), std::vector<double>(T * E)) ==
        std::vector<double>(T * E, 0.0));
  says(refusal([&] { r.gradient(gate{}, logits); }),
       "relu_normalised::backward: logits are [T,E]; got E = 9");
}
