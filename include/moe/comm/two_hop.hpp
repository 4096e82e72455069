// The strategy of two hops: between nodes only ranks with the same place in their node talk.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

enum class first_hop : std::uint8_t {
  inter,  ///< Between nodes, then inside the destination's: rows can be shared out there.
  intra   ///< Inside the source's node, then between nodes ("2D").
};

/// On N nodes of G ranks, G N (N - 1) messages between nodes instead of G^2 N (N - 1), each G times as
/// long, and as many inside nodes: for small messages. Rank (n, g) hands rows for (m, b) to (m, g)
/// first (inter), or to (n, b) (intra); where nodes are smaller than g or b, modulo their size.
///
/// Source. Inter first: the node-aware exchange of MPI Advance; intra first: Hwang et al., "Tutel",
///         2022, and Rajbhandari et al., "DeepSpeed-MoE", 2022.
struct two_hop {
  first_hop order = first_hop::inter;

  constexpr int hops() const noexcept { return 2; }
  int holder(topology const& ranks, int, int source, int destination) const noexcept {
    bool const inter = order == first_hop::inter;
    int const node = ranks.node(inter ? destination : source);
    if (ranks.node(inter ? source : destination) == node) return destination;
    return ranks.first(node) + ranks.local(inter ? source : destination) % ranks.node_size(node);
  }
};
static_assert(exchange_path<two_hop>);

}  // namespace moe::inline MOE_ABI
