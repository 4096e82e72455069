// A routing: which experts each token chose, and with what weight.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Where the pairs of each chunk of tokens go: what a gate on a GPU counts on its way, so that
/// build_table need not read the ids once more for it.
struct pair_counts {
  std::int64_t chunk = 0;   ///< Tokens of a chunk; the last one has what is left.
  std::int64_t chunks = 0;  ///< T / chunk, rounded up.
  /// [chunks, E + 4], or null = not counted: pairs of each expert, pairs without one (`no_candidate`),
  /// pairs out of range, masked tokens, invalid tokens. Pairs of the last two kinds of tokens are
  /// counted nowhere else.
  std::int32_t* counts = nullptr;
};

/// The choices of T tokens: what a gate writes, or a user supplies. Arrays are the caller's.
///
/// A *pair* is one (token, choice). Pair i = t * K + j is choice j of token t; with `token_begin`
/// (K varies: expert choice) the pairs of token t are [token_begin[t], token_begin[t + 1]), and K
/// is the most any token has.
template <class V>
struct basic_routing {
  std::int64_t T = 0;
  int K = 0;
  int E = 0;
  /// [T,K]: an expert id, or `no_candidate`, or `invalid_token`. Any other value is counted as out
  /// of range by build_table and routed nowhere.
  std::int32_t* expert = nullptr;
  V* weight = nullptr;  ///< [T,K]: what combine multiplies with.
  V* score =
      nullptr;  ///< [T,K] or null: the score before weighing; ranks pairs when experts overflow.
  std::int32_t const* token_begin = nullptr;  ///< [T+1], or null = K pairs each.
  batch tokens{};                             ///< Ids, seed, token mask, sources.
  /// Of the ids as they are: whoever changes some of them resets it to {}.
  pair_counts chunk_counts{};

  MOE_HOST_DEVICE constexpr std::int64_t first_pair(std::int64_t t) const noexcept {
    return token_begin != nullptr ? token_begin[t] : t * K;
  }
  /// Pairs of all tokens.
  MOE_HOST_DEVICE constexpr std::int64_t pairs() const noexcept { return first_pair(T); }
  /// What ranks pair i against others: its score, or its weight where no scores are kept.
  MOE_HOST_DEVICE constexpr V rank_score(std::int64_t i) const noexcept {
    return score != nullptr ? score[i] : weight[i];
  }
};

using routing = basic_routing<float>;

namespace detail {

inline void check_routing_shape(std::int64_t T, int K, int E, call_site site) {
  expects(T >= 0 && E >= 1 && K >= 1 && K <= E && K <= max_choices,
          "routing: T >= 0, E >= 1, 1 <= K <= min(E, 16)", site, {{"T", T}, {"K", K}, {"E", E}});
}

/// Arrays of a routing, as they come.
template <class V>
basic_routing<V> take_routing(memory& from, std::int64_t T, int K, int E, call_site site) {
  check_routing_shape(T, K, E, site);
  char const* const enough = "carve_routing: memory holds routing_bytes(T, K)";
  basic_routing<V> routed;
  routed.T = T;
  routed.K = K;
  routed.E = E;
  routed.expert = from.take<std::int32_t>(T * K, enough, site);
  routed.weight = from.take<V>(T * K, enough, site);
  routed.score = from.take<V>(T * K, enough, site);
  return routed;
}

}  // namespace detail

/// Bytes that `carve_routing` takes.
/// @pre  T >= 0, K >= 1.
template <class V = float>
std::size_t routing_bytes(std::int64_t T, int K) noexcept {
  memory_size size;
  size.add<std::int32_t>(T * K);
  size.add<V>(T * K);
  size.add<V>(T * K);
  return size.bytes();
}

/// A routing in which no token has an expert, with its arrays in the caller's memory.
///
/// @param from  Gives routing_bytes<V>(T, K) bytes: the arrays are taken from it.
/// @throws precondition_error unless T >= 0, E >= 1, 1 <= K <= min(E, max_choices) and from is large
///         enough.
template <class V = float>
basic_routing<V> carve_routing(memory& from, std::int64_t T, int K, int E,
                               call_site site = call_site::here()) {
  basic_routing<V> const routed = detail::take_routing<V>(from, T, K, E, site);
  std::fill_n(routed.expert, T * K, static_cast<std::int32_t>(no_candidate));
  std::fill_n(routed.weight, T * K, V(0));
  std::fill_n(routed.score, T * K, V(0));
  return routed;
}

/// The same; a GPU has an overload of its own.
template <class V = float>
basic_routing<V> carve_routing(cpu const&, memory& from, std::int64_t T, int K, int E,
                               call_site site = call_site::here()) {
  return carve_routing<V>(from, T, K, E, site);
}

/// A routing that owns its arrays: for callers without memory of their own. Not copyable.
template <class V>
class basic_routing_buffer : public basic_routing<V> {
 public:
  /// @param token_count  T. @param choices  K. @param experts  E.
  /// @throws precondition_error as carve_routing does.
  basic_routing_buffer(std::int64_t token_count, int choices, int experts,
                       call_site site = call_site::here()) {
    detail::check_routing_shape(token_count, choices, experts, site);
    bytes_ = buffer(routing_bytes<V>(token_count, choices));
    memory from = bytes_;
    static_cast<basic_routing<V>&>(*this) =
        carve_routing<V>(from, token_count, choices, experts, site);
  }

 private:
  buffer bytes_;
};

using routing_buffer = basic_routing_buffer<float>;

}  // namespace moe::inline MOE_ABI
