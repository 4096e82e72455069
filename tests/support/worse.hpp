// The greatest of errors, of which a NaN is greater than all: std::max loses it.
// SPDX-License-Identifier: MIT
#pragma once

#include <initializer_list>

namespace moe_test {

/// NaN if either is.
constexpr double worse(double a, double b) noexcept {
  return a > b || a != a ? a : b;
}

constexpr double worst_of(std::initializer_list<double> errors) noexcept {
  double worst = 0;
  for (double e : errors) worst = worse(worst, e);
  return worst;
}

}  // namespace moe_test
