// Vectors of random numbers for tests: the same ones for the same seed.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

namespace moe_test {

/// [size] normal numbers.
template <class V = double>
std::vector<V> normals(std::int64_t size, unsigned seed, double mean = 0, double sd = 1) {
  std::mt19937 bits(seed);
  std::normal_distribution<double> normal(mean, sd);
  std::vector<V> values(static_cast<std::size_t>(size));
  for (V& v : values) v = static_cast<V>(normal(bits));
  return values;
}

/// [size] numbers of [low, high).
template <class V = double>
std::vector<V> uniforms(std::int64_t size, unsigned seed, double low = 0, double high = 1) {
  std::mt19937 bits(seed);
  std::uniform_real_distribution<double> uniform(low, high);
  std::vector<V> values(static_cast<std::size_t>(size));
  for (V& v : values) v = static_cast<V>(uniform(bits));
  return values;
}

}  // namespace moe_test
