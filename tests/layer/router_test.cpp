// compute_logits: values by hand, gradients with jitter by differences, tokens that are no numbers.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <doctest/doctest.h>
#include <limits>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/layer/router.hpp>

#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"

namespace {

constexpr int T = 5, M = 3, E = 4;

struct problem {
  std::vector<double> x = moe_test::normals(T * M, 1), w = moe_test::normals(M * E, 2),
                      dlogits = moe_test::normals(T * E, 3), logits = std::vector<double>(T * E),
                      dx = std::vector<double>(T * M, 2.0), dw = std::vector<double>(M * E, 7.0);
  float eps = 0.3f;
  moe::batch ids{.seed = 4, .step = 5, .training = true};
  moe::buffer scratch{moe::compute_logits_scratch<double>(moe::cpu{}, T, M)};

  void forward() {
    moe::compute_logits(moe::cpu{}, {x.data(), T, M}, {w.data(), M, E}, eps, ids,
                        moe::matrix_view<double>(logits.data(), T, E), scratch);
  }
  void backward(moe::update how, moe::memory room) {
    moe::compute_logits_backward(moe::cpu{}, {x.data(), T, M}, {w.data(), M, E}, eps, ids,
                                 {logits.data(), T, E}, {dlogits.data(), T, E},
                                 moe::matrix_view<double>(dx.data(), T, M),
                                 moe::matrix_view<double>(dw.data(), M, E), how, room);
  }
  double loss() {
    forward();
    double sum = 0;
    for (std::size_t i = 0; i < logits.size(); ++i) sum += logits[i] * dlogits[i];
    return sum;
  }
};

}  // namespace

TEST_CASE("layer/router: logits are products, jittered in training alone") {
  problem p;
  for (bool jitters : {false, true}) {
    p.ids.training = jitters;
    p.forward();
    double most = 0;
    for (std::size_t t = 0; t < T; ++t)
      for (std::size_t e = 0; e < E; ++e) {
        double want = 0;
        for (std::size_t m = 0; m < M; ++m) want += p.x[t * M + m] * p.w[m * E + e];
        most = moe_test::worse(most, std::abs(p.logits[t * E + e] - want));
      }
    CHECK((most > 1e-3) == jitters);
    CHECK((most < 1e-14) == !jitters);
  }
}

TEST_CASE("layer/router: gradients, with jitter and without; the router's add up on demand") {
  for (bool jitters : {false, true})
    for (auto const how : {moe::update::assign, moe::update::add}) {
      CAPTURE(jitters);
      problem p;
      p.ids.training = jitters;
      p.forward();
      p.backward(how, p.scratch);
      auto const check = [&](std::vector<double>& values, std::vector<double> const& gradient,
                             double before) {
        for (std::size_t i = 0; i < values.size(); ++i) {
          double const middle = values[i];
          values[i] = middle + 1e-5;
          double const above = p.loss();
          values[i] = middle - 1e-5;
          double const slope = (above - p.loss()) / 2e-5;
          values[i] = middle;
          CHECK(gradient[i] == doctest::Approx(before + slope).epsilon(1e-8));
        }
      };
      check(p.x, p.dx, 2);
      check(p.w, p.dw, how == moe::update::add ? 7 : 0);
    }
}

TEST_CASE("layer/router: a token that is no number adds nothing to the router's gradient") {
  for (bool jitters : {false, true}) {
    problem p, without;
    p.ids.training = without.ids.training = jitters;
    p.x[2 * M + 1] = std::numeric_limits<double>::quiet_NaN();
    for (std::size_t m = 0; m < M; ++m) without.x[2 * M + m] = 0;
    for (auto* each : {&p, &without}) {
      for (std::size_t e = 0; e < E; ++e) each->dlogits[2 * E + e] = 0;
      each->forward();
      each->backward(moe::update::assign, each->scratch);
    }
    CHECK(std::isnan(p.logits[2 * E]));
    CHECK(p.dw == without.dw);
    CHECK(p.dx == without.dx);
  }
}

TEST_CASE("layer/router: too little scratch is refused") {
  problem p;
  p.forward();
  moe_test::says(moe_test::refusal([&] { p.backward(moe::update::add, {p.scratch.data(), 64}); }),
                 "compute_logits: scratch >= compute_logits_scratch");
}
