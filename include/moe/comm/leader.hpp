// The strategy of leaders: one rank of each node speaks for all of them.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// On N nodes of G ranks, N (N - 1) messages between nodes, each G^2 times as long: the fewest, but
/// one rank carries the traffic of its node. Ranks of one node talk directly, in the first hop.
struct leader {
  constexpr int hops() const noexcept { return 3; }
  int holder(topology const& ranks, int hop, int source, int destination) const noexcept {
    if (ranks.node(source) == ranks.node(destination)) return destination;
    return ranks.first(ranks.node(hop == 1 ? source : destination));
  }
};
static_assert(exchange_path<leader>);

}  // namespace moe::inline MOE_ABI
