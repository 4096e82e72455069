// How the ranks of a communicator that is split learn who belongs together.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Tells all ranks this one's colour and key. `members`: the ranks of the same colour, ordered by key
/// and then by rank; none if the colour is negative.
template <communicator C>
outcome members_of_split(C& comm, int color, int key, deadline until, std::vector<int>& members) {
  struct entry {
    int color = 0, key = 0, rank = 0;
  };
  members.clear();
  std::vector<entry> all(static_cast<std::size_t>(comm.size()));
  entry const mine{color, key, comm.rank()};
  std::vector<outgoing> sends;
  std::vector<incoming> receives;
  for (int r = 0; r < comm.size(); ++r) {
    if (r == comm.rank()) continue;
    sends.push_back({reinterpret_cast<std::byte const*>(&mine), sizeof mine, r});
    receives.push_back(
        {reinterpret_cast<std::byte*>(&all[static_cast<std::size_t>(r)]), sizeof mine, r});
  }
  if (outcome const told = exchange_now(comm, sends, receives, until); !told) return told;
  if (color < 0) return {};
  all[static_cast<std::size_t>(comm.rank())] = mine;

  std::erase_if(all, [&](entry const& e) { return e.color != color; });
  std::stable_sort(all.begin(), all.end(),
                   [](entry const& a, entry const& b) { return a.key < b.key; });
  for (entry const& e : all) members.push_back(e.rank);
  return {};
}

}  // namespace detail

}  // namespace moe::inline MOE_ABI
