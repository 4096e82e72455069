// The first passes of build_table: the order of the tokens, the load of each expert, the capacity.
// Private to build_table.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/numeric.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/detail/table_build.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Makes the walk's token_order: by falling best score, ties to the lower token.
template <class V>
void rank_tokens(table_build<V>& b) {
  basic_routing<V> const& in = b.in;
  auto* const words = b.template take<std::uint64_t>(in.T);
  auto* const other = b.template take<std::uint64_t>(in.T);
  b.for_each_chunk([&](std::int64_t c) {
    for (std::int64_t t = b.walk.first_token(c); t < b.walk.first_token(c + 1); ++t) {
      if (!b.walk.sound(t)) {
        words[t] = static_cast<std::uint64_t>(t);  // count_pairs will refuse
        continue;
      }
      std::uint32_t best = 0;
      for (std::int64_t i = in.first_pair(t); i < in.first_pair(t + 1); ++i)
        if (static_cast<std::uint32_t>(in.expert[i]) < static_cast<std::uint32_t>(in.E))
          best = std::max(best, ordered_bits(static_cast<float>(in.rank_score(i))));
      words[t] = static_cast<std::uint64_t>(~best) << 32 | static_cast<std::uint64_t>(t);
    }
  });
  sort_by_upper_half(words, other, in.T);
  b.walk.token_order = words;
  b.plain = false;
}

/// The greatest share that a replica has of its group's load.
template <class V>
std::int64_t fullest(table_build<V> const& b) noexcept {
  std::uint32_t const* const load = b.load;
  std::uint32_t most = 0;
  for (std::int64_t g = 0; g < b.groups; ++g) {
    std::uint32_t const all = load[g];  // loaded in any case: no branch
    most = std::max(most, b.replicas[g] == 1 ? all : 0u);
  }
  if (!b.one_replica)
    for (std::int64_t g = 0; g < b.groups; ++g)
      if (b.replicas[g] > 1)
        most = std::max(most, static_cast<std::uint32_t>(b.share(load[g], 0, b.replicas[g])));
  return most;
}

template <class V>
void count_chunk(table_build<V> const& b, std::int64_t c) {
  chunk_counts met{};
  std::fill_n(b.next(c, 0), b.steps * b.groups, 0u);
  b.walk_counters(
      c, met, [](std::uint32_t& counter, std::int64_t, std::int64_t) { ++counter; },
      [](std::int64_t, std::int64_t) {});
  b.met[c] = met;
}

/// Counts the pairs of each chunk: counters, load, wanted, the capacity, and what never ranks.
/// @throws precondition_error if token_begin does not rise as it has to.
template <class V>
void count_pairs(table_build<V>& b) {
  b.for_each_chunk([&](std::int64_t c) { count_chunk(b, c); });

  routing_table const& table = b.table;
  table_counts& counts = *table.counts;
  counts = {};
  bool sound = true;
  for (int c = 0; c < b.chunks; ++c) {
    sound = sound && !b.met[c].bad_token_begin;
    counts.missing += b.met[c].missing;
    counts.out_of_range += b.met[c].out_of_range;
    counts.masked_tokens += b.met[c].masked_tokens;
    counts.invalid_tokens += b.met[c].invalid_tokens;
  }
  expects(sound, "build_table: token_begin rises from 0 by at most K for each token", b.site,
          {{"T", b.in.T}, {"K", b.in.K}});

  std::copy_n(b.next(0, 0), b.groups, b.load);
  for (int c = 0; c < b.chunks; ++c)
    for (int j = c == 0 ? 1 : 0; j < b.steps; ++j) {
      std::uint32_t const* const n = b.next(c, j);
      for (std::int64_t g = 0; g < b.groups; ++g) b.load[g] += n[g];
    }

  int const S = table.sources;
  if (S == 1)
    std::copy_n(b.load, b.groups, table.wanted);
  else
    for (int e = 0; e < b.in.E; ++e) {
      std::uint32_t wanted = 0;
      for (int s = 0; s < S; ++s) wanted += b.load[static_cast<std::int64_t>(e) * S + s];
      table.wanted[e] = static_cast<std::int32_t>(wanted);
    }
  if (b.map.visible != nullptr || b.map.kind != nullptr)
    for (int e = 0; e < b.in.E; ++e) {
      if (!b.map.is_visible(e)) {
        counts.hidden += table.wanted[e];
        table.wanted[e] = 0;
      } else if (b.map.kind_of(e) != expert_kind::computed) {
        counts.uncomputed += table.wanted[e];
      }
    }
  counts.capacity = rows_of(b.rules.cap, b.in.T, b.in.E, b.in.K, b.in.tokens.training,
                            is_static(b.rules.cap) ? 0 : fullest(b));
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
