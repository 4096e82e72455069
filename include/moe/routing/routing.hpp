// A routing: which experts each token chose, and with what weight.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

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

/// A routing that owns its arrays: for callers without memory of their own. Not copyable.
template <class V>
class basic_routing_buffer : public basic_routing<V> {
 public:
  /// @param token_count  T. @param choices  K. @param experts  E.
  /// @throws precondition_error unless T >= 0, E >= 1, 1 <= K <= min(E, max_choices).
  basic_routing_buffer(std::int64_t token_count, int choices, int experts,
                       call_site site = call_site::here()) {
    expects(token_count >= 0 && experts >= 1 && choices >= 1 && choices <= experts &&
                choices <= max_choices,
            "routing_buffer: T >= 0, E >= 1, 1 <= K <= min(E, 16)", site,
            {{"T", token_count}, {"K", choices}, {"E", experts}});
    auto const pairs = static_cast<std::size_t>(token_count * choices);
    experts_.assign(pairs, no_candidate);
    weights_.assign(pairs, V(0));
    scores_.assign(pairs, V(0));
    this->T = token_count;
    this->K = choices;
    this->E = experts;
    this->expert = experts_.data();
    this->weight = weights_.data();
    this->score = scores_.data();
  }
  basic_routing_buffer(basic_routing_buffer&&) noexcept = default;
  basic_routing_buffer& operator=(basic_routing_buffer&&) noexcept = default;

 private:
  std::vector<std::int32_t> experts_;
  std::vector<V> weights_;
  std::vector<V> scores_;
};

using routing_buffer = basic_routing_buffer<float>;

}  // namespace moe::inline MOE_ABI
