// A routing in the memory of a device.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// As `carve_routing(from, ...)`, of memory that kernels see, which exec.fill clears.
template <class V = float, kernel_executor X>
basic_routing<V> carve_routing(X const& exec, memory& from, std::int64_t T, int K, int E,
                               call_site site = call_site::here()) {
  static_assert(no_candidate == -1);
  basic_routing<V> const routed = detail::take_routing<V>(from, T, K, E, site);
  auto const pairs = static_cast<std::size_t>(T) * static_cast<std::size_t>(K);
  exec.fill(routed.expert, 0xff, pairs * sizeof(std::int32_t), site);
  exec.fill(routed.weight, 0, pairs * sizeof(V), site);
  exec.fill(routed.score, 0, pairs * sizeof(V), site);
  return routed;
}

}  // namespace moe::inline MOE_ABI
