// The strategy of grids: one hop for each of any number of levels, say racks, nodes and sockets.
// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <cstddef>

#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// Ranks in a grid, the last side the fastest: rank (x, y, z) of sides {X, Y, Z} is (x Y + y) Z + z. Hop i
/// sets coordinate i to that of the destination, so a rank sends (X - 1) + (Y - 1) + (Z - 1) messages, and
/// those between the outermost groups first. Sides {N, G} are `two_hop`, inter first, but rows inside
/// a node wait for the second hop, where they share messages with those from other nodes.
///
/// @throws precondition_error, from make_plan, unless the product of the sides is R.
/// Example: moe::grid<3>{{4, 8, 2}} for 4 racks of 8 nodes of 2 ranks.
template <int Levels>
struct grid {
  std::array<int, static_cast<std::size_t>(Levels)> sides;

  constexpr int hops() const noexcept { return Levels; }
  int holder(topology const& ranks, int hop, int source, int destination) const {
    int product = 1, inside = 1;  // inside: ranks that differ only in the sides that follow
    for (int i = 0; i < Levels; ++i) {
      int const side = sides[static_cast<std::size_t>(i)];
      product *= side;
      if (i >= hop) inside *= side;
    }
    expects(product == ranks.size() && inside >= 1, "grid: the product of the sides is R",
            call_site::here(), {{"product", product}, {"R", ranks.size()}});
    return destination / inside * inside + source % inside;
  }
};
static_assert(exchange_path<grid<2>>);

}  // namespace moe::inline MOE_ABI
