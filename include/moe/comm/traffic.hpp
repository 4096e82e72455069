// What plans cost: messages, rows and copies, counted, and a time by a model of links.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Messages of one class of links, and what is in them.
struct link_traffic {
  std::int64_t messages = 0;
  std::int64_t slots = 0;

  friend constexpr bool operator==(link_traffic const&, link_traffic const&) = default;
};

/// What an exchange moves, in slots: in rows, if each slot has one; times m, if each has m.
struct exchange_traffic {
  link_traffic within_nodes;
  link_traffic between_nodes;
  std::int64_t copies = 0;        ///< Local moves, each of slots that lie side by side.
  std::int64_t copied_slots = 0;  ///< Moved in memory, sums included.

  friend constexpr bool operator==(exchange_traffic const&, exchange_traffic const&) = default;
};

namespace detail {

inline void count_moves(std::vector<row_move> const& moves, exchange_traffic& sum) {
  for (row_move const& m : moves) {
    ++sum.copies;
    sum.copied_slots += m.count;
  }
}

inline void count_sends(exchange_phase const& phase, int index, std::vector<int> const& index_of,
                        topology const& ranks, exchange_traffic& sum) {
  for (message const& m : phase.sends) {
    int const peer = index_of[static_cast<std::size_t>(m.peer)];
    link_traffic& link =
        ranks.node(peer) == ranks.node(index) ? sum.within_nodes : sum.between_nodes;
    ++link.messages;
    link.slots += m.count;
  }
}

/// [highest rank + 1] index of each rank.
inline std::vector<int> indices(topology const& ranks) {
  std::vector<int> index_of;
  for (int i = 0; i < ranks.size(); ++i) {
    auto const rank = static_cast<std::size_t>(ranks.rank(i));
    if (index_of.size() <= rank) index_of.resize(rank + 1, -1);
    index_of[rank] = i;
  }
  return index_of;
}

}  // namespace detail

/// What the ranks of `plans` send and copy together, by class of link.
/// @param ranks  The nodes that links are between; a strategy may have used other groups.
/// @pre   verify_plans accepts the plans.
inline exchange_traffic count_traffic(vector_view<exchange_plan const> plans,
                                      topology const& ranks) {
  exchange_traffic sum;
  std::vector<int> const index_of = detail::indices(ranks);
  for (exchange_plan const& plan : plans) {
    int const index = index_of[static_cast<std::size_t>(plan.rank)];
    for (exchange_phase const& phase : plan.phases) {
      detail::count_moves(phase.moves, sum);
      detail::count_sends(phase, index, index_of, ranks, sum);
    }
    detail::count_moves(plan.last, sum);
  }
  return sum;
}

/// A class of links as one rank sees it.
struct link_speed {
  double latency_seconds = 0;
  double seconds_per_message = 0;
  double bytes_per_second = 1;
};

struct machine_speed {
  link_speed within_nodes;
  link_speed between_nodes;
  double copied_bytes_per_second = 1;  ///< Of the memory: a copied byte is read and written.
};

/// The time of an exchange by the model: in each phase the slowest rank's
/// moves, then its slower class of links, latency + messages * gap + bytes / bandwidth. A model: it knows
/// nothing of congestion.
///
/// @param bytes_per_slot  The same for all.
/// @pre   verify_plans accepts the plans.
inline double modelled_seconds(vector_view<exchange_plan const> plans, topology const& ranks,
                               machine_speed const& machine, double bytes_per_slot) {
  std::vector<int> const index_of = detail::indices(ranks);
  auto const copying = [&](exchange_traffic const& t) {
    return 2 * static_cast<double>(t.copied_slots) * bytes_per_slot /
           machine.copied_bytes_per_second;
  };
  auto const sending = [&](link_traffic const& t, link_speed const& link) {
    if (t.messages == 0) return 0.0;
    return link.latency_seconds + static_cast<double>(t.messages) * link.seconds_per_message +
           static_cast<double>(t.slots) * bytes_per_slot / link.bytes_per_second;
  };
  double seconds = 0, last = 0;
  std::size_t const phases = plans.empty() ? 0 : plans[0].phases.size();
  for (std::size_t i = 0; i < phases; ++i) {
    double slowest = 0;
    for (exchange_plan const& plan : plans) {
      exchange_traffic t;
      detail::count_moves(plan.phases[i].moves, t);
      detail::count_sends(plan.phases[i], index_of[static_cast<std::size_t>(plan.rank)], index_of,
                          ranks, t);
      slowest =
          std::max(slowest, copying(t) + std::max(sending(t.within_nodes, machine.within_nodes),
                                                  sending(t.between_nodes, machine.between_nodes)));
    }
    seconds += slowest;
  }
  for (exchange_plan const& plan : plans) {
    exchange_traffic t;
    detail::count_moves(plan.last, t);
    last = std::max(last, copying(t));
  }
  return seconds + last;
}

}  // namespace moe::inline MOE_ABI
