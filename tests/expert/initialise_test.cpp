// initialise: the laws of the values, different experts, any split over threads, ranks and slices.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <doctest/doctest.h>
#include <set>

#include <moe/core/thread_team.hpp>
#include <moe/expert/initialise.hpp>
#include <moe/expert/slice.hpp>

#include "case.hpp"

using moe_test::owned_weights;

TEST_CASE(
    "expert/initialise: values have the bounds and moments of their law, and no two are equal") {
  owned_weights<double> w({6, 40, 90}, true, true);
  moe::initialise(moe::cpu{}, w.view, {.seed = 3});
  std::set<double> const different(w.values.begin(), w.values.end());
  CHECK(different.size() > w.values.size() * 999 / 1000);
  double square = 0;
  for (std::int64_t i = 0; i < 6 * 40 * 90; ++i) {
    CHECK(std::fabs(w.view.up.data()[i]) < 1 / std::sqrt(40.0));
    CHECK(std::fabs(w.view.down.data()[i]) < 1 / std::sqrt(90.0));
    square += w.view.down.data()[i] * w.view.down.data()[i];
  }
  CHECK(square / (6 * 40 * 90) == doctest::Approx(1.0 / (3 * 90)).epsilon(0.03));

  moe::initialise(moe::cpu{}, w.view,
                  {.rule = moe::initialisation::law::normal, .std = 0.5, .down_std = 0.1});
  double up = 0, up4 = 0, down = 0, mean = 0;
  std::int64_t const n = 6 * 40 * 90;
  for (std::int64_t i = 0; i < n; ++i) {
    double const u = w.view.up.data()[i], d = w.view.down.data()[i];
    mean += u / double(n);
    up += u * u / double(n);
    up4 += u * u * u * u / double(n);
    down += d * d / double(n);
  }
  CHECK(std::fabs(mean) < 0.015);
  CHECK(up == doctest::Approx(0.25).epsilon(0.03));
  CHECK(up4 / (up * up) == doctest::Approx(3).epsilon(0.08));
  CHECK(down == doctest::Approx(0.01).epsilon(0.03));
  CHECK(w.view.up_bias(2, 3) == 0);
}

TEST_CASE("expert/initialise: the same values for any number of threads, ranks and slices") {
  for (auto law : {moe::initialisation::law::scaled_uniform, moe::initialisation::law::normal}) {
    owned_weights<float> whole({4, 10, 12}, true, true), parts({4, 10, 12}, true, true);
    moe::initialise(moe::cpu{}, whole.view, {.rule = law, .seed = 9, .layer = 2});
    moe::thread_team team(3);
    for (int p = 0; p < 4; ++p)
      for (int s = 0; s < 3; ++s)
        moe::initialise(team, moe::slice(parts.view.expert(p), s, 3),
                        {.rule = law,
                         .seed = 9,
                         .layer = 2,
                         .first_expert = p,
                         .first_hidden = moe::slice_range(12, s, 3).first,
                         .hidden = 12});
    CHECK(parts.values == whole.values);
    moe::initialise(moe::cpu{}, parts.view, {.rule = law, .seed = 9, .layer = 3});
    CHECK(parts.values != whole.values);
  }
  owned_weights<float> w({1, 2, 2}, false, false);
  CHECK_THROWS_AS(moe::initialise(moe::cpu{}, w.view, {.std = -1}), moe::precondition_error);
}
