// SPDX-License-Identifier: MIT
#include <cmath>
#include <doctest/doctest.h>
#include <limits>
#include <support/laws.hpp>
#include <vector>

#include <moe/gate/score.hpp>

using moe_test::law_score;
using moe_test::law_score_backward;

TEST_CASE(
    "gate/score: softmax, sigmoid, identity and sqrt_softplus keep the laws of score policies") {
  moe_test::score_policy_laws(moe::softmax{});
  moe_test::score_policy_laws(moe::sigmoid{});
  moe_test::score_policy_laws(moe::identity{});
  moe_test::score_policy_laws(moe::sqrt_softplus{});
}

TEST_CASE("gate/softmax: a worked example") {
  auto const s =
      law_score(moe::softmax{}, std::vector<double>{0, std::log(2.0), std::log(5.0)}, {});
  CHECK(s[0] == doctest::Approx(0.125).epsilon(1e-15));
  CHECK(s[1] == doctest::Approx(0.25).epsilon(1e-15));
  CHECK(s[2] == doctest::Approx(0.625).epsilon(1e-15));
  // dl = s (g - sum s g), with g = {1, 0, 0}.
  auto const d = law_score_backward(moe::softmax{}, s, std::vector<double>{1, 0, 0}, {});
  CHECK(d[0] == doctest::Approx(0.125 * 0.875));
  CHECK(d[1] == doctest::Approx(-0.25 * 0.125));
  CHECK(d[2] == doctest::Approx(-0.625 * 0.125));
}

TEST_CASE("gate/softmax: experts that are no candidates stay so and take no share") {
  float const none = moe::no_score<float>;
  auto const s = law_score(moe::softmax{}, std::vector<float>{none, 1, none, 1}, {});
  CHECK(s == std::vector<float>{none, 0.5f, none, 0.5f});
  auto const nobody = law_score(moe::softmax{}, std::vector<float>{none, none}, {});
  CHECK(nobody == std::vector<float>{none, none});
  auto const d = law_score_backward(moe::softmax{}, s, std::vector<float>{9, 1, 9, 3}, {});
  CHECK(d == std::vector<float>{0, -0.5f, 0, 0.5f});
}

TEST_CASE("gate/softmax: logits of any size give probabilities") {
  auto const s = law_score(moe::softmax{}, std::vector<float>{3e38f, -3e38f, 3e38f}, {});
  CHECK(s == std::vector<float>{0.5f, 0.0f, 0.5f});
}

TEST_CASE("gate/sigmoid: a worked example") {
  auto const s = law_score(moe::sigmoid{}, std::vector<double>{0, std::log(3.0), -1000, 1000}, {});
  CHECK(s[0] == 0.5);
  CHECK(s[1] == doctest::Approx(0.75));
  CHECK(s[2] == 0);
  CHECK(s[3] == 1);
  auto const d = law_score_backward(moe::sigmoid{}, s, std::vector<double>{4, 16, 1, 1}, {});
  CHECK(d[0] == 1);
  CHECK(d[1] == doctest::Approx(3));
  CHECK(d[2] == 0);
  CHECK(d[3] == 0);
}

TEST_CASE("gate/sqrt_softplus: a worked example") {
  // log(1 + e^l) is log 2, log 4, 0 and l.
  auto const s =
      law_score(moe::sqrt_softplus{}, std::vector<double>{0, std::log(3.0), -1000, 1e4}, {});
  CHECK(s[0] == doctest::Approx(std::sqrt(std::log(2.0))).epsilon(1e-15));
  CHECK(s[1] == doctest::Approx(std::sqrt(std::log(4.0))).epsilon(1e-15));
  CHECK(s[2] == 0);
  CHECK(s[3] == 100);
  // ds = sigmoid(l) / (2 s).
  auto const d = law_score_backward(moe::sqrt_softplus{}, s, std::vector<double>{1, 1, 1, 1}, {});
  CHECK(d[0] == doctest::Approx(0.25 / s[0]));
  CHECK(d[1] == doctest::Approx(0.375 / s[1]));
  CHECK(d[2] == 0);
  CHECK(d[3] == doctest::Approx(0.005));
}
