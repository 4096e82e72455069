// The routing table written down the slow and obvious way: what build_table is compared with.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include <moe/routing/build_table.hpp>

namespace moe_test {

struct reference_table {
  std::vector<std::int32_t> row_of, pair_of, begin, used, wanted;
  moe::table_counts counts;
};

/// Which pairs an expert that overflows likes best; empty: those of lowest rank.
template <class V>
using priority_of_pair =
    std::function<float(moe::basic_routing<V> const&, std::int64_t t, int j, int e)>;

template <class V>
priority_of_pair<V> priority_of(moe::overflow rule) {
  if (rule == moe::overflow::score)
    return [](moe::basic_routing<V> const& in, std::int64_t t, int j, int) {
      return static_cast<float>(in.rank_score(in.first_pair(t) + j));
    };
  if (rule == moe::overflow::random)
    return [](moe::basic_routing<V> const& in, std::int64_t t, int, int e) {
      return moe::uniform(in.tokens.at(t), moe::stream::overflow, static_cast<std::uint32_t>(e));
    };
  return {};
}

template <class V>
reference_table make_reference_table(moe::basic_routing<V> const& in, moe::table_rules const& rules,
                                     moe::expert_map const& map, int sources, std::int64_t max_rows,
                                     priority_of_pair<V> priority = {}) {
  struct pair {
    std::int64_t i, t;
    int j, e, s;
  };
  reference_table out;
  moe::table_counts& counts = out.counts;
  int const P = map.P == 0 ? in.E : map.P;
  auto const segments = static_cast<std::size_t>(P) * static_cast<std::size_t>(sources);
  constexpr float lowest = -std::numeric_limits<float>::infinity();
  if (!priority) priority = priority_of<V>(rules.when_full);

  // Tokens by priority of the batch.
  std::vector<std::int64_t> tokens;
  for (std::int64_t t = 0; t < in.T; ++t) tokens.push_back(t);
  auto const choices = [&](std::int64_t t) {
    return static_cast<int>(in.first_pair(t + 1) - in.first_pair(t));
  };
  if (rules.when_full == moe::overflow::batch_prioritised) {
    auto const best = [&](std::int64_t t) {
      // Below -inf: no score at all.
      double value = -std::numeric_limits<double>::infinity();
      bool any = false;
      for (std::int64_t i = in.first_pair(t); i < in.first_pair(t + 1); ++i) {
        float const score = static_cast<float>(in.rank_score(i));
        if (in.expert[i] < 0 || in.expert[i] >= in.E || std::isnan(score)) continue;
        value = std::max(value, static_cast<double>(score));
        any = true;
      }
      return std::pair(any, value);
    };
    std::stable_sort(tokens.begin(), tokens.end(),
                     [&](std::int64_t a, std::int64_t b) { return best(a) > best(b); });
  }

  // Pairs that name an expert, in rank order.
  std::vector<pair> ranked;
  auto const visit = [&](std::int64_t t, int j) {
    if (j >= choices(t)) return;
    std::int64_t const i = in.first_pair(t) + j;
    if (!in.tokens.is_live(t) || in.expert[in.first_pair(t)] == moe::invalid_token) return;
    int const s = in.tokens.source == nullptr ? 0 : in.tokens.source[t];
    if (s < 0 || s >= sources) {
      ++counts.out_of_range;
    } else if (in.expert[i] == moe::no_candidate) {
      ++counts.missing;
    } else if (in.expert[i] < 0 || in.expert[i] >= in.E) {
      ++counts.out_of_range;
    } else if (!map.is_visible(in.expert[i])) {
      ++counts.hidden;
    } else {
      ranked.push_back({i, t, j, in.expert[i], s});
    }
  };
  if (rules.rank == moe::order::token_major) {
    for (std::int64_t t : tokens)
      for (int j = 0; j < in.K; ++j) visit(t, j);
  } else {
    for (int j = 0; j < in.K; ++j)
      for (std::int64_t t : tokens) visit(t, j);
  }
  for (std::int64_t t = 0; t < in.T; ++t) {
    if (!in.tokens.is_live(t))
      ++counts.masked_tokens;
    else if (choices(t) > 0 && in.expert[in.first_pair(t)] == moe::invalid_token)
      ++counts.invalid_tokens;
  }

  out.row_of.assign(static_cast<std::size_t>(in.pairs()), moe::dropped_row);
  out.wanted.assign(static_cast<std::size_t>(in.E), 0);
  for (pair const& p : ranked) ++out.wanted[static_cast<std::size_t>(p.e)];

  // Loads and capacity.
  std::int64_t max_load = 0;
  for (int e = 0; e < in.E; ++e)
    for (int s = 0; s < sources; ++s) {
      if (map.kind_of(e) != moe::expert_kind::computed || !map.is_visible(e)) continue;
      std::int64_t load = 0;
      for (pair const& p : ranked) load += p.e == e && p.s == s;
      std::int64_t const n = map.replicas(e);
      max_load = std::max(max_load, load / n + (load % n != 0));
    }
  std::int64_t const C = moe::rows_of(rules.cap, in.T, in.E, in.K, in.tokens.training, max_load);
  counts.capacity = C;

  // Who is kept, and in which segment.
  std::vector<std::vector<std::int64_t>> rows(segments);
  for (int e = 0; e < in.E; ++e)
    for (int s = 0; s < sources; ++s) {
      std::vector<pair> list;
      for (pair const& p : ranked)
        if (p.e == e && p.s == s) list.push_back(p);
      if (!map.is_visible(e)) continue;
      if (map.kind_of(e) != moe::expert_kind::computed) {
        counts.uncomputed += static_cast<std::int64_t>(list.size());
        for (pair const& p : list)
          out.row_of[static_cast<std::size_t>(p.i)] = moe::no_row(map.kind_of(e));
        continue;
      }
      std::vector<std::size_t> liked(list.size());
      for (std::size_t x = 0; x < list.size(); ++x) liked[x] = x;
      if (priority) {
        std::vector<float> value;
        for (pair const& p : list) {
          float const v = priority(in, p.t, p.j, p.e);
          value.push_back(std::isnan(v) ? lowest : v);
        }
        std::stable_sort(liked.begin(), liked.end(),
                         [&](std::size_t a, std::size_t b) { return value[a] > value[b]; });
      }
      auto const keep = static_cast<std::size_t>(
          std::min<std::int64_t>(static_cast<std::int64_t>(list.size()), C * map.replicas(e)));
      counts.dropped += static_cast<std::int64_t>(list.size() - keep);
      liked.resize(keep);
      std::sort(liked.begin(), liked.end());
      int turn = 0;
      for (std::size_t x : liked) {
        int const q = map.replica(e, turn) * sources + s;
        rows[static_cast<std::size_t>(q)].push_back(list[x].i);
        turn = (turn + 1) % map.replicas(e);
      }
    }

  // Rows.
  out.pair_of.assign(static_cast<std::size_t>(max_rows), -1);
  std::int64_t next = 0;
  for (std::size_t q = 0; q < segments; ++q) {
    out.begin.push_back(static_cast<std::int32_t>(std::min(next, max_rows)));
    std::int64_t row = next;
    std::int32_t used = 0;
    for (std::int64_t i : rows[q]) {
      if (row < max_rows) {
        out.row_of[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(row);
        out.pair_of[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(i);
        ++counts.kept;
        ++used;
      } else {
        ++counts.beyond_max_rows;
      }
      ++row;
    }
    out.used.push_back(used);
    if (rules.rows == moe::layout::padded) row = next + C;
    if (rules.rows == moe::layout::aligned)
      while (row % rules.align != 0) ++row;
    next = row;
  }
  counts.rows = std::min(next, max_rows);
  out.begin.push_back(static_cast<std::int32_t>(counts.rows));
  return out;
}

}  // namespace moe_test
