// UniPool's loss: it falls as the choices of all layers that share a pool of experts spread over the pool.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/load_balance.hpp>

namespace moe::inline MOE_ABI {

/// total += of_layer: the sums of `sum_load_balance` with {.choices = counted::all}, of the layers of a pool
/// or of ranks.
/// @throws precondition_error unless both are [2E + 1].
inline void add_load_balance_sums(vector_view<double const> of_layer, vector_view<double> total,
                                  call_site site = call_site::here()) {
  expects(of_layer.size() == total.size() && total.size() % 2 == 1,
          "add_load_balance_sums: both are [2E + 1]", site,
          {{"of_layer", of_layer.size()}, {"total", total.size()}});
  for (std::int64_t i = 0; i < total.size(); ++i) total[i] += of_layer[i];
}

namespace detail {

inline double check_pool_balance(vector_view<double const> load, std::int64_t sums,
                                 call_site site) {
  expects(sums == 2 * load.size() + 1, "pool_balance: sums is [2E + 1], load [E]", site,
          {{"sums", sums}, {"load", load.size()}});
  double total = 0;
  for (double const l : load) total += l;
  return total;
}

}  // namespace detail

/// E * the sum over experts of f[e] P[e]: f[e] is the share of expert e in all choices of the load, P[e] its
/// mean score over the tokens of all layers. 1 if f is even and scores add up to 1; 0 without a load or a
/// token.
///
/// A layer does not know what the later ones will choose, so that f is that of the step before: the sums'
/// part [E, 2E) of then. A layer's part of the loss is that of its own sums with the tokens of all layers.
///
/// @param sums  [2E + 1]: those of all layers, added.
/// @param load  [E]: choices of each expert, which carry no gradient.
/// @throws precondition_error unless the sizes fit.
/// Example: E = 2, two layers of one token each with scores {0.75, 0.25} and {0.5, 0.5}; the step before all
///          went to expert 0: 2 * (1 * 0.625) = 1.25.
/// Source: "UniPool", 2026 (pool auxiliary loss).
inline double pool_balance(vector_view<double const> sums, vector_view<double const> load,
                           call_site site = call_site::here()) {
  double const choices = detail::check_pool_balance(load, sums.size(), site);
  std::int64_t const E = load.size();
  double const tokens = sums[2 * E];
  if (choices == 0 || tokens == 0) return 0;
  double total = 0;
  for (std::int64_t e = 0; e < E; ++e) total += load[e] * sums[e];
  return static_cast<double>(E) * total / (choices * tokens);
}

/// The gradient of pool_balance: the same for every token that counts, in every layer.
///
/// @param sums     [2E + 1]: its count of tokens alone matters, which is known before the layers run.
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dscores  [E] out: for score_gradient::expert.
template <class V>
void pool_balance_backward(vector_view<double const> sums, vector_view<double const> load,
                           double dloss, vector_view<V> dscores,
                           call_site site = call_site::here()) {
  double const choices = detail::check_pool_balance(load, sums.size(), site);
  std::int64_t const E = load.size();
  expects(dscores.size() == E, "pool_balance_backward: dscores is [E]", site,
          {{"size", dscores.size()}, {"E", E}});
  double const tokens = sums[2 * E];
  for (std::int64_t e = 0; e < E; ++e)
    dscores[e] =
        choices == 0 || tokens == 0
            ? V(0)
            : static_cast<V>(dloss * static_cast<double>(E) * load[e] / (choices * tokens));
}

}  // namespace moe::inline MOE_ABI
