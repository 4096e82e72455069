// Arbitrary routings, rules, maps and sources, made from any source of numbers; and the laws of tables.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <moe/routing/build_table.hpp>

namespace moe_test {

/// One call of build_table with the arrays behind it. Not movable: it points into itself.
template <class V>
struct table_case {
  std::vector<std::int32_t> expert, token_begin, source, physical_begin, physical;
  std::vector<V> weight, score;
  std::vector<std::uint8_t> live, visible;
  std::vector<std::int64_t> ids;
  std::vector<moe::expert_kind> kind;

  moe::basic_routing<V> routing;
  moe::table_rules rules;
  moe::expert_map map;
  moe::table_shape shape;

  table_case() = default;
  table_case(table_case const&) = delete;
  table_case& operator=(table_case const&) = delete;
};

/// What a case may hold.
struct table_case_limits {
  std::uint32_t T = 40, K = 5, E = 9, sources = 3;
  bool hostile = true;  ///< Ids that are no ids, NaN, repeated experts, too few rows.
};

/// Fills `c` from draw(n), a number in [0, n).
template <class V, class Draw>
void fill(table_case<V>& c, Draw& draw, table_case_limits const& most = {}) {
  auto const chance = [&](std::uint32_t one_in) { return draw(one_in) == 0; };
  auto const T = static_cast<int>(draw(most.T + 1));
  auto const K = static_cast<int>(1 + draw(most.K));
  auto const E = static_cast<int>(1 + draw(most.E));
  auto const sources = chance(2) ? 1 : static_cast<int>(1 + draw(most.sources));
  auto const size = [](auto n) { return static_cast<std::size_t>(n); };
  moe::basic_routing<V>& in = c.routing;
  in.T = T;
  in.K = K;
  in.E = E;

  // Variable K.
  if (chance(3)) {
    c.token_begin.push_back(0);
    for (int t = 0; t < T; ++t)
      c.token_begin.push_back(c.token_begin.back() + static_cast<std::int32_t>(draw(size(K) + 1)));
    in.token_begin = c.token_begin.data();
  }
  // Skewed ids: the lower of some draws.
  std::uint32_t const skew = 1 + draw(3);
  std::int64_t const pairs = in.pairs();
  for (std::int64_t i = 0; i < pairs; ++i) {
    std::uint32_t e = draw(static_cast<std::uint32_t>(E));
    for (std::uint32_t s = 1; s < skew; ++s) e = std::min(e, draw(static_cast<std::uint32_t>(E)));
    std::int32_t id = static_cast<std::int32_t>(e);
    if (most.hostile && chance(16)) {
      std::int32_t const odd[] = {moe::no_candidate,
                                  moe::invalid_token,
                                  E,
                                  -3,
                                  std::numeric_limits<std::int32_t>::max(),
                                  std::numeric_limits<std::int32_t>::min()};
      id = odd[draw(6)];
    }
    c.expert.push_back(id);
    auto const value = [&] {
      if (most.hostile && chance(24)) {
        V const odd[] = {std::numeric_limits<V>::quiet_NaN(),
                         -std::numeric_limits<V>::quiet_NaN(),
                         std::numeric_limits<V>::infinity(),
                         -std::numeric_limits<V>::infinity(),
                         V(-0.0),
                         V(0)};
        return odd[draw(6)];
      }
      return static_cast<V>(draw(chance(2) ? 4 : 1000)) / V(8) - V(1);  // few values: ties
    };
    c.weight.push_back(value());
    c.score.push_back(value());
  }
  // A gate chooses no expert twice.
  for (std::int64_t t = 0; t < T && !most.hostile; ++t)
    for (std::int64_t i = in.first_pair(t); i < in.first_pair(t + 1); ++i)
      if (i - in.first_pair(t) >= E) {
        c.expert[size(i)] = moe::no_candidate;
      } else if (i > in.first_pair(t)) {
        c.expert[size(i)] = (c.expert[size(i - 1)] + 1) % E;
      }
  in.expert = c.expert.data();
  in.weight = c.weight.data();
  if (chance(2)) in.score = c.score.data();

  // Tokens.
  if (chance(2)) {
    for (int t = 0; t < T; ++t) c.live.push_back(chance(5) ? 0 : 1);
    in.tokens.live = c.live.data();
  }
  if (sources > 1) {
    for (int t = 0; t < T; ++t)
      c.source.push_back(most.hostile && chance(20) ? static_cast<int>(draw(3)) * sources - sources
                                                    : static_cast<int>(draw(size(sources))));
    in.tokens.source = c.source.data();
  }
  if (chance(2)) {
    for (int t = 0; t < T; ++t) c.ids.push_back(static_cast<std::int64_t>(draw(1000)) * 7919);
    in.tokens.ids = c.ids.data();
  }
  in.tokens.seed = draw(100);
  in.tokens.step = draw(100);
  in.tokens.training = chance(2);

  // Experts. Replicas are dealt out in a shuffled order; some physical experts stay unused.
  int P = E;
  if (chance(2)) {
    for (int e = 0; e < E; ++e) c.visible.push_back(chance(6) ? 0 : 1);
    c.map.visible = c.visible.data();
  }
  if (chance(2)) {
    for (int e = 0; e < E; ++e)
      c.kind.push_back(chance(4) ? static_cast<moe::expert_kind>(1 + draw(4))
                                 : moe::expert_kind::computed);
    c.map.kind = c.kind.data();
  }
  if (chance(2)) {
    c.physical_begin.push_back(0);
    for (int e = 0; e < E; ++e)
      c.physical_begin.push_back(c.physical_begin.back() + 1 + static_cast<std::int32_t>(draw(3)));
    P = c.physical_begin.back() + static_cast<int>(draw(3));
    for (int p = 0; p < P; ++p) c.physical.push_back(p);
    for (int p = P; p > 1; --p)
      std::swap(c.physical[size(p - 1)], c.physical[draw(static_cast<std::uint32_t>(p))]);
    c.map.physical_begin = c.physical_begin.data();
    c.map.physical = c.physical.data();
    c.map.P = P;
  }

  // Rules.
  moe::table_rules& rules = c.rules;
  rules.rows = static_cast<moe::layout>(draw(3));
  rules.rank = static_cast<moe::order>(draw(2));
  rules.when_full = static_cast<moe::overflow>(draw(4));
  rules.align = static_cast<int>(1 + draw(5));
  double const factor = (1 + draw(12)) / 8.0;
  switch (draw(8)) {
    case 0:
      rules.cap = moe::capacity::dropless(static_cast<int>(1 + draw(4)));
      break;
    case 1:
      rules.cap = moe::capacity::fixed(1 + draw(8));
      break;
    case 2:
      rules.cap = moe::capacity::deepspeed(
          {.factor = factor, .eval_factor = factor / 2, .min_capacity = draw(5)});
      break;
    case 3:
      rules.cap = moe::capacity::tutel(factor, static_cast<int>(1 + draw(4)));
      break;
    case 4:
      rules.cap = moe::capacity::tutel(0, static_cast<int>(1 + draw(4)));
      break;
    case 5:
      rules.cap = moe::capacity::tutel(-factor, static_cast<int>(1 + draw(4)));
      break;
    case 6:
      rules.cap = moe::capacity::gshard({.factor = factor, .eval_factor = factor});
      break;
    default:
      rules.cap = moe::capacity::switch_transformer(
          {.factor = factor, .eval_factor = factor, .min_capacity = draw(5)});
  }

  c.shape = {.T = T + static_cast<int>(draw(3)),
             .K = K + static_cast<int>(draw(2)),
             .E = E + (most.hostile ? static_cast<int>(draw(2)) : 0),
             .P = P + 1,
             .sources = sources};
  c.shape.max_rows = moe::max_rows(rules, c.shape);
  if (most.hostile && chance(4))
    c.shape.max_rows = draw(static_cast<std::uint32_t>(c.shape.max_rows) + 1);
}

/// The first law of tables that does not hold, or nothing.
template <class V>
std::string broken_law(moe::basic_routing<V> const& in, moe::table_rules const& rules,
                       moe::expert_map const& map, moe::routing_table const& table) {
  moe::table_counts const& counts = *table.counts;
  std::int64_t const pairs = in.pairs();
  auto const law = [](char const* what, std::int64_t at) {
    return std::string(what) + " (at " + std::to_string(at) + ")";
  };
  if (table.T != in.T || table.K != in.K || table.E != in.E)
    return "the table has the routing's shape";

  std::int64_t kept = 0, without_expert = 0;
  for (std::int64_t t = 0; t < in.T; ++t) {
    bool const part = in.tokens.is_live(t) && !(in.first_pair(t) < in.first_pair(t + 1) &&
                                                in.expert[in.first_pair(t)] == moe::invalid_token);
    for (std::int64_t i = in.first_pair(t); i < in.first_pair(t + 1); ++i) {
      std::int32_t const row = table.row_of[i];
      if (!part) {
        ++without_expert;
        if (row != moe::dropped_row) return law("masked and invalid tokens have no row", i);
      }
      if (row >= table.max_rows) return law("rows are below max_rows", i);
      if (row >= 0) {
        ++kept;
        if (table.pair_of[row] != i) return law("pair_of is the inverse of row_of", i);
        int const e = in.expert[i];
        if (e < 0 || e >= in.E || !map.is_visible(e) ||
            map.kind_of(e) != moe::expert_kind::computed)
          return law("only visible computed experts take rows", i);
        int const s = in.tokens.source == nullptr ? 0 : in.tokens.source[t];
        bool mine = false;
        for (int r = 0; r < map.replicas(e); ++r) {
          std::int64_t const q = static_cast<std::int64_t>(map.replica(e, r)) * table.sources + s;
          mine = mine || (row >= table.begin[q] && row < table.begin[q] + table.used[q]);
        }
        if (!mine) return law("a pair's row is in a segment of its expert and source", i);
      }
    }
  }
  if (kept != counts.kept) return law("counts.kept", kept);
  if (pairs != counts.kept + counts.uncomputed + counts.dropped + counts.beyond_max_rows +
                   counts.hidden + counts.missing + counts.out_of_range + without_expert)
    return law("counts add up to all pairs", pairs);

  int const segments = table.segments();
  std::int64_t filled = 0;
  if (table.begin[0] != 0) return "the first segment starts at row 0";
  for (int q = 0; q < segments; ++q) {
    std::int64_t const first = table.begin[q], end = first + table.used[q],
                       next = table.begin[q + 1];
    if (table.used[q] < 0 || end > next) return law("a segment ends before the next one starts", q);
    if (table.used[q] > counts.capacity) return law("a segment has at most C rows", q);
    if (rules.rows == moe::layout::packed && end != next) return law("packed has no padding", q);
    if (rules.rows == moe::layout::padded && next < table.max_rows &&
        next - first != counts.capacity)
      return law("padded segments have C rows", q);
    if (rules.rows == moe::layout::aligned && next < table.max_rows && next % rules.align != 0)
      return law("aligned segments start at multiples", q);
    for (std::int64_t r = first; r < end; ++r) {
      std::int32_t const i = table.pair_of[r];
      if (i < 0 || i >= pairs || table.row_of[i] != r)
        return law("row_of is the inverse of pair_of", r);
    }
    for (std::int64_t r = end; r < next; ++r)
      if (table.pair_of[r] != -1) return law("padding has no pair", r);
    filled += table.used[q];
  }
  if (filled != counts.kept) return law("used adds up to kept", filled);
  if (table.begin[segments] != counts.rows || counts.rows > table.max_rows)
    return "begin ends at rows";
  for (std::int64_t r = counts.rows; r < table.max_rows; ++r)
    if (table.pair_of[r] != -1) return law("rows beyond the last have no pair", r);

  // Rank order inside segments. Batch priority ranks by scores, which the reference checks.
  if (rules.when_full != moe::overflow::batch_prioritised) {
    std::vector<std::int64_t> rank(static_cast<std::size_t>(pairs));
    for (std::int64_t t = 0; t < in.T; ++t)
      for (std::int64_t i = in.first_pair(t); i < in.first_pair(t + 1); ++i)
        rank[static_cast<std::size_t>(i)] =
            rules.rank == moe::order::token_major ? i : (i - in.first_pair(t)) * in.T + t;
    for (int q = 0; q < segments; ++q)
      for (int x = 1; x < table.used[q]; ++x)
        if (rank[static_cast<std::size_t>(table.pair_of[table.begin[q] + x - 1])] >=
            rank[static_cast<std::size_t>(table.pair_of[table.begin[q] + x])])
          return law("rows of a segment are in rank order", q);
  }

  // Replicas of one expert get the same number of rows, the first ones one more.
  if (counts.beyond_max_rows == 0)
    for (int e = 0; e < in.E; ++e)
      for (int s = 0; s < table.sources; ++s)
        for (int r = 1; r < map.replicas(e); ++r) {
          auto const used = [&](int replica) {
            return table
                .used[static_cast<std::int64_t>(map.replica(e, replica)) * table.sources + s];
          };
          if (used(r) > used(r - 1) || used(0) - used(r) > 1)
            return law("replicas split a load evenly", e);
        }
  return {};
}

}  // namespace moe_test
