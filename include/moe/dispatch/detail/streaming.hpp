// Stores that go past the cache, and the loads that are asked for ahead of them.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

inline constexpr std::int64_t cache_line = 64;

/// Outputs of this many bytes and more are stored past the cache. Dispatch of rows of 4 KiB and one
/// pass that reads them, past it against through it: 8 MiB 0.75 to 0.95, 12 MiB 1.05 to 1.2, 32 MiB 1.3
/// to 1.4 times as fast; the dispatch alone 1.7 times at 32 MiB (Zen 3, 32 MiB of third-level cache,
/// 1 thread, g++ 12, 2026-11).
inline constexpr std::int64_t past_cache_bytes = std::int64_t{12} << 20;

/// Bytes of work that are worth a turn of one member of a team. A guess; past the cache more, since
/// each turn then ends with a fence, which waits until the memory has everything.
constexpr std::int64_t bytes_per_turn(bool past_cache) noexcept {
  return std::int64_t{past_cache ? 1024 : 128} << 10;
}

/// Asks for the line of `address` to be loaded. Never faults.
inline void load_ahead(void const* address) noexcept {
  __builtin_prefetch(address, 0, 3);
}

/// Bytes from `address` up to the next cache line; 0 at the start of one.
inline std::int64_t bytes_to_line(void const* address) noexcept {
  auto const past =
      static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address) % cache_line);
  return past == 0 ? 0 : cache_line - past;
}

/// Orders stores past the cache before whatever this thread does next: each task that made some
/// ends with it, because the release that ends a task does not order them on x86.
inline void store_fence() noexcept {
  MOE_STREAM_FENCE();
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
