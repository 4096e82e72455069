#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <vector>

#include <moe/core/numeric.hpp>

#include "support/worse.hpp"

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float not_a_number = std::numeric_limits<float>::quiet_NaN();

// Distance from e^x in units of the last place of a float.
double error_of_exp(float x) {
  double const exact = std::exp(static_cast<double>(x));
  int exponent = 0;
  std::frexp(exact, &exponent);
  return std::abs(static_cast<double>(moe::exp(x)) - exact) / std::ldexp(1.0, exponent - 24);
}

// Out of line, so that the tests below see what a user's loop is compiled to.
[[gnu::noinline]] void exp_all(float const* x, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = moe::exp(x[i]);
}

}  // namespace

TEST_CASE("core/numeric: exp is within 1.1 units in the last place") {
  double worst = 0;
  for (std::uint32_t bits = 0; bits < 0x42b16667u; bits += 499) {
    float const x = __builtin_bit_cast(float, bits);
    if (x <= 88.7f) worst = moe_test::worse(worst, error_of_exp(x));
    if (x <= 87.3f) worst = moe_test::worse(worst, error_of_exp(-x));
  }
  worst = moe_test::worst_of({worst, error_of_exp(88.7f), error_of_exp(-87.3f)});
  CHECK(worst < 1.1);
  CHECK(worst > 0.5);  // else the measure is wrong
}

TEST_CASE("core/numeric: exp at the edges") {
  CHECK(moe::exp(0.0f) == 1.0f);
  CHECK(moe::exp(-0.0f) == 1.0f);
  CHECK(moe::exp(-87.3f) > std::numeric_limits<float>::min());
  CHECK(moe::exp(std::nextafter(-87.3f, -100.0f)) == 0.0f);
  CHECK(std::isfinite(moe::exp(88.7f)));
  CHECK(moe::exp(std::nextafter(88.7f, 100.0f)) == infinity);
  CHECK(moe::exp(infinity) == infinity);
  CHECK(moe::exp(-infinity) == 0.0f);
  CHECK(moe::exp(std::numeric_limits<float>::max()) == infinity);
  CHECK(moe::exp(std::numeric_limits<float>::lowest()) == 0.0f);
  CHECK(std::isnan(moe::exp(not_a_number)));
  CHECK(std::isnan(moe::exp(-not_a_number)));
  CHECK(std::isnan(moe::exp(__builtin_bit_cast(float, 0x7f800001u))));
  CHECK(moe::exp(1.0) == std::exp(1.0));
  CHECK(std::isnan(moe::exp(std::numeric_limits<double>::quiet_NaN())));
}

TEST_CASE("core/numeric: exp rises, and gives the same in a loop as alone") {
  std::vector<float> x, y;
  for (int i = -100000; i <= 100000; ++i) x.push_back(static_cast<float>(i) * 1e-3f);
  x.push_back(not_a_number);
  y.resize(x.size());
  exp_all(x.data(), y.data(), static_cast<int>(x.size()));
  int falls = 0, differs = 0;
  for (std::size_t i = 0; i + 1 < x.size(); ++i) {
    differs += y[i] != moe::exp(x[i]);
    if (i > 0) falls += y[i] < y[i - 1];
  }
  CHECK(falls == 0);
  CHECK(differs == 0);
  CHECK(std::isnan(y.back()));
}

TEST_CASE_TEMPLATE("core/numeric: NaN of any kind and +inf are no logits, all else is", V, float,
                   double) {
  using Limits = std::numeric_limits<V>;
  for (V const bad :
       {Limits::infinity(), Limits::quiet_NaN(), -Limits::quiet_NaN(), Limits::signaling_NaN()})
    CHECK(moe::is_invalid_logit(bad));
  for (V const good : {V(0), -V(0), V(1), -V(1), Limits::max(), Limits::lowest(),
                       Limits::denorm_min(), -Limits::infinity()})
    CHECK_FALSE(moe::is_invalid_logit(good));
}

TEST_CASE("core/numeric: is_invalid_logit agrees with the C library in loops over floats") {
  std::vector<float> x;
  for (std::uint32_t bits = 0; bits < 0xffff0000u; bits += 0xfffu)
    x.push_back(__builtin_bit_cast(float, bits));
  int differs = 0, invalid = 0;
  for (float const v : x) {
    differs += moe::is_invalid_logit(v) != (std::isnan(v) || v == infinity);
    invalid += moe::is_invalid_logit(v);
  }
  CHECK(differs == 0);
  CHECK(invalid > 1000);
}

TEST_CASE("core/numeric: ordered_bits has the order of floats, NaN below all") {
  std::vector<float> values{-infinity,
                            std::numeric_limits<float>::lowest(),
                            -2,
                            -1,
                            -1e-38f,
                            -std::numeric_limits<float>::denorm_min(),
                            -0.0f,
                            0.0f,
                            std::numeric_limits<float>::denorm_min(),
                            1e-38f,
                            1,
                            2,
                            std::numeric_limits<float>::max(),
                            infinity};
  for (std::uint64_t bits = 12345; bits < 0xff800000u; bits += 16777259u) {
    float const v = __builtin_bit_cast(float, static_cast<std::uint32_t>(bits));
    if (!std::isnan(v)) values.push_back(v);
  }
  int wrong = 0;
  for (float const a : values)
    for (float const b : values) {
      wrong += (a < b) != (moe::ordered_bits(a) < moe::ordered_bits(b));
      wrong += (a == b) != (moe::ordered_bits(a) == moe::ordered_bits(b));
    }
  CHECK(wrong == 0);
  for (float const nan : {not_a_number, -not_a_number})
    CHECK(moe::ordered_bits(nan) < moe::ordered_bits(-infinity));
  static_assert(moe::ordered_bits(-1.0f) < moe::ordered_bits(1.0f));
}

TEST_CASE("core/divided_by: the quotient, on a CPU to the last bit") {
  for (float const d : {3.0f, -0.7f, 1e-38f, 3e38f, 1e-45f, infinity})
    for (float const x : {0.0f, 1.0f, -2.5f, 1e-40f}) {
      CHECK(moe::divided_by(d)(x) == x / d);
      CHECK(moe::divided_by(static_cast<double>(d), true)(3.0) == 3.0 / static_cast<double>(d));
    }
}

TEST_CASE("core/softplus: within three units in the last place, and 0, inf and NaN") {
  double worst = 0;
  for (float x = -87; x < 90; x += 0.0137f) {
    double const exact = std::log1p(std::exp(static_cast<double>(x)));
    float const ulp = std::nextafter(static_cast<float>(exact), 1e30f) - static_cast<float>(exact);
    worst = moe_test::worse(worst,
                            std::abs(static_cast<double>(moe::softplus(x)) - exact) / double(ulp));
    CHECK(moe::softplus(static_cast<double>(x)) == doctest::Approx(exact).epsilon(1e-15));
  }
  CHECK(worst < 3);
  CHECK(moe::softplus(-200.0f) == 0);
  CHECK(moe::softplus(-1000.0) == 0);
  CHECK(moe::softplus(1e30f) == 1e30f);
  CHECK(std::isnan(moe::softplus(std::nanf(""))));
  CHECK(std::isnan(moe::softplus(std::nan(""))));
}
