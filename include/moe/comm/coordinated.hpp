// The coordinated strategy: ranks that hold the same tokens share the work of sending them.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// What the L ranks of a group, which hold the same tokens, take of them.
enum class shared_by : std::uint8_t {
  expert,       ///< Rank l of a group sends what goes to the experts of ranks l of all groups.
  expert_slice  ///< It sends its part of every group's rows; groups hold slices of the same experts.
};

/// Both ways of one rank: neither is the transpose of the other, as rows of a group are copies.
struct coordinated_plans {
  exchange_plan dispatch;
  exchange_plan combine;
};

/// Groups of L consecutive ranks have the same tokens, as after a layer that is split between them
/// (tensor parallelism). Only ranks with the same place in their group talk, so that an all-to-all is
/// one of S = R / L ranks instead of R, each with a part of the rows; then each group has to share.
///
/// Of rank l of group g:
///   expert        dispatch: input slot s has the rows for rank l of group s, output slot s those from
///                 group s. combine: all-to-all back, then all-gather in the group: output slot t * S + s
///                 has the rows that rank t of group s gave back.
///   expert_slice  dispatch: input slot s has part l of the rows for group s; after the all-to-all the
///                 group gathers all: output slot t * S + s has part t of the rows from group s.
///                 combine: input slot s has part l of what goes back to group s; output slot t * S + s
///                 has part t of what came back from group s.
/// In either, gradients go back through the other plan if they are the same on all ranks of a group, and
/// through `transpose` if they are to be summed over them.
///
/// @param path  Of the all-to-all between groups: any `exchange_path` over S ranks, each a node.
/// @throws precondition_error unless L >= 1 divides R and rank is in `ranks`.
/// Source. Rajbhandari et al., "DeepSpeed-MoE", 2022: O(R) becomes O(R / L) + O(L); its released code
///         has the second form.
template <exchange_path Path = flat>
coordinated_plans make_coordinated_plans(topology const& ranks, int L, shared_by form, int rank,
                                         Path const& path = {},
                                         call_site site = call_site::here()) {
  int const index = ranks.index_of(rank), R = ranks.size();
  expects(index >= 0, "make_coordinated_plans: rank is in the topology", site, {{"rank", rank}});
  expects(L >= 1 && R % L == 0, "make_coordinated_plans: L >= 1 divides R", site,
          {{"L", L}, {"R", R}});
  int const S = R / L, group = index / L, l = index % L;

  // Between groups: a topology of S ranks, whose names are those of the ranks l of all groups.
  exchange_plan between = make_plan(path, topology::even(S, 1), group, site);
  auto const real = [&](int g) { return ranks.rank(g * L + l); };
  between.rank = rank;
  between.epoch = ranks.epoch();
  for (exchange_phase& phase : between.phases) {
    for (message& m : phase.sends) m.peer = real(m.peer);
    for (message& m : phase.receives) m.peer = real(m.peer);
  }
  for (piece& p : between.input) p.part = l;
  for (piece& p : between.output) p.part = l;

  // Inside the group: everybody's output slots, by place in the group.
  std::vector<int> peers;
  std::vector<piece> names;
  for (int t = 0; t < L; ++t) {
    peers.push_back(ranks.rank(group * L + t));
    for (int s = 0; s < S; ++s) names.push_back({s, group, t});
  }
  exchange_plan share = detail::gather_all(peers, l, std::move(names));
  share.epoch = ranks.epoch();

  coordinated_plans plans;
  plans.combine = then(between, share, site);
  plans.dispatch = form == shared_by::expert ? std::move(between) : plans.combine;
  return plans;
}

}  // namespace moe::inline MOE_ABI
