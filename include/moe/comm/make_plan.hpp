// Plans of all-to-alls from the way that rows take: which rank holds them after each hop.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Makes the plan of one rank, hop by hop: what it holds, and where.
class plan_builder {
 public:
  /// Rows (source, destination) that leave for `peer` or come from it; all are indices.
  struct transit {
    int peer, destination, source;
  };

  plan_builder(topology const& ranks, int index) : ranks_(&ranks), R_(ranks.size()), index_(index) {
    plan_.rank = ranks.rank(index);
    plan_.epoch = ranks.epoch();
    plan_.buffers = {R_, R_};
    for (int i = 0; i < R_; ++i) {
      plan_.input.push_back({index, i, 0});
      plan_.output.push_back({i, index, 0});
      held_.push_back({{i, index}, {0, i}});
    }
  }

  void leaves(int peer, int source, int destination) {
    departures_.push_back({peer, destination, source});
  }
  void comes(int peer, int source, int destination) {
    arrivals_.push_back({peer, destination, source});
  }

  /// Everything that leaves or comes in this hop has been told, by destination and then by source.
  void end_hop() {
    exchange_phase phase;
    // Rank i starts with its neighbour i + 1, so that not all send to the same rank first.
    int packed_buffer = -1;
    each_peer(departures_, +1, [&](int peer, transit const* first, int count) {
      slot_at at = where(first[0]);
      bool in_place = true;
      for (int i = 1; i < count && in_place; ++i)
        in_place = where(first[i]) == slot_at{at.buffer, at.slot + i};
      if (!in_place) {
        if (packed_buffer < 0) packed_buffer = add_buffer(plan_, 0);
        int& slots = plan_.buffers[static_cast<std::size_t>(packed_buffer)];
        at = {packed_buffer, slots};
        for (int i = 0; i < count; ++i)
          append_move(phase.moves, {where(first[i]), {packed_buffer, slots++}, 1});
      }
      phase.sends.push_back({ranks_->rank(peer), at, count});
    });

    int staged_buffer = -1;
    std::vector<located> received;
    each_peer(arrivals_, -1, [&](int peer, transit const* first, int count) {
      slot_at at{1, first[0].source};
      bool in_place = true;
      for (int i = 0; i < count && in_place; ++i)
        in_place = first[i].destination == index_ && first[i].source == first[0].source + i;
      if (!in_place) {
        if (staged_buffer < 0) staged_buffer = add_buffer(plan_, 0);
        int& slots = plan_.buffers[static_cast<std::size_t>(staged_buffer)];
        at = {staged_buffer, slots};
        slots += count;
      }
      for (int i = 0; i < count; ++i)
        received.push_back({{first[i].destination, first[i].source}, {at.buffer, at.slot + i}});
      phase.receives.push_back({ranks_->rank(peer), at, count});
    });
    // What has left is never looked for again, so it may stay in the list.
    held_.insert(held_.end(), received.begin(), received.end());
    std::sort(held_.begin(), held_.end());
    departures_.clear();
    arrivals_.clear();
    plan_.phases.push_back(std::move(phase));
  }

  exchange_plan finish() && {
    for (int s = 0; s < R_; ++s) {
      slot_at const at = where({0, index_, s});
      if (at.buffer != 1) append_move(plan_.last, {at, {1, s}, 1});
    }
    return std::move(plan_);
  }

 private:
  struct located {
    std::pair<int, int> name;  // (destination, source)
    slot_at at;
    friend bool operator<(located const& a, located const& b) { return a.name < b.name; }
  };

  slot_at where(transit const& t) const {
    located const key{{t.destination, t.source}, {}};
    return std::lower_bound(held_.begin(), held_.end(), key)->at;
  }

  template <class F>
  void each_peer(std::vector<transit>& all, int direction, F const& f) const {
    auto const distance = [&](transit const& t) {
      return ((t.peer - index_) * direction + R_) % R_;
    };
    std::stable_sort(all.begin(), all.end(),
                     [&](transit const& a, transit const& b) { return distance(a) < distance(b); });
    for (std::size_t i = 0, last; i < all.size(); i = last) {
      for (last = i; last < all.size() && all[last].peer == all[i].peer;) ++last;
      f(all[i].peer, all.data() + i, static_cast<int>(last - i));
    }
  }

  topology const* ranks_;
  int R_;
  int index_;
  exchange_plan plan_;
  std::vector<located> held_;  // sorted
  std::vector<transit> departures_;
  std::vector<transit> arrivals_;
};

template <exchange_path Path>
int holder_after(Path const& path, topology const& ranks, int hop, int s, int d, call_site site) {
  if (hop == 0 || s == d) return s;
  if (hop == path.hops()) return d;
  int const holder = path.holder(ranks, hop, s, d);
  expects(holder >= 0 && holder < ranks.size(), "make_plan: holder is in [0, R)", site,
          {{"holder", holder}, {"hop", hop}, {"source", s}, {"destination", d}});
  return holder;
}

/// The plans of ranks [first, last).
template <exchange_path Path>
std::vector<exchange_plan> make_plans(Path const& path, topology const& ranks, int first, int last,
                                      call_site site) {
  expects(path.hops() >= 1, "make_plan: at least one hop", site, {{"hops", path.hops()}});
  std::vector<plan_builder> builders;
  for (int i = first; i < last; ++i) builders.emplace_back(ranks, i);
  auto const wanted = [&](int i) { return i >= first && i < last; };
  for (int hop = 1; hop <= path.hops(); ++hop) {
    for (int d = 0; d < ranks.size(); ++d)
      for (int s = 0; s < ranks.size(); ++s) {
        int const from = holder_after(path, ranks, hop - 1, s, d, site);
        int const to = holder_after(path, ranks, hop, s, d, site);
        if (from == to) continue;
        if (wanted(from)) builders[static_cast<std::size_t>(from - first)].leaves(to, s, d);
        if (wanted(to)) builders[static_cast<std::size_t>(to - first)].comes(from, s, d);
      }
    for (plan_builder& b : builders) b.end_hop();
  }
  std::vector<exchange_plan> plans;
  plans.reserve(builders.size());
  for (plan_builder& b : builders) plans.push_back(std::move(b).finish());
  return plans;
}

}  // namespace detail

/// One rank's plan of an all-to-all: input slot d holds the rows for index d, output slot s those from
/// index s. A rank sends at most one message to each other in a hop. Rows that do not lie side by side
/// are packed before they are sent; what a rank keeps stays where it is.
///
/// @param path  A strategy: `flat`, `two_hop`, `leader`, `grid`, or any `exchange_path`.
/// @param rank  As the communicator counts.
/// @throws precondition_error if `rank` is not in `ranks`, or the path leads outside.
/// @cost  O(R^2 hops) time, once: some 30 ms for 1024 ranks.
template <exchange_path Path>
exchange_plan make_plan(Path const& path, topology const& ranks, int rank,
                        call_site site = call_site::here()) {
  int const index = ranks.index_of(rank);
  expects(index >= 0, "make_plan: rank is in the topology", site, {{"rank", rank}});
  return std::move(detail::make_plans(path, ranks, index, index + 1, site)[0]);
}

/// The plans of all ranks, by index: for `verify_plans`, `count_traffic` and simulations. O(R^2 hops).
template <exchange_path Path>
std::vector<exchange_plan> make_plans(Path const& path, topology const& ranks,
                                      call_site site = call_site::here()) {
  return detail::make_plans(path, ranks, 0, ranks.size(), site);
}

}  // namespace moe::inline MOE_ABI
