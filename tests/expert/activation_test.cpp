// Activations: values against the definition, derivatives by differences, float against double.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <doctest/doctest.h>
#include <initializer_list>
#include <limits>

#include <moe/expert/activation.hpp>

namespace {

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

template <class A, class Definition>
void check_one(A const& act, Definition const& want) {
  for (double x = -30; x <= 30; x += 0.037) {
    CAPTURE(x);
    CHECK(std::fabs(act(x) - want(x)) < 1e-14 * (1 + std::fabs(x)));
    auto const single = static_cast<float>(x);
    CHECK(std::fabs(act(single) - want(double(single))) < 2.5e-7 * (0.3 + std::fabs(want(x))));
    double const h = 1e-6, slope = (want(x + h) - want(x - h)) / (2 * h);
    CHECK(std::fabs(act.derivative(x) - slope) < 2e-9 * (1 + std::fabs(x)));
    CHECK(std::fabs(act.derivative(single) - act.derivative(double(single))) < 1e-6);
  }
  float const nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(std::isnan(act(nan)));
  CHECK(act(0.0f) == 0.0f);
}

template <class A, class Definition>
void check_gated(A const& act, Definition const& want) {
  for (double g = -9.03; g <= 9; g += 0.31)
    for (double u = -9.01; u <= 9; u += 0.43) {
      CAPTURE(g);
      CAPTURE(u);
      double const y = want(g, u), h = 1e-6;
      CHECK(std::fabs(act(g, u) - y) < 1e-13 * (1 + std::fabs(y)));
      CHECK(std::fabs(act(float(g), float(u)) - want(double(float(g)), double(float(u)))) <
            1e-6 * (1 + std::fabs(y)));
      auto const d = act.derivative(g, u);
      CHECK(std::fabs(d.gate - (want(g + h, u) - want(g - h, u)) / (2 * h)) < 1e-7);
      CHECK(std::fabs(d.up - (want(g, u + h) - want(g, u - h)) / (2 * h)) < 1e-7);
    }
}

double exact_gelu(double x) {
  return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
}
double exact_gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}

}  // namespace

TEST_CASE("expert/activation: values and derivatives of one argument") {
  check_one(moe::silu{}, [](double x) { return x * sigmoid(x); });
  check_one(moe::gelu{}, exact_gelu);
  check_one(moe::gelu_tanh{}, exact_gelu_tanh);
  check_one(moe::relu{}, [](double x) { return x > 0 ? x : 0; });
  CHECK(moe::relu{}.derivative(0.0) == 0.0);
}

TEST_CASE("expert/activation: gated linear units") {
  check_gated(moe::swiglu{}, [](double g, double u) { return g * sigmoid(g) * u; });
  check_gated(moe::geglu{}, [](double g, double u) { return exact_gelu(g) * u; });
  check_gated(moe::geglu_tanh{}, [](double g, double u) { return exact_gelu_tanh(g) * u; });
}

TEST_CASE("expert/activation: gpt-oss clamps the gate from above and up on both sides") {
  auto const want = [](double g, double u) {
    g = std::fmin(g, 7);
    u = std::fmax(-7, std::fmin(u, 7));
    return (u + 1) * g * sigmoid(double(1.702f) * g);
  };
  check_gated(moe::clamped_swiglu{}, want);
  CHECK(moe::clamped_swiglu{}(50.0, 50.0) == moe::clamped_swiglu{}(7.0, 7.0));
  CHECK(moe::clamped_swiglu{}(2.0, -50.0) == moe::clamped_swiglu{}(2.0, -7.0));
  CHECK(moe::clamped_swiglu{}(-9.0, 2.0) != moe::clamped_swiglu{}(-7.0, 2.0));  // not from below
  CHECK(moe::clamped_swiglu{.limit = 1}(2.0, 3.0) == moe::clamped_swiglu{}(1.0, 1.0));
}

TEST_CASE("expert/activation: large arguments in float") {
  for (float x : {40.0f, 1e4f, 3e38f}) {
    CAPTURE(x);
    CHECK(moe::silu{}(x) == x);
    CHECK(moe::gelu{}(x) == x);
    CHECK(std::fabs(moe::silu{}(-x)) < 1e-15f);
    CHECK(std::fabs(moe::gelu{}(-40.0f)) < 1e-13f);
    CHECK(moe::silu{}.derivative(x) == doctest::Approx(1));
    CHECK(moe::gelu{}.derivative(x) == doctest::Approx(1));
  }
}
