// How many experts each layer of a model has: pyramids, regular patterns and explicit lists, as values.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <initializer_list>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// A schedule holds at most this many layers.
inline constexpr int max_layers = 256;

/// The experts of one layer.
struct layer_experts {
  int experts = 0;  ///< E; 0: a dense layer, whose other fields are 0.
  int k = 1;        ///< Choices per token.
  bool residual =
      false;     ///< A fixed MLP sees every token beside the experts (PR-MoE, shared expert).
  int pool = 0;  ///< 0: experts of its own; layers of one number above 0 share theirs.

  friend constexpr bool operator==(layer_experts const&, layer_experts const&) = default;
};

/// The numbers that make a pyramid; see `expert_schedule::pyramid`.
struct pyramid_shape {
  int layers = 0;  ///< All layers of the model, dense ones included.
  int every = 2;   ///< Every n-th layer is an MoE layer.
  int base = 0;    ///< Experts of an MoE layer,
  int top = 0;     ///< and of the last ones,
  int last = 0;    ///< which are this many.
};

/// The experts of every layer of a model, layer 0 first. A structural type of fixed size: it is a
/// constexpr variable, a template argument, or made at run time. Rules are checked where a schedule
/// is made: a broken one does not compile in a constant expression and throws precondition_error
/// at run time; so every schedule is valid.
///
/// Rules. At most `max_layers` layers; E >= 0; 1 <= k <= min(E, max_choices) in an MoE layer; a dense
/// layer has neither a residual MLP nor a pool; layers of one pool have equal E.
/// GPU. In device code a schedule is a template argument; there it has layers(), moe_layers() and
/// max_experts(), and what is asked of one layer becomes a constant outside the device function.
/// Cost. Queries of a layer are O(1); sums are O(layers), those over shared pools O(layers^2).
/// Source. Rajbhandari et al., "DeepSpeed-MoE", 2022 (arXiv 2201.05596), section 4.
/// Example: expert_schedule::pyramid({.layers = 24, .base = 32, .top = 64, .last = 2})
///              .with_residual()      is PR-MoE-32/64: 10 layers of 32 experts, then 2 of 64.
struct expert_schedule {
  /// No layers.
  constexpr expert_schedule() noexcept {
    for (layer_experts& layer : layer_) layer = dense_layer;
  }

  /// Experts of each layer, 0 = dense, k = 1: expert_schedule{0, 32, 0, 64}.
  constexpr expert_schedule(std::initializer_list<int> experts, call_site site = call_site::here())
      : expert_schedule(vector_view<int const>(experts.begin(), static_cast<int>(experts.size())),
                        site) {}

  /// The same from numbers known at run time.
  /// @param experts  [layers]. Anything contiguous: std::vector<int>, std::array, ...
  constexpr explicit expert_schedule(vector_view<int const> experts,
                                     call_site site = call_site::here())
      : expert_schedule() {
    set_layers(experts.size(), site);
    for (int l = 0; l < layers_; ++l) set(l, {.experts = experts[l]}, site);
  }

  /// With everything said for each layer.
  constexpr explicit expert_schedule(vector_view<layer_experts const> layers,
                                     call_site site = call_site::here())
      : expert_schedule() {
    set_layers(layers.size(), site);
    for (int l = 0; l < layers_; ++l) set(l, layers[l], site);
  }

  /// Dense layers only.
  static constexpr expert_schedule dense(int layers, call_site site = call_site::here()) {
    expert_schedule schedule;
    schedule.set_layers(layers, site);
    return schedule;
  }

  /// `experts` in every n-th layer: with n = 2 in layers 1, 3, 5, ... counted from 0. A remainder of
  /// layers at the end is dense.
  static constexpr expert_schedule every_nth(int layers, int n, int experts,
                                             call_site site = call_site::here()) {
    return pyramid({.layers = layers, .every = n, .base = experts}, site);
  }

  /// `base` experts in every n-th layer, but `top` in the last `last` of these.
  static constexpr expert_schedule pyramid(pyramid_shape const& shape,
                                           call_site site = call_site::here()) {
    expects(shape.every >= 1, "expert_schedule::pyramid: every >= 1", site,
            {{"every", shape.every}});
    expert_schedule schedule;
    schedule.set_layers(shape.layers, site);
    int const moe_layers = shape.layers / shape.every;
    expects(shape.last >= 0 && shape.last <= moe_layers,
            "expert_schedule::pyramid: 0 <= last <= MoE layers", site,
            {{"last", shape.last}, {"MoE layers", moe_layers}});
    for (int i = 0; i < moe_layers; ++i) {
      int const experts = i < moe_layers - shape.last ? shape.base : shape.top;
      schedule.set((i + 1) * shape.every - 1, {.experts = experts}, site);
    }
    return schedule;
  }

  /// This schedule with k choices per token in every MoE layer.
  constexpr expert_schedule with_k(int k, call_site site = call_site::here()) const {
    expert_schedule schedule = *this;
    for (int l = 0; l < layers_; ++l) {
      layer_experts layer = layer_[l];
      layer.k = k;
      schedule.set(l, layer, site);
    }
    return schedule;
  }

  /// This schedule with a fixed MLP beside the experts of every MoE layer.
  constexpr expert_schedule with_residual() const noexcept {
    expert_schedule schedule = *this;
    for (int l = 0; l < layers_; ++l) schedule.layer_[l].residual = layer_[l].experts > 0;
    return schedule;
  }

  /// This schedule with another layer l.
  constexpr expert_schedule with_layer(int l, layer_experts const& layer,
                                       call_site site = call_site::here()) const {
    expert_schedule schedule = *this;
    schedule.check_layer(l, site);
    schedule.set(l, layer, site);
    return schedule;
  }

  MOE_HOST_DEVICE constexpr int layers() const noexcept { return layers_; }

  /// All that is known of layer l.
  /// @throws precondition_error unless 0 <= l < layers(); as do the queries below.
  constexpr layer_experts const& layer(int l, call_site site = call_site::here()) const {
    check_layer(l, site);
    return layer_[l];
  }
  constexpr int experts(int l, call_site site = call_site::here()) const {
    return layer(l, site).experts;
  }
  /// Choices per token; 0 in a dense layer.
  constexpr int k(int l, call_site site = call_site::here()) const { return layer(l, site).k; }
  constexpr bool is_moe(int l, call_site site = call_site::here()) const {
    return layer(l, site).experts > 0;
  }
  constexpr bool has_residual(int l, call_site site = call_site::here()) const {
    return layer(l, site).residual;
  }

  /// The lowest layer that uses the same experts as layer l: l itself, unless a pool is shared.
  constexpr int owner(int l, call_site site = call_site::here()) const {
    int const pool = layer(l, site).pool;
    if (pool == 0) return l;
    int first = 0;
    while (layer_[first].pool != pool) ++first;
    return first;
  }
  /// Whether layer l is the first to use its experts: those of exactly these layers are stored.
  constexpr bool owns_experts(int l, call_site site = call_site::here()) const {
    return is_moe(l, site) && owner(l, site) == l;
  }

  MOE_HOST_DEVICE constexpr int moe_layers() const noexcept {
    int count = 0;
    for (int l = 0; l < layers_; ++l) count += layer_[l].experts > 0 ? 1 : 0;
    return count;
  }
  MOE_HOST_DEVICE constexpr int max_experts() const noexcept {
    int most = 0;
    for (int l = 0; l < layers_; ++l) most = layer_[l].experts > most ? layer_[l].experts : most;
    return most;
  }
  /// Experts that are stored; a shared pool counts once.
  constexpr std::int64_t total_experts() const {
    std::int64_t count = 0;
    for (int l = 0; l < layers_; ++l) count += owns_experts(l) ? layer_[l].experts : 0;
    return count;
  }

  friend constexpr bool operator==(expert_schedule const&, expert_schedule const&) = default;

  // Public because template arguments may have no private members; leave them alone.
  static constexpr layer_experts dense_layer{.experts = 0, .k = 0};
  int layers_ = 0;
  // All zero beyond `layers_`: compilers leave trailing zeros out of symbol names.
  layer_experts layer_[max_layers] = {};

 private:
  constexpr void check_layer(int l, call_site site) const {
    expects(l >= 0 && l < layers_, "expert_schedule: 0 <= layer < layers", site,
            {{"layer", l}, {"layers", layers_}});
  }

  constexpr void set_layers(std::int64_t layers, call_site site) {
    expects(layers >= 0 && layers <= max_layers, "expert_schedule: 0 <= layers <= max_layers", site,
            {{"layers", layers}, {"max_layers", max_layers}});
    layers_ = static_cast<int>(layers);
  }

  constexpr void set(int l, layer_experts const& layer, call_site site) {
    expects(layer.experts >= 0, "expert_schedule: experts >= 0", site,
            {{"layer", l}, {"experts", layer.experts}});
    if (layer.experts == 0) {
      expects(!layer.residual && layer.pool == 0,
              "expert_schedule: a dense layer has neither a residual MLP nor a pool", site,
              {{"layer", l}, {"residual", static_cast<int>(layer.residual)}, {"pool", layer.pool}});
      layer_[l] = dense_layer;
      return;
    }
    expects(
        layer.k >= 1 && layer.k <= layer.experts && layer.k <= max_choices,
        "expert_schedule: 1 <= k <= experts and k <= max_choices", site,
        {{"layer", l}, {"k", layer.k}, {"experts", layer.experts}, {"max_choices", max_choices}});
    expects(layer.pool >= 0, "expert_schedule: pool >= 0", site,
            {{"layer", l}, {"pool", layer.pool}});
    for (int other = 0; layer.pool > 0 && other < layers_; ++other) {
      expects(
          other == l || layer_[other].pool != layer.pool || layer_[other].experts == layer.experts,
          "expert_schedule: layers of one pool have equal experts", site,
          {{"pool", layer.pool},
           {"layer", other},
           {"experts", layer_[other].experts},
           {"layer", l},
           {"experts", layer.experts}});
    }
    layer_[l] = layer;
  }
};

}  // namespace moe::inline MOE_ABI
