// Runs a preset on plain vectors, for tests.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/gate/preset.hpp>

namespace moe_test {

/// Noise, or the priority of a pair, read from a matrix [T,E] instead of drawn.
struct given_noise {
  float const* values = nullptr;
  int E = 1;

  float operator()(moe::token const& t, int e) const { return values[t.row * E + e]; }
  template <class V>
  float operator()(moe::routed_pair<V> const& pair) const {
    return (*this)(pair.token, pair.expert);
  }
};

/// All that a preset makes, and the means to run it backwards.
template <class V, class Preset>
struct preset_run {
  Preset preset;
  std::int64_t T;
  int K, E;
  std::vector<V> logits;
  moe::basic_routing_buffer<V> routing;
  moe::table_buffer table;
  moe::buffer scratch;
  std::vector<V> weights;  ///< [T,K]
  double loss;

  preset_run(Preset const& p, std::vector<V> const& scores, int experts, moe::batch const& tokens,
             moe::cpu const& exec = {})
      : preset(p),
        T(static_cast<std::int64_t>(scores.size()) / experts),
        K(p.gate.k()),
        E(experts),
        logits(scores),
        routing(T, K, E),
        table(moe::preset_table_shape(p, T, E)),
        scratch(moe::preset_scratch<V>(exec, p, T, E)),
        weights(static_cast<std::size_t>(T * K), V(99)),
        loss(moe::apply_preset(exec, p, moe::matrix_view(logits, T, E), tokens, {}, scratch,
                               routing, table, weights)) {}

  /// d/dlogits, given d/dweights [T,K] and the coefficient of the loss.
  std::vector<V> gradient(std::vector<V> const& dweights, double dloss,
                          moe::cpu const& exec = {}) const {
    std::vector<V> dlogits(logits.size(), V(99));
    moe::apply_preset_backward(exec, preset, moe::matrix_view(logits, T, E), routing, table,
                               dweights, dloss, scratch, {dlogits, T, E});
    return dlogits;
  }

  std::size_t pair(std::int64_t t, int j) const { return static_cast<std::size_t>(t * K + j); }
  int expert(std::int64_t t, int j) const { return routing.expert[t * K + j]; }
  /// Place in its expert; -1: no row.
  int slot(std::int64_t t, int j) const {
    int const row = table.row_of[t * K + j];
    return row < 0 ? -1 : row - table.begin[expert(t, j)];
  }
};

template <class V, class Preset>
preset_run(Preset const&, std::vector<V> const&, int, moe::batch const&) -> preset_run<V, Preset>;
template <class V, class Preset>
preset_run(Preset const&, std::vector<V> const&, int, moe::batch const&, moe::cpu const&)
    -> preset_run<V, Preset>;

}  // namespace moe_test
