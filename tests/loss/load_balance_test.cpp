// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/loss/load_balance.hpp>

using rule = moe::load_balance_rule;
using counted = rule::counted;
using masked = rule::masked_tokens;

namespace {

template <class V>
struct problem {
  std::vector<V> scores;
  std::vector<std::uint8_t> live;
  moe::basic_routing_buffer<V> routing;
  moe::buffer scratch;

  problem(std::int64_t T, int K, int E, std::uint32_t seed)
      : scores(static_cast<std::size_t>(T * E)),
        live(static_cast<std::size_t>(T)),
        routing(T, K, E),
        scratch(moe::load_balance_scratch(T, E)) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> unit(0, 1);
    for (V& s : scores) s = static_cast<V>(unit(random));
    for (V& s : scores)
      if (unit(random) < 0.1) s = -std::numeric_limits<V>::infinity();
    for (auto& l : live) l = unit(random) < 0.8 ? 1 : 0;
    for (std::int64_t i = 0; i < T * K; ++i)
      routing.expert[i] = static_cast<std::int32_t>(unit(random) * (E + 1)) - 1;
    for (std::int64_t t = 0; t < T; ++t)
      if (unit(random) < 0.1)
        for (int j = 0; j < K; ++j) {
          routing.expert[t * K + j] = moe::invalid_token;
          scores[static_cast<std::size_t>(t * E)] = std::numeric_limits<V>::quiet_NaN();
        }
    routing.tokens.live = live.data();
  }

  double loss(rule const& r, moe::cpu const& exec = {}) const {
    return moe::load_balance(exec, view(), routing, r, scratch);
  }
  std::vector<V> gradient(rule const& r, double dloss, moe::cpu const& exec = {}) const {
    std::vector<V> d(static_cast<std::size_t>(routing.E), V(99));
    moe::load_balance_backward(exec, routing, r, dloss, scratch, d);
    return d;
  }
  moe::matrix_view<V const> view() const { return {scores.data(), routing.T, routing.E}; }
  bool counts(std::int64_t t, rule const& r) const {
    return routing.expert[t * routing.K] != moe::invalid_token &&
           (live[static_cast<std::size_t>(t)] != 0 || r.masked == masked::scored);
  }
};

/// From the formula, one expert after the other.
template <class V>
double slow_loss(problem<V> const& p, rule const& r) {
  auto const& routing = p.routing;
  int const n = r.choices == counted::all ? routing.K : 1;
  double total = 0, tokens = 0;
  for (std::int64_t t = 0; t < routing.T; ++t) tokens += p.counts(t, r) ? 1 : 0;
  for (int e = 0; e < routing.E; ++e) {
    double me = 0, ce = 0;
    for (std::int64_t t = 0; t < routing.T; ++t) {
      if (!p.counts(t, r)) continue;
      double const s = static_cast<double>(p.scores[static_cast<std::size_t>(t * routing.E + e)]);
      if (std::isfinite(s)) me += s;
      for (int j = 0; j < n && p.live[static_cast<std::size_t>(t)] != 0; ++j)
        ce += routing.expert[t * routing.K + j] == e ? 1 : 0;
    }
    if (tokens > 0) total += me / tokens * (ce / tokens);
  }
  return total * routing.E / n;
}

rule const rules[] = {{},
                      {.choices = counted::all},
                      {.masked = masked::scored},
                      {.choices = counted::all, .masked = masked::scored}};

}  // namespace

TEST_CASE("loss/load_balance: worked example") {
  float const scores[] = {0.8f, 0.2f, 0.6f, 0.4f};
  moe::routing_buffer routing(2, 1, 2);
  routing.expert[0] = routing.expert[1] = 0;
  moe::buffer const scratch(moe::load_balance_scratch(2, 2));
  CHECK(moe::load_balance(moe::cpu{}, {scores, 2, 2}, routing, {}, scratch) ==
        doctest::Approx(1.4).epsilon(1e-7));
  float d[2];
  moe::load_balance_backward(moe::cpu{}, routing, {}, 0.5, scratch, {d, 2});
  CHECK(d[0] == 0.5f);  // 0.5 * E * ce / T
  CHECK(d[1] == 0.0f);
}

TEST_CASE("loss/load_balance: a masked token may still be scored, and is divided by") {
  float const scores[] = {1, 0, 0.5f, 0.5f};
  std::uint8_t const live[] = {1, 0};
  moe::routing_buffer routing(2, 1, 2);
  routing.expert[0] = 0;
  routing.tokens.live = live;
  moe::buffer const scratch(moe::load_balance_scratch(2, 2));
  CHECK(moe::load_balance(moe::cpu{}, {scores, 2, 2}, routing, {}, scratch) == 2.0);
  // me = {0.75, 0.25}, ce = {0.5, 0}
  CHECK(moe::load_balance(moe::cpu{}, {scores, 2, 2}, routing, {.masked = masked::scored},
                          scratch) == 0.75);
}

TEST_CASE("loss/load_balance: an even load has loss 1") {
  int const E = 6, K = 2;
  std::int64_t const T = 12;
  std::vector<float> const scores(static_cast<std::size_t>(T * E), 1.0f / E);
  moe::routing_buffer routing(T, K, E);
  for (std::int64_t i = 0; i < T * K; ++i) routing.expert[i] = static_cast<std::int32_t>(i % E);
  moe::buffer const scratch(moe::load_balance_scratch(T, E));
  for (counted c : {counted::first, counted::all})
    CHECK(moe::load_balance(moe::cpu{}, {scores, T, E}, routing, {.choices = c}, scratch) ==
          doctest::Approx(1).epsilon(1e-7));
}

TEST_CASE("loss/load_balance: equals the formula on random input") {
  int compared = 0;
  for (rule const& r : rules)
    for (std::int64_t T : {0, 1, 2, 17, 255, 256, 257, 700})
      for (int E : {1, 2, 5, 60})
        for (int K : {1, 2, 4}) {
          if (K > E) continue;
          problem<double> const p(T, K, E, static_cast<std::uint32_t>(T * 1000 + E * 10 + K));
          double const expected = slow_loss(p, r);
          CHECK(p.loss(r) == doctest::Approx(expected).epsilon(1e-12));
          compared += expected > 0 ? 1 : 0;
        }
  CHECK(compared > 200);
}

TEST_CASE("loss/load_balance: the gradient is that of central differences, equal for all tokens") {
  for (rule const& r : rules) {
    problem<double> p(23, 3, 7, 5);
    double const dloss = 0.37, h = 1e-4;
    auto const d = p.gradient(r, dloss);
    int moved = 0;
    for (std::int64_t t = 0; t < 23; ++t)
      for (int e = 0; e < 7; ++e) {
        double& s = p.scores[static_cast<std::size_t>(t * 7 + e)];
        double const before = s;
        if (!std::isfinite(before) || !p.counts(t, r)) continue;
        s = before + h;
        double const up = p.loss(r);
        s = before - h;
        double const down = p.loss(r);
        s = before;
        CHECK(d[static_cast<std::size_t>(e)] ==
              doctest::Approx(dloss * (up - down) / (2 * h)).epsilon(1e-8));
        moved += std::abs(up - down) > 1e-9 ? 1 : 0;
      }
    CHECK(moved > 50);
  }
}

TEST_CASE("loss/load_balance: no token, no loss") {
  problem<float> const none(0, 1, 3, 1);
  CHECK(none.loss({}) == 0);
  CHECK(none.gradient({}, 1) == std::vector<float>(3, 0));
  problem<float> all_masked(4, 1, 3, 1);
  all_masked.live.assign(4, 0);
  CHECK(all_masked.loss({}) == 0);
  CHECK(all_masked.gradient({}, 1) == std::vector<float>(3, 0));
}

TEST_CASE("loss/load_balance: the same bits for any number of threads") {
  problem<float> const p(3000, 2, 33, 9);
  for (rule const& r : rules) {
    double const loss = p.loss(r);
    auto const d = p.gradient(r, 0.01);
    for (int threads : {2, 3, 7}) {
      moe::thread_team team(threads);
      double const other = p.loss(r, team);
      CHECK(std::memcmp(&loss, &other, sizeof loss) == 0);
      CHECK(p.gradient(r, 0.01, team) == d);
    }
  }
}

TEST_CASE("loss/load_balance: refuses shapes that disagree and short scratch") {
  problem<float> const p(300, 2, 5, 1);
  std::vector<float> d(4);
  CHECK_THROWS_WITH_AS(
      moe::load_balance(moe::cpu{}, {p.scores.data(), 300, 4}, p.routing, {}, p.scratch),
      doctest::Contains("load_balance: scores is [T,E]; got rows = 300, cols = 4"),
      moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::load_balance(moe::cpu{}, {}, p.routing, {}, p.scratch),
                       doctest::Contains("scores is [T,E]"), moe::precondition_error);
  CHECK_THROWS_WITH_AS(
      moe::load_balance(moe::cpu{}, {p.scores.data(), 300, 5, 4}, p.routing, {}, p.scratch),
      doctest::Contains("ld = 4"), moe::precondition_error);
  CHECK_THROWS_WITH_AS(
      moe::load_balance_backward(moe::cpu{}, p.routing, {}, 1, p.scratch, d),
      doctest::Contains("load_balance_backward: dscores is [E]; got size = 4, E = 5"),
      moe::precondition_error);
  moe::routing const no_experts{.T = 300, .K = 2, .E = 5};
  CHECK_THROWS_WITH_AS(moe::load_balance(moe::cpu{}, p.view(), no_experts, {}, p.scratch),
                       doctest::Contains("load_balance: the routing's expert is given"),
                       moe::precondition_error);
  std::vector<float> d5(5);
  CHECK_THROWS_WITH_AS(moe::load_balance_backward(moe::cpu{}, no_experts, {}, 1, p.scratch, d5),
                       doctest::Contains("load_balance_backward: the routing's expert is given"),
                       moe::precondition_error);
  moe::buffer const small(p.scratch.size() - 2 * moe::memory::alignment);
  CHECK_THROWS_WITH_AS(
      p.routing.T >= 0 ? moe::load_balance(moe::cpu{}, p.view(), p.routing, {}, small) : 0,
      doctest::Contains("scratch >= load_balance_scratch(T, E)"), moe::precondition_error);
}
