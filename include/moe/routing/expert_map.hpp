// From logical experts, which gates choose, to physical ones, which hold rows.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// What an expert does. Only computed experts take rows, capacity and traffic.
enum class expert_kind : std::uint8_t {
  computed,  ///< Has weights; its pairs become rows of the table.
  zero,      ///< Gives nothing.
  copy,      ///< Gives the token itself.
  constant,  ///< Gives a learned vector.
  shared     ///< Gives the output of the expert that sees every token.
};

/// Logical expert -> its physical replicas, whether it may be used now, and its kind.
/// The default is the identity: E physical experts, all visible, all computed. Arrays are the
/// caller's.
struct expert_map {
  /// [E+1] and [P]: the replicas of expert e are physical[physical_begin[e] ..
  /// physical_begin[e + 1]), at least one for each computed expert. Both null: expert e is physical
  /// e. Pairs go to replicas in turn, in the order of the table's ranks.
  std::int32_t const* physical_begin = nullptr;
  std::int32_t const* physical = nullptr;
  int P = 0;                              ///< Physical experts; 0 = E.
  std::uint8_t const* visible = nullptr;  ///< [E] or null = all: 0 hides an expert.
  expert_kind const* kind = nullptr;      ///< [E] or null = all computed.

  MOE_HOST_DEVICE constexpr bool is_visible(int e) const noexcept {
    return visible == nullptr || visible[e] != 0;
  }
  MOE_HOST_DEVICE constexpr expert_kind kind_of(int e) const noexcept {
    return kind == nullptr ? expert_kind::computed : kind[e];
  }
  MOE_HOST_DEVICE constexpr int replicas(int e) const noexcept {
    return physical_begin == nullptr ? 1 : physical_begin[e + 1] - physical_begin[e];
  }
  /// Physical id of replica `i` of expert `e`.
  MOE_HOST_DEVICE constexpr int replica(int e, int i) const noexcept {
    return physical_begin == nullptr ? e : physical[physical_begin[e] + i];
  }
};

}  // namespace moe::inline MOE_ABI
