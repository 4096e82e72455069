// The sharded strategy: all ranks get all rows, and give back sums.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Every one of `peers` (ranks as the communicator counts) gets what all have: output slots are those
/// of the first one, then of the second, ...
/// @param names  [slots of all peers] what the output slots hold.
inline exchange_plan gather_all(std::vector<int> const& peers, int own, std::vector<piece> names) {
  int const count = static_cast<int>(peers.size());
  int const slots = static_cast<int>(names.size()) / count;
  exchange_plan plan;
  plan.rank = peers[static_cast<std::size_t>(own)];
  plan.buffers = {slots, slots * count};
  plan.input = {names.begin() + own * slots, names.begin() + (own + 1) * slots};
  plan.output = std::move(names);
  plan.phases.resize(1);
  for (int i = 1; i < count && slots > 0; ++i) {
    int const to = (own + i) % count, from = (own - i + count) % count;
    plan.phases[0].sends.push_back({peers[static_cast<std::size_t>(to)], {0, 0}, slots});
    plan.phases[0].receives.push_back(
        {peers[static_cast<std::size_t>(from)], {1, from * slots}, slots});
  }
  if (slots > 0) plan.last.push_back({{0, 0}, {1, own * slots}, slots});
  return plan;
}

}  // namespace detail

/// The way to experts that are sliced over all ranks: the rows of each rank, one input slot, go to all
/// ranks, where they are output slots in the order of ranks. No counts depend on the routing. Every
/// rank computes its slice for all rows; `transpose` is the way back, which sums what the slices give
/// (a reduce-scatter).
///
/// @throws precondition_error if rank is not in `ranks`.
inline exchange_plan make_sharded_plan(topology const& ranks, int rank,
                                       call_site site = call_site::here()) {
  int const index = ranks.index_of(rank);
  expects(index >= 0, "make_sharded_plan: rank is in the topology", site, {{"rank", rank}});
  std::vector<int> peers;
  std::vector<piece> names;
  for (int i = 0; i < ranks.size(); ++i) {
    peers.push_back(ranks.rank(i));
    names.push_back({i, -1, 0});
  }
  exchange_plan plan = detail::gather_all(peers, index, std::move(names));
  plan.epoch = ranks.epoch();
  return plan;
}

/// The strategy for experts that are sliced over all ranks: every token that any rank wants goes to all.
struct sharded {};

/// One rank's sharded plan of tokens: input slot 0 holds its tokens, output slot s those of index s. Bound
/// with room for the most tokens of any rank, it exchanges no counts.
/// @throws precondition_error if rank is not in `ranks`.
inline exchange_plan make_token_plan(sharded, topology const& ranks, int rank,
                                     call_site site = call_site::here()) {
  exchange_plan plan = make_sharded_plan(ranks, rank, site);
  int const chosen = detail::add_buffer(plan, 1), R = ranks.size();
  plan.input[0] = {plan.input[0].source, 0, 0, R};
  for (piece& p : plan.output) p = {p.source, 0, 0, R};
  for (message& m : plan.phases[0].sends) m.at.buffer = chosen;
  for (row_move& m : plan.last) m.from.buffer = chosen;
  plan.phases[0].moves.push_back({{0, 0}, {chosen, 0}, 1, row_action::select, plan.input[0]});
  return plan;
}

}  // namespace moe::inline MOE_ABI
