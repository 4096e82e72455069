// Walk the pairs of a routing, chunk by chunk: who wants which expert, and who goes nowhere. Private to
// build_table.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// What one chunk of tokens met besides the pairs that name an expert.
struct alignas(memory::alignment) chunk_counts {
  std::int64_t missing, out_of_range, masked_tokens, invalid_tokens;
  bool bad_token_begin;
};

/// Whether a token's pairs may be [i0, i1), as token_begin says, of `pairs` in all.
MOE_HOST_DEVICE constexpr bool may_be_pairs(std::int64_t i0, std::int64_t i1, int K,
                                            std::int64_t pairs, bool first_token) noexcept {
  return i0 >= 0 && i0 <= i1 && i1 - i0 <= K && i1 <= pairs && (!first_token || i0 == 0);
}

struct pair_range {
  std::int64_t first, last;
};

/// The pairs of token t of a routing or table on a device, where nobody could refuse a token_begin that
/// does not rise as it has to: then none, rather than others' memory.
template <class PairsOfTokens>
MOE_HOST_DEVICE constexpr pair_range pairs_of(PairsOfTokens const& in, std::int64_t t) noexcept {
  std::int64_t const i0 = in.first_pair(t), i1 = in.first_pair(t + 1);
  bool const sound = in.token_begin == nullptr ||
                     (may_be_pairs(i0, i1, in.K, in.pairs(), t == 0) && i1 <= in.T * in.K);
  return {i0, sound ? i1 : i0};
}

/// The tokens of a routing in contiguous chunks. A *group* is a (logical expert, source):
/// g = e * sources + s.
template <class V>
struct pair_walk {
  basic_routing<V> routing;
  int sources;
  int chunks;
  std::uint64_t const* token_order = nullptr;  ///< [T] token in the lower half; null = 0, 1, 2, ...

  std::int64_t first_token(std::int64_t chunk) const noexcept { return routing.T * chunk / chunks; }

  /// Whether token t's pairs lie where token_begin may put them.
  bool sound(std::int64_t t) const noexcept {
    if (routing.token_begin == nullptr) return true;
    return may_be_pairs(routing.token_begin[t], routing.token_begin[t + 1], routing.K,
                        routing.pairs(), t == 0);
  }

  /// Calls live(g, i, t, j, e) for each pair of chunk c that names an expert of a known source, and
  /// dead(i0, i1) for pairs that go nowhere, after counting them in met.
  ///
  /// live and dead are taken by value, and what they need is captured by value, so that a store to
  /// row_of cannot change it in the eyes of the compiler: a third of the time otherwise.
  template <class Live, class Dead>
  void walk(std::int64_t c, chunk_counts& met, Live live, Dead dead) const {
    basic_routing<V> const in = routing;
    auto const E = static_cast<std::uint32_t>(in.E);
    auto const S = static_cast<std::uint32_t>(sources);
    std::int64_t const last = first_token(c + 1);
    for (std::int64_t x = first_token(c); x < last; ++x) {
      std::int64_t const t =
          token_order == nullptr ? x : static_cast<std::int64_t>(token_order[x] & 0xffffffffu);
      if (!sound(t)) {
        met.bad_token_begin = true;
        continue;
      }
      std::int64_t const i0 = in.first_pair(t), i1 = in.first_pair(t + 1);
      auto const s =
          in.tokens.source == nullptr ? 0u : static_cast<std::uint32_t>(in.tokens.source[t]);
      if (!in.tokens.is_live(t)) {
        ++met.masked_tokens;
        dead(i0, i1);
      } else if (i0 < i1 && in.expert[i0] == invalid_token) {
        ++met.invalid_tokens;
        dead(i0, i1);
      } else if (s >= S) {
        met.out_of_range += i1 - i0;
        dead(i0, i1);
      } else {
        for (std::int64_t i = i0; i < i1; ++i) {
          std::int32_t const e = in.expert[i];
          if (static_cast<std::uint32_t>(e) < E) {
            live(static_cast<std::int64_t>(e) * S + s, i, t, static_cast<int>(i - i0), e);
          } else {
            ++(e == no_candidate ? met.missing : met.out_of_range);
            dead(i, i + 1);
          }
        }
      }
    }
  }

  /// The same with live(g, i, j), for the ordinary case that needs nothing else of the token: one loop.
  template <class Live, class Dead>
  void walk_pairs(std::int64_t c, chunk_counts& met, Live live, Dead dead) const {
    std::int32_t const* const expert = routing.expert;
    auto const E = static_cast<std::uint32_t>(routing.E);
    auto const S = static_cast<std::uint32_t>(sources);
    std::int64_t const K = routing.K;
    std::int64_t const end = first_token(c + 1) * K;
    int j = 0;
    for (std::int64_t i = first_token(c) * K; i < end; ++i) {
      std::int32_t const e = expert[i];
      if (static_cast<std::uint32_t>(e) < E) {
        live(static_cast<std::int64_t>(e) * S, i, j);
      } else if (e == invalid_token && i % K == 0) {
        ++met.invalid_tokens;
        dead(i, i + K);
        i += K - 1;
        continue;  // j stays 0
      } else {
        ++(e == no_candidate ? met.missing : met.out_of_range);
        dead(i, i + 1);
      }
      j = j + 1 == K ? 0 : j + 1;
    }
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
