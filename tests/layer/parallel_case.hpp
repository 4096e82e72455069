// A layer with all experts on one rank, and the same over several ranks: what they share in tests.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <mutex>
#include <numeric>
#include <support/random.hpp>
#include <vector>

#include <moe/comm/deduplicated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/expert/activation.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/parallel_experts.hpp>

#include "layer/held_experts.hpp"
#include "support/worse.hpp"

namespace moe_test::parallel {

using inner_experts = moe::ffn<moe::swiglu>;

inline constexpr int K = 2, M = 5, H = 6;
inline std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

/// Dropless: softmax, top-2, renormalised.
using router = moe::preset<moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised>>;

/// A strategy that is known at run time.
struct any_strategy {
  int kind = 0;
  static constexpr int kinds = 7;
};
inline moe::exchange_plan make_token_plan(any_strategy s, moe::topology const& ranks, int rank,
                                          moe::call_site site = moe::call_site::here()) {
  switch (s.kind) {
    case 0:
      return make_token_plan(moe::flat{}, ranks, rank, site);
    case 1:
      return make_token_plan(moe::two_hop{}, ranks, rank, site);
    case 2:
      return make_token_plan(moe::two_hop{moe::first_hop::intra}, ranks, rank, site);
    case 3:
      return make_token_plan(moe::leader{}, ranks, rank, site);
    case 4:
      return make_token_plan(moe::grid<2>{{1, ranks.size()}}, ranks, rank, site);
    case 5:
      return make_token_plan(moe::sharded{}, ranks, rank, site);
    default:
      return make_token_plan(moe::deduplicated{}, ranks, rank, site);
  }
}

/// A layer on one rank with all experts and all tokens, and what it gives.
struct whole_layer {
  moe::moe_layer<router, inner_experts> layer;
  std::int64_t T;
  std::vector<double> values, gradients, tokens, dout, out, dtokens;

  /// Experts [first_silent, last_silent) give nothing.
  whole_layer(std::int64_t tokens_of_all, int E, unsigned seed = 1, int first_silent = 0,
              int last_silent = 0, std::int64_t hidden = H)
      : layer(router{}, {}, {.T = tokens_of_all, .M = M, .H = hidden, .E = E, .bias = true}),
        T(tokens_of_all),
        values(moe_test::normals<double>(layer.parameter_elements(), seed, 0, 0.5)),
        gradients(values.size()),
        tokens(moe_test::normals<double>(T * M, seed + 1)),
        dout(moe_test::normals<double>(T * M, seed + 2)),
        out(tokens.size()),
        dtokens(tokens.size()) {
    auto const experts = layer.carve(values.data()).experts;
    for (int e = first_silent; e < last_silent; ++e) {
      std::fill_n(experts.down[e].data(), hidden * M, 0.);
      std::fill_n(experts.down_bias.row(e), M, 0.);
    }
    moe::cpu const exec;
    moe::buffer saved_bytes(layer.saved_bytes<double>()),
        scratch(layer.scratch_bytes<double>(exec));
    auto saved = layer.carve_saved<double>(saved_bytes);
    layer.forward<double>(exec, layer.carve(values.data()), {tokens, T, M}, {.training = true},
                          {out, T, M}, saved, scratch);
    layer.backward<double>(exec, layer.carve(values.data()), {tokens, T, M}, {dout, T, M}, {},
                           saved, {dtokens, T, M}, layer.carve(gradients.data()),
                           moe::update::assign, scratch);
  }
};

struct parallel_case {
  std::vector<std::int64_t> T;  ///< [R]
  int E = 1;
  moe::expert_parallelism degrees{};
  any_strategy strategy{};
  int group = 2;  ///< Ranks of a node.
  int chunks = 1;
  std::int64_t room = 0;
  bool repeat = false;  ///< Forward twice: the second is what counts.

  int R() const { return static_cast<int>(T.size()); }
  std::int64_t most() const { return *std::max_element(T.begin(), T.end()); }
  std::int64_t first(int r) const {
    return std::accumulate(T.begin(), T.begin() + r, std::int64_t{0});
  }
};

/// What all ranks together give, in the order of tokens; gradients summed over ranks.
struct joint_result {
  std::vector<double> out, dtokens, router;
  std::vector<double> experts;  ///< As the whole layer has them.

  static joint_result of(whole_layer const& whole) {
    return {std::vector<double>(whole.out.size()), std::vector<double>(whole.out.size()),
            std::vector<double>(at(M * whole.layer.shape().E)),
            std::vector<double>(whole.values.size())};
  }
};

/// @param keeps  Of which experts the rank has parameters, if not those of `hosts`.
template <class C, class Inner = inner_experts>
void run_rank(C& comm, C* second, whole_layer& whole, parallel_case const& c,
              moe::expert_hosts const& hosts, joint_result& sum, std::mutex& mutex,
              Inner const& inner = {}, moe::expert_hosts const* keeps = nullptr) {
  moe::expert_hosts const& held = keeps == nullptr ? hosts : *keeps;
  int const r = comm.rank();
  std::int64_t const T = c.T[at(r)], first = c.first(r);
  moe::token_exchange<C> exchange(comm, moe::topology::even(1, c.R()).grouped(c.group),
                                  moe::chunked<any_strategy>{c.strategy, c.chunks}, hosts,
                                  {.timeout = std::chrono::seconds(60), .room = c.room}, second);
  moe::moe_layer const layer(
      router{}, moe::parallel_experts<Inner, C>(inner, exchange, {.T = c.most(), .K = K}),
      {.T = c.most(), .M = M, .H = whole.layer.shape().H, .E = c.E, .bias = true});
  std::vector<double> values(at(layer.parameter_elements())), gradients(values.size(), 1e30);
  auto const whole_parts = whole.layer.carve(whole.values.data());
  auto const parts = layer.carve(values.data());
  for (std::int64_t m = 0; m < M; ++m)
    std::copy_n(whole_parts.router.row(m), c.E, parts.router.row(m));
  moe_test::for_each_held(whole_parts.experts, parts.experts, held,
                          [](double a, double& b) { b = a; });

  moe::cpu const exec;
  moe::buffer saved_bytes(layer.template saved_bytes<double>());
  moe::buffer scratch(layer.template scratch_bytes<double>(exec));
  auto saved = layer.template carve_saved<double>(saved_bytes);
  std::vector<double> out(at(T * M), 1e30), dtokens(at(T * M), 1e30);
  moe::matrix_view<double const> const tokens(whole.tokens.data() + first * M, T, M);
  for (int i = c.repeat ? 0 : 1; i < 2; ++i)
    layer.template forward<double>(exec, parts, tokens, {.first_id = first, .training = true},
                                   {out, T, M}, saved, scratch);
  layer.template backward<double>(exec, parts, tokens, {whole.dout.data() + first * M, T, M}, {},
                                  saved, {dtokens, T, M}, layer.carve(gradients.data()),
                                  moe::update::assign, scratch);

  std::lock_guard const lock(mutex);
  std::copy(out.begin(), out.end(), sum.out.begin() + first * M);
  std::copy(dtokens.begin(), dtokens.end(), sum.dtokens.begin() + first * M);
  auto const g = layer.carve(gradients.data());
  for (std::size_t i = 0; i < sum.router.size(); ++i) sum.router[i] += g.router.data()[i];
  auto const into = whole.layer.carve(sum.experts.data());
  moe_test::for_each_held(into.experts, g.experts, held, [](double& a, double b) { a += b; });
}

inline double worst_difference(std::vector<double> const& a, std::vector<double> const& b) {
  double worst = a.size() == b.size() ? 0 : 1e30;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    worst = moe_test::worse(worst, std::abs(a[i] - b[i]));
  return worst;
}

/// Sums of some ten products in another order.
inline constexpr double tolerance = 1e-11;

inline void check_equal(joint_result sum, whole_layer const& whole) {
  CHECK(worst_difference(sum.out, whole.out) < tolerance);
  CHECK(worst_difference(sum.dtokens, whole.dtokens) < tolerance);
  std::copy(sum.router.begin(), sum.router.end(), sum.experts.begin());
  CHECK(worst_difference(sum.experts, whole.gradients) < tolerance);
}

/// Different numbers of tokens, some 0.
inline std::vector<std::int64_t> some_tokens(int R, unsigned seed) {
  std::vector<std::int64_t> T;
  for (int r = 0; r < R; ++r)
    T.push_back((static_cast<unsigned>(r) * 7 + seed) % 5 == 0
                    ? 0
                    : 3 + static_cast<std::int64_t>(static_cast<unsigned>(r) + seed) % 6);
  T[0] = 7;
  return T;
}

}  // namespace moe_test::parallel
