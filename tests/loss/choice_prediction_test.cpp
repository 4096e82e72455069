// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/above.hpp>
#include <moe/gate/expert_choice.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/loss/choice_prediction.hpp>

namespace {

constexpr double none = moe::no_score<double>;

/// What experts choose by these scores.
struct choice {
  moe::varying_routing_buffer<double> routed;

  choice(std::vector<double> const& scores, int E, double capacity_factor,
         moe::batch const& tokens = {})
      : routed(static_cast<std::int64_t>(scores.size()) / E, E,
               static_cast<std::int64_t>(scores.size())) {
    moe::cpu const exec;
    moe::expert_choice<moe::identity> const gate{.capacity_factor = capacity_factor};
    moe::buffer const scratch(moe::route_scratch<double>(exec, gate, routed.T, E));
    moe::route(exec, gate, moe::matrix_view(scores, routed.T, E), tokens, scratch, routed);
  }
};

double loss(std::vector<double> const& logits, moe::basic_routing<double> const& chosen,
            moe::cpu const& exec = {}) {
  moe::buffer const scratch(moe::choice_prediction_scratch(chosen.T));
  return moe::choice_prediction(exec, moe::matrix_view(logits, chosen.T, chosen.E), chosen,
                                scratch);
}

std::vector<double> gradient(std::vector<double> const& logits,
                             moe::basic_routing<double> const& chosen, double dloss,
                             moe::cpu const& exec = {}) {
  moe::buffer const scratch(moe::choice_prediction_scratch(chosen.T));
  std::vector<double> d(logits.size());
  moe::choice_prediction_backward(exec, moe::matrix_view(logits, chosen.T, chosen.E), chosen, dloss,
                                  scratch, moe::matrix_view(d, chosen.T, chosen.E));
  return d;
}

}  // namespace

TEST_CASE("loss/choice_prediction: by hand") {
  choice const c({5, 1, 3, 2}, 1, 0.5);  // tokens 0 and 2 are taken
  CHECK(loss({0, 0, 0, 0}, c.routed) == doctest::Approx(std::log(2.0)).epsilon(1e-12));
  double const l = std::log(3.0);  // sigmoid 3/4
  CHECK(loss({l, -l, l, l}, c.routed) ==
        doctest::Approx((3 * std::log(4 / 3.0) + std::log(4.0)) / 4).epsilon(1e-12));
  CHECK(loss({900, -900, 900, 900}, c.routed) == doctest::Approx(900.0 / 4).epsilon(1e-12));
  auto const d = gradient({l, -l, l, l}, c.routed, 4);
  double const expected[] = {-0.25, 0.25, -0.25, 0.75};
  for (std::size_t i = 0; i < 4; ++i) CHECK(d[i] == doctest::Approx(expected[i]).epsilon(1e-12));
}

TEST_CASE("loss/choice_prediction: gradients agree with central differences") {
  std::int64_t const T = 11;
  int const E = 4;
  std::vector<std::uint8_t> live(static_cast<std::size_t>(T), 1);
  live[3] = 0;
  choice const c(moe_test::normals(T * E, 1), E, 1.5, {.live = live.data()});
  auto logits = moe_test::normals(T * E, 2);
  logits[1] = logits[20] = logits[21] = logits[22] = logits[23] = none;
  auto const d = gradient(logits, c.routed, 0.7);
  moe_test::check_gradient([&](std::vector<double> const& l) { return 0.7 * loss(l, c.routed); },
                           logits, d);
  for (std::size_t i = 12; i < 16; ++i) CHECK(d[i] == 0);
  logits[30] = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isfinite(loss(logits, c.routed)));
}

TEST_CASE("loss/choice_prediction: a trained predictor decides causally as the batch did") {
  // The router sees x w; the predictor, a line of its own, learns when that is among the best half.
  std::int64_t const T = 400;
  auto const r = moe_test::normals(T, 3, 0.8, 1.5);
  choice const c(r, 1, 0.5);
  double slope = 0, offset = 0;
  std::vector<double> logits(r.size());
  for (int step = 0; step < 3000; ++step) {
    for (std::size_t t = 0; t < r.size(); ++t) logits[t] = slope * r[t] + offset;
    auto const d = gradient(logits, c.routed, 1);
    for (std::size_t t = 0; t < r.size(); ++t) {
      slope -= 5 * d[t] * r[t];
      offset -= 5 * d[t];
    }
  }
  moe::cpu const exec;
  using gate_type = moe::gate<moe::identity, moe::above<>, moe::as_scored>;
  moe::basic_routing_buffer<double> alone(T, 1, 1);
  moe::buffer const scratch(moe::route_scratch<gate_type, double>(exec, 1));
  moe::route(exec, gate_type{}, moe::matrix_view(logits, T, 1), {}, scratch, alone);
  int agree = 0;
  for (std::int64_t t = 0; t < T; ++t)
    agree += (alone.expert[t] == 0) == (c.routed.first_pair(t) < c.routed.first_pair(t + 1));
  CHECK(agree > 390);
}

TEST_CASE("loss/choice_prediction: threads change nothing; no tokens") {
  std::int64_t const T = 1500;
  choice const c(moe_test::normals(T * 3, 4), 3, 1);
  auto const logits = moe_test::normals(T * 3, 5);
  for (int threads : {2, 5}) {
    moe::thread_team team(threads);
    CHECK(loss(logits, c.routed, team) == loss(logits, c.routed));
    CHECK(gradient(logits, c.routed, 2, team) == gradient(logits, c.routed, 2));
  }
  choice const nothing({}, 3, 1);
  CHECK(loss({}, nothing.routed) == 0);
  CHECK(gradient({}, nothing.routed, 1).empty());
}

TEST_CASE("loss/choice_prediction: bad input is refused") {
  choice const c({5, 1, 3, 2}, 1, 0.5);
  std::vector<double> const logits(8);
  std::vector<double> d(8);
  moe::buffer const scratch(moe::choice_prediction_scratch(4));
  moe::cpu const exec;
  using moe_test::refusal;
  using moe_test::says;
  says(refusal([&] {
         moe::choice_prediction(exec, moe::matrix_view(logits, 3, 1), c.routed, scratch);
       }),
       "choice_prediction: logits are [T,E] of the routing, ld >= E; got rows = 3");
  says(refusal([&] {
         moe::choice_prediction(exec, moe::matrix_view(logits, 4, 1), c.routed,
                                {scratch.data(), 8});
       }),
       "scratch >= choice_prediction_scratch(T)");
  says(refusal([&] {
         moe::choice_prediction_backward(exec, moe::matrix_view(logits, 4, 1), c.routed, 1, scratch,
                                         moe::matrix_view(d, 4, 2));
       }),
       "dlogits is [T,E]");
}
