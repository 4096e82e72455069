// Which ranks share a node, and which of them are alive: what strategies make plans from.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Which ranks of a communicator take part. Ranks have to agree on it before they use it: a plan
/// carries the epoch, and counts that were sent under another one are refused.
struct membership {
  std::uint64_t epoch = 0;          ///< Changes whenever `alive` does.
  std::vector<std::uint8_t> alive;  ///< [R]; 0 for a rank that takes no part.
};

/// R ranks on nodes, those of one node consecutive; nodes may be of different sizes.
///
/// Strategies speak of the *index* of a rank, in [0, R) without gaps; plans name peers by `rank`, as
/// the communicator counts them. Both are the same until a rank has been left out.
class topology {
 public:
  /// `nodes` nodes of G ranks each.
  /// @throws precondition_error unless nodes >= 1 and G >= 1.
  static topology even(int nodes, int G, call_site site = call_site::here()) {
    expects(nodes >= 1 && G >= 1, "topology::even: nodes >= 1 and G >= 1", site,
            {{"nodes", nodes}, {"G", G}});
    return of_nodes(std::vector<int>(static_cast<std::size_t>(nodes), G), site);
  }

  /// Node n has sizes[n] ranks, the first node rank 0, 1, ...
  /// @throws precondition_error unless there is a node and each has a rank.
  static topology of_nodes(vector_view<int const> sizes, call_site site = call_site::here()) {
    expects(sizes.size() >= 1, "topology::of_nodes: at least one node", site);
    topology t;
    for (int const G : sizes) {
      expects(G >= 1, "topology::of_nodes: at least one rank in each node", site, {{"ranks", G}});
      for (int g = 0; g < G; ++g) t.add(t.size(), t.nodes());
      t.close_node();
    }
    return t;
  }

  /// The ranks that are alive, on the nodes that still have some.
  /// @throws precondition_error unless alive is [R] of a topology that nothing was left out of, and
  ///         somebody is alive.
  topology surviving(membership const& members, call_site site = call_site::here()) const {
    expects(static_cast<int>(members.alive.size()) == size(), "topology::surviving: alive is [R]",
            site, {{"alive", members.alive.size()}, {"R", size()}});
    topology t;
    t.epoch_ = members.epoch;
    for (int n = 0; n < nodes(); ++n) {
      int const before = t.size();
      for (int i = first(n); i < first(n) + node_size(n); ++i)
        if (members.alive[static_cast<std::size_t>(rank(i))] != 0) t.add(rank(i), t.nodes());
      if (t.size() > before) t.close_node();
    }
    expects(t.size() > 0, "topology::surviving: somebody is alive", site);
    return t;
  }

  /// The same ranks in groups of `group` consecutive ones, the last possibly smaller, instead of nodes.
  /// @throws precondition_error if group < 1.
  topology grouped(int group, call_site site = call_site::here()) const {
    expects(group >= 1, "topology::grouped: group >= 1", site, {{"group", group}});
    topology t;
    t.epoch_ = epoch_;
    for (int i = 0; i < size(); ++i) {
      t.add(rank(i), t.nodes());
      if ((i + 1) % group == 0 || i + 1 == size()) t.close_node();
    }
    return t;
  }

  int size() const noexcept { return static_cast<int>(rank_.size()); }
  int nodes() const noexcept { return static_cast<int>(first_.size()) - 1; }
  std::uint64_t epoch() const noexcept { return epoch_; }

  int node(int index) const noexcept { return node_[static_cast<std::size_t>(index)]; }
  int first(int node) const noexcept { return first_[static_cast<std::size_t>(node)]; }
  int node_size(int node) const noexcept { return first(node + 1) - first(node); }
  /// Place among the ranks of its node.
  int local(int index) const noexcept { return index - first(node(index)); }
  /// What the communicator calls it.
  int rank(int index) const noexcept { return rank_[static_cast<std::size_t>(index)]; }
  /// -1 for a rank that was left out. O(R).
  int index_of(int rank) const noexcept {
    for (int i = 0; i < size(); ++i)
      if (this->rank(i) == rank) return i;
    return -1;
  }

 private:
  topology() = default;
  void add(int rank, int node) {
    rank_.push_back(rank);
    node_.push_back(node);
  }
  void close_node() { first_.push_back(size()); }

  std::uint64_t epoch_ = 0;
  std::vector<int> rank_;         // [R]
  std::vector<int> node_;         // [R]
  std::vector<int> first_ = {0};  // [nodes + 1]
};

}  // namespace moe::inline MOE_ABI
