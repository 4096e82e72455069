// What plans cost: messages, rows and copies, counted, and a time by a model of links.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/slot_names.hpp>
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

/// Messages of one class of links, and the rows in them.
struct link_rows {
  std::int64_t messages = 0;
  double rows = 0;
};

/// What an exchange moves, in rows, where slots have different numbers of them.
struct exchange_rows {
  link_rows within_nodes;
  link_rows between_nodes;
  std::int64_t copies = 0;
  double copied_rows = 0;  ///< Moved in memory, sums and zeros included.
};

namespace detail {

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

/// Adds up one rank's traffic. `rows_in(slot_at)` is the size of a slot.
template <class RowsIn>
class rank_traffic {
 public:
  rank_traffic(topology const& ranks, std::vector<int> const& index_of, int rank,
               RowsIn const& rows_in)
      : ranks_(&ranks), index_of_(&index_of), node_(node_of(rank)), rows_in_(rows_in) {}

  void add_moves(std::vector<row_move> const& moves) {
    for (row_move const& m : moves) {
      bool const all_of_target = m.action != row_action::add && m.action != row_action::scatter;
      ++sum_.copies;
      sum_.copied_rows += rows(all_of_target ? m.to : m.from, m.count);
    }
  }
  void add_sends(std::vector<message> const& sends) {
    for (message const& m : sends) {
      double const n = rows(m.at, m.count);
      if (n <= 0) continue;  // nobody sends it
      link_rows& link = node_of(m.peer) == node_ ? sum_.within_nodes : sum_.between_nodes;
      ++link.messages;
      link.rows += n;
    }
  }

  exchange_rows const& sum() const { return sum_; }

 private:
  int node_of(int rank) const { return ranks_->node((*index_of_)[static_cast<std::size_t>(rank)]); }
  double rows(slot_at at, int count) const {
    double n = 0;
    for (int i = 0; i < count; ++i) n += rows_in_({at.buffer, at.slot + i});
    return n;
  }

  topology const* ranks_;
  std::vector<int> const* index_of_;
  int node_;
  RowsIn rows_in_;
  exchange_rows sum_;
};

inline void add(exchange_rows& sum, exchange_rows const& one) {
  sum.within_nodes.messages += one.within_nodes.messages;
  sum.within_nodes.rows += one.within_nodes.rows;
  sum.between_nodes.messages += one.between_nodes.messages;
  sum.between_nodes.rows += one.between_nodes.rows;
  sum.copies += one.copies;
  sum.copied_rows += one.copied_rows;
}

/// All ranks together. `rows_in(plan, slot_at)`: the size of a slot, by place of the plan.
template <class RowsIn>
exchange_rows count_rows(vector_view<exchange_plan const> plans, topology const& ranks,
                         RowsIn const& rows_in) {
  exchange_rows sum;
  std::vector<int> const index_of = indices(ranks);
  for (std::int64_t p = 0; p < plans.size(); ++p) {
    rank_traffic one(ranks, index_of, plans[p].rank, [&](slot_at at) { return rows_in(p, at); });
    for (exchange_phase const& phase : plans[p].phases) {
      one.add_moves(phase.moves);
      one.add_sends(phase.sends);
    }
    one.add_moves(plans[p].last);
    add(sum, one.sum());
  }
  return sum;
}

}  // namespace detail

/// What the ranks of `plans` send and copy together, by class of link.
/// @param ranks  The nodes that links are between; a strategy may have used other groups.
/// @pre   verify_plans accepts the plans.
inline exchange_traffic count_traffic(vector_view<exchange_plan const> plans,
                                      topology const& ranks) {
  exchange_rows const all =
      detail::count_rows(plans, ranks, [](std::int64_t, slot_at) { return 1.0; });
  auto const slots = [](double n) { return static_cast<std::int64_t>(n); };
  return {{all.within_nodes.messages, slots(all.within_nodes.rows)},
          {all.between_nodes.messages, slots(all.between_nodes.rows)},
          all.copies,
          slots(all.copied_rows)};
}

/// The same for slots of different sizes. Messages without rows are not sent, and not counted.
/// @param names    Of the same plans.
/// @param rows_of  `rows_of(piece)`: the rows of a slot of that name; see `expected_rows`.
template <class RowsOf>
exchange_rows count_traffic(vector_view<exchange_plan const> plans, topology const& ranks,
                            slot_names const& names, RowsOf const& rows_of) {
  return detail::count_rows(
      plans, ranks, [&](std::int64_t p, slot_at at) -> double { return rows_of(names(p, at)); });
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

namespace detail {

/// `rows_in(plan, slot_at)` as in count_rows.
template <class RowsIn>
double modelled_seconds(vector_view<exchange_plan const> plans, topology const& ranks,
                        machine_speed const& machine, double bytes_per_row, RowsIn const& rows_in) {
  std::vector<int> const index_of = indices(ranks);
  auto const sending = [&](link_rows const& t, link_speed const& link) {
    if (t.messages == 0) return 0.0;
    return link.latency_seconds + static_cast<double>(t.messages) * link.seconds_per_message +
           t.rows * bytes_per_row / link.bytes_per_second;
  };
  // Of the slowest rank: one phase, or what comes after the last.
  auto const slowest = [&](auto const& add_step) {
    double seconds = 0;
    for (std::int64_t p = 0; p < plans.size(); ++p) {
      rank_traffic t(ranks, index_of, plans[p].rank, [&](slot_at at) { return rows_in(p, at); });
      add_step(plans[p], t);
      seconds = std::max(seconds,
                         2 * t.sum().copied_rows * bytes_per_row / machine.copied_bytes_per_second +
                             std::max(sending(t.sum().within_nodes, machine.within_nodes),
                                      sending(t.sum().between_nodes, machine.between_nodes)));
    }
    return seconds;
  };
  double total = slowest([](exchange_plan const& plan, auto& t) { t.add_moves(plan.last); });
  for (std::size_t i = 0; !plans.empty() && i < plans[0].phases.size(); ++i)
    total += slowest([i](exchange_plan const& plan, auto& t) {
      t.add_moves(plan.phases[i].moves);
      t.add_sends(plan.phases[i].sends);
    });
  return total;
}

}  // namespace detail

/// The time of an exchange by the model: in each phase the slowest rank's
/// moves, then its slower class of links, latency + messages * gap + bytes / bandwidth. A model: it knows
/// nothing of congestion.
///
/// @param plans  Where all ranks have as much to do, one rank's plan is enough.
/// @param bytes_per_slot  The same for all.
/// @pre   verify_plans accepts the plans of all ranks.
inline double modelled_seconds(vector_view<exchange_plan const> plans, topology const& ranks,
                               machine_speed const& machine, double bytes_per_slot) {
  return detail::modelled_seconds(plans, ranks, machine, bytes_per_slot,
                                  [](std::int64_t, slot_at) { return 1.0; });
}

/// The same for slots of different sizes.
/// @param names, rows_of  As in count_traffic.
template <class RowsOf>
double modelled_seconds(vector_view<exchange_plan const> plans, topology const& ranks,
                        machine_speed const& machine, double bytes_per_row, slot_names const& names,
                        RowsOf const& rows_of) {
  return detail::modelled_seconds(
      plans, ranks, machine, bytes_per_row,
      [&](std::int64_t p, slot_at at) -> double { return rows_of(names(p, at)); });
}

}  // namespace moe::inline MOE_ABI
