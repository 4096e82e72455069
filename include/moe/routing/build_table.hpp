// Build_table: from a routing to a routing table, by counting.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/random.hpp>
#include <moe/routing/detail/count_pairs.hpp>
#include <moe/routing/detail/lay_out_rows.hpp>
#include <moe/routing/detail/place_pairs.hpp>
#include <moe/routing/detail/table_build.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch that build_table needs for any routing within `shape` and any rules.
/// About 16 bytes for each pair, and 4 * K for each segment and thread.
/// @pre  shape has T >= 0, K, E, sources >= 1.
inline std::size_t build_table_scratch(cpu const& exec, table_shape const& shape) noexcept {
  return detail::table_scratch::size(exec, shape);
}

namespace detail {

/// @param pairs  Of the routing; where token_begin is on a device, the most that there can be.
template <class V>
void check_table_arguments(basic_routing<V> const& in, std::int64_t pairs, table_rules const& rules,
                           expert_map const& map, routing_table const& table, bool scored,
                           call_site site) {
  bool const varies = in.token_begin != nullptr;
  expects(in.T >= 0 && in.K >= 1 && (in.K <= max_choices || (varies && in.K <= in.E)) && in.E >= 1,
          "build_table: T >= 0, 1 <= K <= 16 (or K <= E with token_begin), E >= 1", site,
          {{"T", in.T}, {"K", in.K}, {"E", in.E}});
  table_shape const& room = table.room;
  int const P = physical_experts(map, in.E);
  expects(in.T <= room.T && in.K <= room.K && in.E <= room.E && P <= room.P,
          "build_table: the table has room for the routing's T, K, E and the map's P", site,
          {{"T", in.T},
           {"room for T", room.T},
           {"K", in.K},
           {"room for K", room.K},
           {"E", in.E},
           {"room for E", room.E},
           {"P", P},
           {"room for P", room.P}});
  expects(table.sources >= 1 && table.sources <= room.sources && table.max_rows >= 0 &&
              table.max_rows <= room.max_rows,
          "build_table: 1 <= table.sources and table.max_rows within its room", site,
          {{"sources", table.sources},
           {"room for sources", room.sources},
           {"max_rows", table.max_rows},
           {"room for rows", room.max_rows}});
  constexpr std::int64_t most = 0x7ffffffe;
  expects(in.T <= most / in.K && table.max_rows <= most &&
              (in.E > P ? in.E : P) <= most / table.sources,
          "build_table: T * K, max_rows, E * sources and P * sources fit 32-bit ids", site,
          {{"T", in.T}, {"K", in.K}, {"E", in.E}, {"P", P}, {"sources", table.sources}});
  expects(pairs >= 0 && pairs <= in.T * in.K, "build_table: token_begin ends at T * K or before",
          site, {{"pairs", pairs}, {"T", in.T}, {"K", in.K}});
  expects((pairs == 0 || (in.expert != nullptr && table.row_of != nullptr)) &&
              (table.max_rows == 0 || table.pair_of != nullptr) && table.begin != nullptr &&
              table.used != nullptr && table.wanted != nullptr && table.counts != nullptr,
          "build_table: the routing's expert and all arrays of the table are given", site);
  expects(!scored || pairs == 0 || in.score != nullptr || in.weight != nullptr,
          "build_table: an overflow rule that ranks by score needs the routing's score or weight",
          site);
  expects(rules.align >= 1, "build_table: align >= 1", site, {{"align", rules.align}});
  capacity_rule const& cap = rules.cap;
  bool const fixed = cap.rule == capacity_rule::kind::fixed;
  expects(cap.multiple >= 1 && cap.rows >= (fixed ? 1 : 0) && cap.factor >= -1e9 &&
              cap.factor <= 1e9 && cap.eval_factor >= -1e9 && cap.eval_factor <= 1e9,
          "build_table: a capacity has multiple >= 1, |factor| <= 1e9, rows >= 0, and a fixed one "
          "rows >= 1",
          site,
          {{"rows", cap.rows},
           {"multiple", cap.multiple},
           {"factor", cap.factor},
           {"eval_factor", cap.eval_factor}});
  expects((map.physical_begin == nullptr) == (map.physical == nullptr) && map.P >= 0 &&
              (map.physical_begin != nullptr || P >= in.E),
          "build_table: expert_map has both of physical_begin and physical or none, then P >= E",
          site, {{"P", P}, {"E", in.E}});
}

}  // namespace detail

/// Gives each pair of a routing its row at its expert, or says why it has none.
///
/// A token takes part unless live[t] = 0 (counted in masked_tokens) or its first choice is
/// `invalid_token` (invalid_tokens); no pair of these is counted anywhere else. Of the others, a
/// pair *wants* its expert if the id is in [0, E), the expert is visible and the token's source is in
/// [0, table.sources). Pairs that want a computed expert rank, for each source apart, in the order
/// `rules` give, and the first C * replicas(e) of them are kept (those of highest priority if the
/// expert overflows; see `overflow`); the p-th kept one becomes row p / n of segment
/// (replica p mod n, source). Equal ids within one token are separate pairs.
///
/// @param in       [T,K] or variable. score or weight are read by overflow::score and
///                 batch_prioritised only; a token's best score is that of its choices in [0, E).
/// @param map      Default: the identity.
/// @param scratch  build_table_scratch(exec, shape) bytes, for the shape of the table or a greater.
/// @param table    Its arrays, room, max_rows and sources are given; all else is written. wanted[e]
///                 counts the pairs that want e (as DeepSpeed's exp_counts); counts.capacity is C.
///                 Where the layout needs rows beyond max_rows, begin stops there, and the pairs
///                 are counted in beyond_max_rows.
/// @post   pair_of[row_of[i]] = i for each kept pair; pair_of = -1 at all other rows < max_rows.
/// @throws precondition_error if T, K or E are out of range or beyond the table's room; an array is
///         missing; the rules are out of range; the map names a physical expert twice or none for a
///         visible computed expert; token_begin does not rise from 0 by at most K; or scratch is
///         too small.
/// @note   Results are the same for any number of threads. Allocates nothing.
/// @cost   O(T K + (E + P) sources); score and random overflow add O(pairs at full experts), batch_
///         prioritised a radix sort of T keys. Pairs are never sorted.
template <class V>
void build_table(cpu const& exec, basic_routing<V> const& in, table_rules const& rules,
                 expert_map const& map, memory scratch, routing_table& table,
                 call_site site = call_site::here()) {
  bool const by_score = rules.when_full == overflow::score;
  bool const ranked = rules.when_full == overflow::batch_prioritised;
  detail::check_table_arguments(in, in.pairs(), rules, map, table, by_score || ranked, site);
  detail::table_build<V> build(exec, in, rules, map, scratch, table, site);
  if (ranked) detail::rank_tokens(build);
  detail::count_pairs(build);
  detail::lay_out_rows(build);
  if (by_score) {
    detail::place_pairs_by(build, [&](std::int64_t i, std::int64_t, int, int) {
      return static_cast<float>(in.rank_score(i));
    });
  } else if (rules.when_full == overflow::random) {
    detail::place_pairs_by(build, [&](std::int64_t, std::int64_t t, int, int e) {
      return uniform(in.tokens.at(t), stream::overflow, static_cast<std::uint32_t>(e));
    });
  } else {
    detail::place_pairs(build);
  }
  detail::list_pairs(build);
}

/// As above, without an expert map.
template <class V>
void build_table(cpu const& exec, basic_routing<V> const& in, table_rules const& rules,
                 memory scratch, routing_table& table, call_site site = call_site::here()) {
  build_table(exec, in, rules, expert_map{}, scratch, table, site);
}

/// As above, with a user's rule for full experts in place of rules.when_full: an expert keeps the
/// pairs of highest `priority(pair)`, ties to the lower rank, NaN as -inf.
///
/// @param priority  float(routed_pair<V> const&); called at most once for each pair that wants a full
///                  expert, from any thread.
template <class V, overflow_rule<routed_pair<V>> Overflow>
void build_table(cpu const& exec, basic_routing<V> const& in, table_rules const& rules,
                 Overflow const& priority, expert_map const& map, memory scratch,
                 routing_table& table, call_site site = call_site::here()) {
  detail::check_table_arguments(in, in.pairs(), rules, map, table, false, site);
  detail::table_build<V> build(exec, in, rules, map, scratch, table, site);
  detail::count_pairs(build);
  detail::lay_out_rows(build);
  detail::place_pairs_by(build, [&](std::int64_t i, std::int64_t t, int j, int e) {
    routed_pair<V> pair{.token = in.tokens.at(t), .choice = j, .expert = e};
    if (in.weight != nullptr) pair.weight = in.weight[i];
    pair.score = in.score != nullptr ? in.score[i] : pair.weight;
    return static_cast<float>(priority(pair));
  });
  detail::list_pairs(build);
}

/// As above, without an expert map.
template <class V, overflow_rule<routed_pair<V>> Overflow>
void build_table(cpu const& exec, basic_routing<V> const& in, table_rules const& rules,
                 Overflow const& priority, memory scratch, routing_table& table,
                 call_site site = call_site::here()) {
  build_table(exec, in, rules, priority, expert_map{}, scratch, table, site);
}

}  // namespace moe::inline MOE_ABI
