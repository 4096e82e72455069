// Which ranks work together for a layer: on tokens, on gradients, on slices; as (colour, key) of split.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <utility>

#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/schedule/expert_parallel.hpp>

namespace moe::inline MOE_ABI {

/// What consecutive ranks hold. In each order they differ in that first.
enum class consecutive_ranks : std::uint8_t {
  experts,  ///< Different experts, then slices, then copies: as `expert_parallelism` has it.
  slices,   ///< Slices of the same experts: those who slice all else (tensor parallelism), too.
  copies    ///< Copies of the same experts, so that different ones are on different nodes.
};

/// How the ranks of a model lie, beyond what its layers' degrees say.
struct rank_layout {
  int same_tokens =
      1;  ///< L consecutive ranks hold the same tokens (tensor, sequence parallelism).
  consecutive_ranks consecutive = consecutive_ranks::experts;
};

/// What a rank holds of a layer.
struct expert_place {
  int copy = 0;
  int slice = 0;
  int expert = 0;  ///< Experts [expert * experts_per_rank, (expert + 1) * experts_per_rank).

  friend constexpr bool operator==(expert_place const&, expert_place const&) = default;
};

/// What `split` takes: ranks of one colour are a group, in the order of keys.
struct group_place {
  int color = 0;
  int key = 0;

  friend constexpr bool operator==(group_place const&, group_place const&) = default;
};

/// The groups of ranks of one layer, of each kind one: what a rank is in them, or their communicators.
/// @tparam Group  `group_place`, or a communicator.
template <class Group>
struct expert_groups {
  Group copy;      ///< Who exchange tokens: one copy of all experts. EP * slices ranks.
  Group experts;   ///< Those of the same slice among them, who hold different experts. EP ranks.
  Group replicas;  ///< Who hold the same, whose gradients are added up. As many as copies.
  Group slices;    ///< Who hold slices of the same experts, whose outputs are added up.
  Group tokens;    ///< Who hold the same tokens. L ranks.
  Group data;  ///< Of each such group one: who add up gradients of what those slice. R / L ranks.
};

namespace detail {

/// @return R
constexpr int expect_layout(expert_parallelism const& degrees, rank_layout const& layout,
                            call_site site) {
  int const parallel = degrees.expert_parallel, D = degrees.data_parallel, S = degrees.slices;
  expects(parallel >= 1 && D >= 1 && S >= 1, "expert_groups: degrees >= 1", site,
          {{"expert_parallel", parallel}, {"data_parallel", D}, {"slices", S}});
  int const R = parallel * D * S, L = layout.same_tokens;
  expects(L >= 1 && R % L == 0, "expert_groups: same_tokens divides the number of ranks", site,
          {{"same_tokens", L}, {"R", R}});
  return R;
}

}  // namespace detail

/// What a rank holds.
/// @pre  The degrees are those of R ranks, 0 <= rank < R.
constexpr expert_place place_of(expert_parallelism const& degrees, int rank,
                                consecutive_ranks order = consecutive_ranks::experts) noexcept {
  int const parallel = degrees.expert_parallel, D = degrees.data_parallel, S = degrees.slices;
  switch (order) {
    case consecutive_ranks::experts:
      return {.copy = rank / parallel / S, .slice = rank / parallel % S, .expert = rank % parallel};
    case consecutive_ranks::slices:
      return {.copy = rank / S / parallel, .slice = rank % S, .expert = rank / S % parallel};
    default:
      return {.copy = rank % D, .slice = rank / D / parallel, .expert = rank / D % parallel};
  }
}

/// The groups of a rank, all by arithmetic.
///
/// @post Ranks of `copy` are numbered slice * EP + expert, as `expert_hosts` numbers those of one copy,
///       whatever the order of ranks: {.data_parallel = 1} with the same other degrees is what holds in it.
/// @throws precondition_error unless degrees >= 1, same_tokens divides R, 0 <= rank < R.
/// Example: experts {32, 64, 128} on 128 ranks: rank 70 is number 6, 6 and 70 of its copies 2, 1 and 0.
/// Source. Rajbhandari et al., "DeepSpeed-MoE", 2022 (arXiv 2201.05596).
constexpr expert_groups<group_place> groups_of(expert_parallelism const& degrees, int rank,
                                               rank_layout const& layout = {},
                                               call_site site = call_site::here()) {
  int const R = detail::expect_layout(degrees, layout, site);
  expects(rank >= 0 && rank < R, "expert_groups: 0 <= rank < R", site, {{"rank", rank}, {"R", R}});
  int const parallel = degrees.expert_parallel, S = degrees.slices, L = layout.same_tokens;
  auto const [copy, slice, expert] = place_of(degrees, rank, layout.consecutive);
  return {.copy = {copy, slice * parallel + expert},
          .experts = {copy * S + slice, expert},
          .replicas = {slice * parallel + expert, copy},
          .slices = {copy * parallel + expert, slice},
          .tokens = {rank / L, rank % L},
          .data = {rank % L, rank / L}};
}

/// Makes the communicators of a rank's groups.
///
/// @param comm    Of all ranks.
/// @param groups  Out.
/// @throws precondition_error as groups_of, or if comm has another number of ranks than the degrees.
/// @note  Collective. If it fails, comm has aborted.
/// @cost  A split for each kind of group.
template <communicator C>
outcome split_groups(C& comm, expert_parallelism const& degrees, rank_layout const& layout,
                     deadline until, expert_groups<C>& groups, call_site site = call_site::here()) {
  int const R = detail::expect_layout(degrees, layout, site);
  expects(comm.size() == R, "split_groups: comm has as many ranks as the degrees", site,
          {{"comm.size()", comm.size()}, {"R", R}});
  auto const own = groups_of(degrees, comm.rank(), layout, site);
  std::pair<group_place, C*> const kinds[] = {
      {own.copy, &groups.copy},         {own.experts, &groups.experts},
      {own.replicas, &groups.replicas}, {own.slices, &groups.slices},
      {own.tokens, &groups.tokens},     {own.data, &groups.data}};
  for (auto const& [place, child] : kinds) {
    outcome const made = comm.split(place.color, place.key, until, *child);
    if (!made) {
      comm.abort();
      return made;
    }
  }
  return {};
}

}  // namespace moe::inline MOE_ABI
