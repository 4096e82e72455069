// Gradient checks by central differences, in double.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <doctest/doctest.h>
#include <vector>

namespace moe_test {

/// (f(x + h e_i) - f(x - h e_i)) / 2h.
template <class F>
double central_difference(F const& f, std::vector<double> x, std::size_t i, double h = 1e-5) {
  double const middle = x[i];
  x[i] = middle + h;
  double const above = f(x);
  x[i] = middle - h;
  double const below = f(x);
  return (above - below) / (2 * h);
}

/// Checks every element of `gradient` against f, a function of x alone that has a derivative there.
/// An -inf in x has to have gradient 0.
template <class F>
void check_gradient(F const& f, std::vector<double> const& x, std::vector<double> const& gradient,
                    double tolerance = 1e-7) {
  REQUIRE(gradient.size() == x.size());
  for (std::size_t i = 0; i < x.size(); ++i) {
    CAPTURE(i);
    double const expected = std::isinf(x[i]) ? 0 : central_difference(f, x, i);
    CAPTURE(expected);
    CAPTURE(gradient[i]);
    CHECK(std::abs(gradient[i] - expected) <= tolerance * std::max(1.0, std::abs(expected)));
  }
}

}  // namespace moe_test
