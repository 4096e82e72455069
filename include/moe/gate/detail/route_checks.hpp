// What route and route_backward demand of their arguments, on any executor.
// Private to route.hpp and route.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/score_gradient.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI::detail {

template <class L>
void expect_logits(char const* shape, matrix_view<L> logits, int k, call_site site) {
  expects(logits.rows() >= 0 && logits.cols() >= k &&
              logits.cols() <= std::numeric_limits<std::int32_t>::max() &&
              logits.ld() >= logits.cols() && (logits.rows() == 0 || !logits.absent()),
          shape, site, {{"T", logits.rows()}, {"E", logits.cols()}, {"ld", logits.ld()}, {"K", k}});
}

/// An optional [rows, cols] argument: absent, or of that shape and without overlapping rows.
template <class V>
void expect_shape(char const* rule, matrix_view<V> view, std::int64_t rows, std::int64_t cols,
                  call_site site) {
  expects(view.absent() || (view.rows() == rows && view.cols() == cols && view.ld() >= cols), rule,
          site, {{"rows", view.rows()}, {"cols", view.cols()}, {"ld", view.ld()}});
}

/// @param max_k, K  Those of the gate.
template <class L, class V>
void check_route(int max_k, int K, matrix_view<L> logits, basic_routing<V> const& out,
                 matrix_view<V> scores, call_site site) {
  expects(K >= 1 && K <= max_k, "route: 1 <= k <= max_k of the gate", site,
          {{"k", K}, {"max_k", max_k}});
  expect_logits("route: logits are [T,E], E >= K, ld >= E", logits, K, site);
  std::int64_t const T = logits.rows(), E = logits.cols();
  expects(out.T == T && out.K == K && out.E == E,
          "route: the routing has the T and E of the logits and the k of the gate", site,
          {{"routing's T", out.T},
           {"T", T},
           {"routing's K", out.K},
           {"k", K},
           {"routing's E", out.E},
           {"E", E}});
  expects(T == 0 || (out.expert != nullptr && out.weight != nullptr),
          "route: the routing has arrays for experts and weights", site);
  expect_shape("route: scores are [T,E], ld >= E", scores, T, E, site);
  matrix_view const weight(out.weight, T, K);
  matrix_view const score(out.score, out.score == nullptr ? 0 : T, K);
  expects(!overlap(matrix_view(out.expert, T, K), logits) && !overlap(weight, logits) &&
              !overlap(score, logits) && !overlap(scores, logits) && !overlap(scores, weight) &&
              !overlap(scores, score) && !overlap(score, weight),
          "route: outputs overlap neither the logits nor each other", site);
}

template <class L, class V, class D>
void check_route_backward(int max_k, int K, matrix_view<L> logits, basic_routing<V> const& chosen,
                          matrix_view<V const> dweight, score_gradient<V> const& dscores,
                          matrix_view<D> dlogits, call_site site) {
  expect_logits("route_backward: logits are [T,E], E >= K, ld >= E", logits, K, site);
  std::int64_t const T = logits.rows(), E = logits.cols();
  expects(chosen.T == T && chosen.K == K && chosen.E == E && chosen.token_begin == nullptr &&
              K <= max_k && (T == 0 || chosen.expert != nullptr),
          "route_backward: the routing is one that route made of these logits", site,
          {{"routing's T", chosen.T},
           {"T", T},
           {"routing's K", chosen.K},
           {"k", K},
           {"routing's E", chosen.E},
           {"E", E}});
  expect_shape("route_backward: dweight is [T,K], ld >= K", dweight, T, K, site);
  expect_shape("route_backward: dscores.token is [T,E], ld >= E", dscores.token, T, E, site);
  expects(dscores.expert.data() == nullptr || dscores.expert.size() == E,
          "route_backward: dscores.expert is [E]", site,
          {{"size", dscores.expert.size()}, {"E", E}});
  expects(T == 0 || !dlogits.absent(), "route_backward: dlogits is given", site);
  expect_shape("route_backward: dlogits is [T,E], ld >= E", dlogits, T, E, site);
  matrix_view const per_expert(dscores.expert.data(), 1, dscores.expert.size());
  expects(!overlap(dlogits, logits) && !overlap(dlogits, dweight) &&
              !overlap(dlogits, dscores.token) && !overlap(dlogits, per_expert) &&
              !overlap(dlogits, matrix_view(chosen.expert, T, K)),
          "route_backward: dlogits overlaps no input", site);
}

}  // namespace moe::inline MOE_ABI::detail
