// Several layers that share one set of experts: which layer uses which set, and who sees what of it.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/schedule/pyramid.hpp>

namespace moe::inline MOE_ABI {

/// The schedule whose MoE layers first, ..., last - 1 share one set of experts; each keeps its own
/// router. They leave the pools they were in before.
///
/// @pre  0 <= first <= last <= schedule.layers(); the MoE layers among them have equal experts.
/// @throws precondition_error if @pre fails.
/// Source. "UniPool", 2026 (arXiv 2605.06665).
/// Example: share_experts(expert_schedule::every_nth(24, 2, 128), 0, 24).total_experts() == 128.
constexpr expert_schedule share_experts(expert_schedule const& schedule, int first, int last,
                                        call_site site = call_site::here()) {
  expects(first >= 0 && first <= last && last <= schedule.layers(),
          "share_experts: 0 <= first <= last <= layers", site,
          {{"first", first}, {"last", last}, {"layers", schedule.layers()}});
  layer_experts layers[max_layers] = {};
  int unused_pool = 1;
  for (int l = 0; l < schedule.layers(); ++l) {
    layers[l] = schedule.layer(l);
    if (layers[l].pool >= unused_pool) unused_pool = layers[l].pool + 1;
  }
  for (int l = first; l < last; ++l) {
    if (schedule.is_moe(l)) layers[l].pool = unused_pool;
  }
  return expert_schedule(vector_view<layer_experts const>(layers, schedule.layers()), site);
}

/// Pools of n consecutive MoE layers each; the last one may be smaller. n = moe_layers(): one pool
/// for the whole model.
///
/// @pre  n >= 1; the MoE layers of each pool have equal experts.
/// @throws precondition_error if @pre fails.
constexpr expert_schedule share_experts_by(expert_schedule const& schedule, int n,
                                           call_site site = call_site::here()) {
  expects(n >= 1, "share_experts_by: n >= 1", site, {{"n", n}});
  layer_experts layers[max_layers] = {};
  int seen = 0;
  for (int l = 0; l < schedule.layers(); ++l) {
    layers[l] = schedule.layer(l);
    if (schedule.is_moe(l)) layers[l].pool = 1 + seen++ / n;
  }
  return expert_schedule(vector_view<layer_experts const>(layers, schedule.layers()), site);
}

/// In `owner`: an expert that every layer of the pool may use.
inline constexpr std::int32_t every_layer = -1;

/// Writes which experts of a pool one layer may use, as `expert_map::visible` takes it: the ones it
/// owns and the ones that every layer may use. (A pool is locked so that each expert ends with one
/// layer.)
///
/// @param owner    [E]. The layer that owns the expert, or `every_layer`.
/// @param visible  [E] out. 1 or 0.
/// @return How many are visible; fewer than the layer's k leaves its tokens short of choices.
/// @throws precondition_error unless the sizes are equal.
/// @cost   O(E), no allocation.
/// Example: owner {3, 5, -1, 3}, layer 3 gives {1, 0, 1, 1} and returns 3.
constexpr int show_experts_of(int layer, vector_view<std::int32_t const> owner,
                              vector_view<std::uint8_t> visible,
                              call_site site = call_site::here()) {
  expects(owner.size() == visible.size(), "show_experts_of: sizes of owner and visible are equal",
          site, {{"owner", owner.size()}, {"visible", visible.size()}});
  int count = 0;
  for (std::int64_t e = 0; e < owner.size(); ++e) {
    bool const shown = owner[e] == layer || owner[e] == every_layer;
    visible[e] = shown ? 1 : 0;
    count += shown ? 1 : 0;
  }
  return count;
}

}  // namespace moe::inline MOE_ABI
