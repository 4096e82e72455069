// The deduplicated strategy: a token crosses to another node once, and is handed out there.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// Two hops. A token that is wanted by any ranks of another node goes to one of them, once: its pilot.
/// That rank hands it on to each of those that want it. On the way back it adds up what they give, and
/// one row returns.
///
/// G N (N - 1) messages between nodes, as `two_hop`, and at most one row for each token and node. Rank
/// (n, g) sends to rank g of the other node, modulo its size.
/// Source. Hwang et al., "X-MoE", 2025 (arXiv 2508.13337), redundancy-bypassing dispatch; DeepEP.
struct deduplicated {};

namespace detail {

/// Who hands on to the ranks of `node` what `source`, of another one, has for them.
inline int forwarder(topology const& ranks, int source, int node) {
  return ranks.first(node) + ranks.local(source) % ranks.node_size(node);
}

}  // namespace detail

/// One rank's deduplicated plan of tokens: input slot 0 holds its tokens. The output slots, one for each
/// index, stand in the order in which messages bring them; `plan.output` names them.
/// @throws precondition_error if `rank` is not in `ranks`.
/// @cost  O(R G) for nodes of G ranks.
inline exchange_plan make_token_plan(deduplicated, topology const& ranks, int rank,
                                     call_site site = call_site::here()) {
  int const index = ranks.index_of(rank);
  expects(index >= 0, "make_token_plan: rank is in the topology", site, {{"rank", rank}});
  int const node = ranks.node(index), G = ranks.node_size(node), N = ranks.nodes();
  int const first = ranks.first(node);
  exchange_plan plan;
  plan.rank = rank;
  plan.epoch = ranks.epoch();
  plan.buffers = {1, ranks.size()};
  plan.input = {{index, 0, 0, ranks.size()}};
  auto const select = [](std::vector<row_move>& moves, slot_at from, slot_at to, int source,
                         int destination, int span) {
    moves.push_back({from, to, 1, row_action::select, {source, destination, 0, span}});
  };

  // handed_on[b]: what rank b of this node hands on, its own tokens first.
  std::vector<std::vector<int>> handed_on;
  std::vector<int> block = {0};  // of the output: the first slot that rank b of this node brings
  for (int b = 0; b < G; ++b) {
    std::vector<int> sources = {first + b};
    for (int n = 1; n < N; ++n) {  // node - 1, node - 2, ...: as their messages are sent
      int const m = (node - n + N) % N;
      for (int s = ranks.first(m); s < ranks.first(m) + ranks.node_size(m); ++s)
        if (detail::forwarder(ranks, s, node) == first + b) sources.push_back(s);
    }
    for (int const s : sources) plan.output.push_back({s, index, 0});
    block.push_back(block.back() + static_cast<int>(sources.size()));
    handed_on.push_back(std::move(sources));
  }
  int const own = index - first;
  auto const own_sources = handed_on[static_cast<std::size_t>(own)];

  // Between nodes. A rank that is alone in its node hands nothing on: its tokens arrive at once.
  int arrived = 1;
  if (N > 1) {
    exchange_phase between;
    int const pilots = detail::add_buffer(plan, N - 1);
    if (G > 1) arrived = detail::add_buffer(plan, static_cast<int>(own_sources.size()));
    for (int n = 1; n < N; ++n) {
      int const m = (node + n) % N;
      select(between.moves, {0, 0}, {pilots, n - 1}, index, ranks.first(m), ranks.node_size(m));
      between.sends.push_back({ranks.rank(detail::forwarder(ranks, index, m)), {pilots, n - 1}, 1});
    }
    for (std::size_t i = 1; i < own_sources.size(); ++i)
      between.receives.push_back({ranks.rank(own_sources[i]), {arrived, static_cast<int>(i)}, 1});
    plan.phases.push_back(std::move(between));
  }

  // Inside this one.
  exchange_phase within;
  auto const hand_on = [&](std::vector<row_move>& moves, int destination, slot_at to) {
    for (std::size_t i = 0; i < own_sources.size(); ++i)
      select(moves, i == 0 ? slot_at{0, 0} : slot_at{arrived, static_cast<int>(i)},
             {to.buffer, to.slot + static_cast<int>(i)}, own_sources[i], destination, 1);
  };
  int const count = static_cast<int>(own_sources.size());
  if (G > 1) {
    int const packed = detail::add_buffer(plan, (G - 1) * count);
    for (int g = 1; g < G; ++g) {
      int const to = (own + g) % G, from = (own - g + G) % G;
      slot_at const at{packed, (g - 1) * count};
      hand_on(within.moves, first + to, at);
      within.sends.push_back({ranks.rank(first + to), at, count});
      auto const f = static_cast<std::size_t>(from);
      within.receives.push_back({ranks.rank(first + from), {1, block[f]}, block[f + 1] - block[f]});
    }
    hand_on(within.moves, index, {1, block[static_cast<std::size_t>(own)]});
  } else {
    select(within.moves, {0, 0}, {1, 0}, index, index, 1);
  }
  plan.phases.push_back(std::move(within));
  return plan;
}

}  // namespace moe::inline MOE_ABI
