// Equality that tells -0 from 0, and NaNs from one another.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstring>
#include <vector>

namespace moe_test {

template <class V>
bool same_bits(std::vector<V> const& a, std::vector<V> const& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(V)) == 0);
}

}  // namespace moe_test
