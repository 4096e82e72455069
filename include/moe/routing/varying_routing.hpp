// A routing whose tokens have different numbers of pairs: what experts that choose tokens write.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// A routing with room for `room` pairs, shared out among the tokens by `begin`. All that reads a
/// routing reads it; who writes it sets begin, K and the pairs. Arrays are the caller's.
template <class V>
struct varying_routing : basic_routing<V> {
  std::int32_t* begin = nullptr;  ///< [T+1]: token_begin, to be written.
  std::int64_t room = 0;          ///< Pairs that the arrays have room for.
};

namespace detail {

inline void check_varying_shape(std::int64_t T, int E, std::int64_t pairs, call_site site) {
  expects(T >= 0 && E >= 1 && pairs >= 0 && pairs <= 0x7ffffffe && T <= 0x7ffffffe / E,
          "varying_routing: T >= 0, E >= 1, pairs >= 0, and pairs and T * E fit 32-bit ids", site,
          {{"T", T}, {"E", E}, {"pairs", pairs}});
}

}  // namespace detail

/// Bytes that `carve_varying_routing` takes.
template <class V = float>
std::size_t varying_routing_bytes(std::int64_t T, std::int64_t pairs) noexcept {
  return memory_size()
      .add<std::int32_t>(T + 1)
      .add<std::int32_t>(pairs)
      .template add<V>(pairs)
      .template add<V>(pairs)
      .bytes();
}

/// A routing without pairs, with its arrays in the caller's memory.
///
/// @param from   Gives varying_routing_bytes<V>(T, pairs) bytes: the arrays are taken from it.
/// @param pairs  The most that all tokens have together.
/// @throws precondition_error unless T >= 0, E >= 1, pairs and T * E fit 32-bit ids, and from is large
///         enough.
template <class V = float>
varying_routing<V> carve_varying_routing(memory& from, std::int64_t T, int E, std::int64_t pairs,
                                         call_site site = call_site::here()) {
  detail::check_varying_shape(T, E, pairs, site);
  char const* const enough = "carve_varying_routing: memory holds varying_routing_bytes(T, pairs)";
  varying_routing<V> routed;
  routed.T = T;
  routed.K = 1;
  routed.E = E;
  routed.begin = from.take<std::int32_t>(T + 1, enough, site);
  routed.expert = from.take<std::int32_t>(pairs, enough, site);
  routed.weight = from.take<V>(pairs, enough, site);
  routed.score = from.take<V>(pairs, enough, site);
  routed.room = pairs;
  routed.token_begin = routed.begin;
  std::fill_n(routed.begin, T + 1, 0);
  return routed;
}

/// One that owns its arrays: for callers without memory of their own. Not copyable.
template <class V = float>
class varying_routing_buffer : public varying_routing<V> {
 public:
  /// @throws precondition_error as carve_varying_routing does.
  varying_routing_buffer(std::int64_t token_count, int experts, std::int64_t most_pairs,
                         call_site site = call_site::here()) {
    detail::check_varying_shape(token_count, experts, most_pairs, site);
    bytes_ = buffer(varying_routing_bytes<V>(token_count, most_pairs));
    memory from = bytes_;
    static_cast<varying_routing<V>&>(*this) =
        carve_varying_routing<V>(from, token_count, experts, most_pairs, site);
  }

 private:
  buffer bytes_;
};

}  // namespace moe::inline MOE_ABI
