// The losses over devices, sequences and pools, against their formulas in loops.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <numeric>
#include <random>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/loss/device_balance.hpp>
#include <moe/loss/pool_balance.hpp>
#include <moe/loss/sequence_balance.hpp>

namespace {

using moe_test::refusal;
using moe_test::says;
using device_rule = moe::device_balance_rule;
using counted = device_rule::counted;

/// Scores and choices of T tokens, some of them masked, invalid, or with fewer candidates.
struct problem {
  int T, K, E;
  std::vector<double> scores;
  std::vector<std::uint8_t> live;
  std::vector<std::int64_t> begin{0};
  moe::basic_routing_buffer<double> routing;

  problem(int tokens, int k, int experts, unsigned seed)
      : T(tokens), K(k), E(experts), routing(tokens, k, experts) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> unit(0.05, 1);
    auto const chance = [&](double odds) { return unit(random) < odds; };
    for (int i = 0; i < T * E; ++i)
      scores.push_back(chance(0.1) ? moe::no_score<double> : unit(random));
    for (int t = 0; t < T; ++t) live.push_back(chance(0.2) ? 0 : 1);
    for (int t = 0; t < T; ++t) {
      std::vector<int> order(std::size_t(E), 0);
      std::iota(order.begin(), order.end(), 0);
      std::shuffle(order.begin(), order.end(), random);
      for (int j = 0; j < K; ++j)
        routing.expert[t * K + j] = j > 0 && chance(0.1) ? -1 : order[std::size_t(j)];
      if (chance(0.15))
        for (int j = 0; j < K; ++j) {
          routing.expert[t * K + j] = moe::invalid_token;
          scores[std::size_t(t * E)] = std::numeric_limits<double>::quiet_NaN();
        }
    }
    while (begin.back() < T)
      begin.push_back(
          std::min<std::int64_t>(T, begin.back() + static_cast<std::int64_t>(random() % 9)));
    routing.tokens.live = live.data();
  }

  moe::matrix_view<double const> view(std::vector<double> const& s) const {
    return {s.data(), T, E};
  }
  bool counts(int t) const {
    return live[std::size_t(t)] != 0 && routing.expert[t * K] != moe::invalid_token;
  }
  double score(std::vector<double> const& s, int t, int e) const {
    double const v = s[std::size_t(t * E + e)];
    return std::isfinite(v) ? v : 0;
  }
};

double slow_device(problem const& p, std::vector<double> const& s, device_rule const& rule) {
  int const D = rule.devices;
  double total = 0, tokens = 0;
  for (int t = 0; t < p.T; ++t) tokens += p.counts(t) ? 1 : 0;
  if (tokens == 0) return 0;
  for (int d = 0; d < D; ++d) {
    double f = 0, P = 0;
    for (int t = 0; t < p.T; ++t) {
      if (!p.counts(t)) continue;
      bool sent = false;
      for (int j = 0; j < p.K; ++j) {
        int const e = p.routing.expert[t * p.K + j];
        bool const here = e >= 0 && e / (p.E / D) == d;
        if (rule.count == counted::choices && here) f += double(D) / (p.K * tokens);
        sent = sent || here;
      }
      if (rule.count == counted::tokens && sent) f += double(D) / (rule.most * tokens);
      for (int e = d * p.E / D; e < (d + 1) * p.E / D; ++e) P += p.score(s, t, e) / tokens;
    }
    total += f * P;
  }
  return total;
}

double slow_sequence(problem const& p, std::vector<double> const& s, bool normalise) {
  double total = 0;
  int used = 0;
  for (std::size_t q = 0; q + 1 < p.begin.size(); ++q) {
    double n = 0, loss = 0;
    for (auto t = p.begin[q]; t < p.begin[q + 1]; ++t) n += p.counts(int(t)) ? 1 : 0;
    if (n == 0) continue;
    for (int e = 0; e < p.E; ++e) {
      double f = 0, P = 0;
      for (auto at = p.begin[q]; at < p.begin[q + 1]; ++at) {
        int const t = int(at);
        if (!p.counts(t)) continue;
        double sum = 0;
        for (int i = 0; i < p.E; ++i) sum += p.score(s, t, i);
        if (sum > 0) P += p.score(s, t, e) / (normalise ? sum : 1) / n;
        for (int j = 0; j < p.K; ++j) f += p.routing.expert[t * p.K + j] == e ? p.E / (p.K * n) : 0;
      }
      loss += f * P;
    }
    total += loss;
    ++used;
  }
  return used == 0 ? 0 : total / used;
}

std::vector<double> sequence_sums(problem const& p, std::vector<double> const& s, bool normalise,
                                  moe::cpu const& exec = {}) {
  auto const S = static_cast<std::int64_t>(p.begin.size()) - 1;
  std::vector<double> sums(std::size_t(moe::sequence_balance_sums(S, p.E)), 99);
  moe::sum_sequence_balance(exec, p.view(s), p.routing, moe::vector_view(p.begin), normalise,
                            moe::vector_view(sums));
  return sums;
}

}  // namespace

TEST_CASE("loss/device_balance: a worked example of both levels") {
  moe::basic_routing_buffer<double> routing(1, 2, 4);
  routing.expert[0] = 0;
  routing.expert[1] = 1;
  std::vector<double> const scores{0.4, 0.3, 0.2, 0.1};
  moe::cpu const exec;
  moe::buffer const scratch(moe::device_balance_scratch(1, 4));
  auto const loss = [&](device_rule const& rule) {
    return moe::device_balance(exec, {scores.data(), 1, 4}, routing, rule, scratch);
  };
  CHECK(loss({.devices = 2}) == doctest::Approx(1.4));
  CHECK(loss({2, counted::tokens, 2}) == doctest::Approx(0.7));
  routing.expert[1] = 3;  // both devices
  CHECK(loss({.devices = 2}) == doctest::Approx(1));
  CHECK(loss({2, counted::tokens, 2}) == doctest::Approx(1));
  // One device for each expert is the loss over experts.
  moe::buffer const more(moe::load_balance_scratch(1, 4));
  CHECK(
      moe::device_balance(exec, {scores.data(), 1, 4}, routing, {.devices = 4}, scratch) ==
      doctest::Approx(moe::load_balance(exec, {scores.data(), 1, 4}, routing,
                                        {.choices = moe::load_balance_rule::counted::all}, more)));
}

TEST_CASE("loss/device_balance: equals the formula, with its gradient, for any number of threads") {
  moe::thread_team team(3);
  for (unsigned seed = 1; seed <= 20; ++seed)
    for (device_rule const rule :
         {device_rule{1, counted::choices, 1}, device_rule{4, counted::choices, 1},
          device_rule{4, counted::tokens, 3}, device_rule{12, counted::tokens, 1}}) {
      problem const p(seed == 1 ? 0 : seed == 2 ? 600 : 10 + int(seed), 3, 12, seed);
      CAPTURE(seed);
      moe::buffer const scratch(moe::device_balance_scratch(p.T, rule.devices));
      auto const loss = [&](std::vector<double> const& s, moe::cpu const& exec) {
        return moe::device_balance(exec, p.view(s), p.routing, rule, scratch);
      };
      double const found = loss(p.scores, {});
      CHECK(found == doctest::Approx(slow_device(p, p.scores, rule)).epsilon(1e-12));
      CHECK(loss(p.scores, moe::cpu(team)) == found);
      if (p.T > 30) continue;
      std::vector<double> sums(std::size_t(moe::device_balance_sums(rule.devices)));
      moe::sum_device_balance({}, p.view(p.scores), p.routing, rule, scratch,
                              moe::vector_view(sums));
      std::vector<double> dscores(12);
      moe::device_balance_backward(p.routing, rule, moe::vector_view<double const>(sums), 0.3,
                                   moe::vector_view(dscores));
      for (int t = 0; t < p.T; ++t)
        for (int e = 0; e < 12; ++e) {
          auto const i = std::size_t(t * 12 + e);
          if (!std::isfinite(p.scores[i])) continue;
          double const expected = moe_test::central_difference(
              [&](auto const& s) { return 0.3 * slow_device(p, s, rule); }, p.scores, i);
          CHECK((p.counts(t) ? dscores[std::size_t(e)] : 0) ==
                doctest::Approx(expected).epsilon(1e-6));
        }
    }
}

TEST_CASE("loss/sequence_balance: a worked example") {
  moe::basic_routing_buffer<double> routing(2, 1, 2);
  routing.expert[0] = 0;
  routing.expert[1] = 1;
  std::vector<double> const scores{0.9, 0.3, 0.9, 0.3};
  std::vector<std::int64_t> const two{0, 1, 2}, one{0, 2};
  auto const loss = [&](std::vector<std::int64_t> const& begin, bool normalise) {
    std::vector<double> sums(
        std::size_t(moe::sequence_balance_sums(std::int64_t(begin.size()) - 1, 2)));
    moe::sum_sequence_balance({}, {scores.data(), 2, 2}, routing, moe::vector_view(begin),
                              normalise, moe::vector_view(sums));
    return moe::sequence_balance(routing, moe::vector_view<double const>(sums));
  };
  CHECK(loss(two, true) == doctest::Approx((2 * 0.75 + 2 * 0.25) / 2));
  CHECK(loss(one, true) == doctest::Approx(1));
  CHECK(loss(two, false) == doctest::Approx((2 * 0.9 + 2 * 0.3) / 2));
  // Both choose expert 0: even sequences would be 1.
  routing.expert[1] = 0;
  CHECK(loss(one, true) == doctest::Approx(1.5));
}

TEST_CASE(
    "loss/sequence_balance: equals the formula, with its gradient, for any number of threads") {
  moe::thread_team team(3);
  for (unsigned seed = 1; seed <= 20; ++seed)
    for (bool const normalise : {true, false}) {
      problem const p(seed == 1 ? 0 : 10 + int(seed), 2, 6, seed);
      CAPTURE(seed);
      CAPTURE(normalise);
      auto const sums = sequence_sums(p, p.scores, normalise);
      double const found = moe::sequence_balance(p.routing, moe::vector_view<double const>(sums));
      CHECK(found == doctest::Approx(slow_sequence(p, p.scores, normalise)).epsilon(1e-12));
      CHECK(sequence_sums(p, p.scores, normalise, moe::cpu(team)) == sums);
      std::vector<double> dscores(p.scores.size(), 99);
      moe::sequence_balance_backward({}, p.view(p.scores), p.routing, moe::vector_view(p.begin),
                                     normalise, moe::vector_view<double const>(sums), 0.3,
                                     moe::matrix_view(dscores, p.T, p.E));
      for (std::size_t i = 0; i < p.scores.size(); ++i) {
        double const expected =
            std::isfinite(p.scores[i])
                ? moe_test::central_difference(
                      [&](auto const& s) { return 0.3 * slow_sequence(p, s, normalise); }, p.scores,
                      i)
                : 0;
        CHECK(dscores[i] == doctest::Approx(expected).epsilon(1e-6));
      }
    }
}

TEST_CASE("loss/sequence_balance: its gradient reaches the logits of a gate") {
  using router = moe::gate<moe::sigmoid, moe::top_k<2>, moe::renormalised>;
  constexpr int T = 7, E = 5;
  auto const logits = moe_test::normals(T * E, 4);
  std::vector<std::int64_t> const begin{0, 3, 3, 7};
  moe::cpu const exec;
  moe::basic_routing_buffer<double> routing(T, 2, E);
  moe::buffer const scratch(moe::route_scratch<router, double>(exec, E));
  std::vector<double> scores(T * E), sums(std::size_t(moe::sequence_balance_sums(3, E)));
  auto const loss = [&](std::vector<double> const& l) {
    moe::route(exec, router{}, moe::matrix_view(l, T, E), {}, scratch, routing,
               moe::matrix_view(scores, T, E));
    moe::sum_sequence_balance(exec, {scores.data(), T, E}, routing, moe::vector_view(begin), true,
                              moe::vector_view(sums));
    return moe::sequence_balance(routing, moe::vector_view<double const>(sums));
  };
  loss(logits);
  std::vector<double> dscores(T * E), dlogits(T * E);
  moe::sequence_balance_backward(exec, {scores.data(), T, E}, routing, moe::vector_view(begin),
                                 true, moe::vector_view<double const>(sums), 1.0,
                                 moe::matrix_view(dscores, T, E));
  moe::route_backward(exec, router{}, moe::matrix_view(logits, T, E), routing, {},
                      {.token = {dscores.data(), T, E}}, scratch, moe::matrix_view(dlogits, T, E));
  moe_test::check_gradient(loss, logits, dlogits);
}

TEST_CASE("loss/pool_balance: a worked example, and the loss of one layer") {
  // Sums {scores, choices, tokens} of two layers.
  std::vector<double> const first{0.75, 0.25, 1, 0, 1}, second{0.5, 0.5, 0, 1, 1};
  std::vector<double> sums(5), before{2, 0};
  moe::add_load_balance_sums(moe::vector_view(first), moe::vector_view(sums));
  moe::add_load_balance_sums(moe::vector_view(second), moe::vector_view(sums));
  auto const loss = [&](std::vector<double> const& s, std::vector<double> const& load) {
    return moe::pool_balance(moe::vector_view<double const>(s),
                             moe::vector_view<double const>(load));
  };
  CHECK(loss(sums, before) == doctest::Approx(1.25));
  CHECK(loss(sums, {1, 1}) == doctest::Approx(1));
  CHECK(loss(sums, {0, 0}) == 0);
  CHECK(loss({0, 0, 0, 0, 0}, before) == 0);
  // With the load of its own step it is load_balance of all choices.
  problem p(40, 3, 6, 5);
  moe::buffer const scratch(moe::load_balance_scratch(p.T, p.E));
  moe::load_balance_rule const all{.choices = moe::load_balance_rule::counted::all};
  std::vector<double> own(13);
  std::fill(p.live.begin(), p.live.end(), std::uint8_t{1});
  for (int i = 0; i < p.T * p.K; ++i)
    if (p.routing.expert[i] < 0) p.routing.expert[i] = i % p.E;
  moe::sum_load_balance({}, p.view(p.scores), p.routing, all, scratch, moe::vector_view(own));
  CHECK(loss(own, {own.begin() + 6, own.begin() + 12}) ==
        doctest::Approx(moe::load_balance(p.routing, all, moe::vector_view<double const>(own))));

  std::vector<double> dscores(2);
  moe::pool_balance_backward(moe::vector_view<double const>(sums),
                             moe::vector_view<double const>(before), 0.3,
                             moe::vector_view(dscores));
  // Of a score of one token: E f / tokens.
  CHECK(dscores[0] == doctest::Approx(0.3 * 2 * 1 / 2));
  CHECK(dscores[1] == 0);
  for (std::size_t e = 0; e < 2; ++e)
    CHECK(dscores[e] ==
          doctest::Approx(0.3 * moe_test::central_difference(
                                    [&](auto const& s) { return loss(s, before); }, sums, e)));
}

TEST_CASE("loss/balance levels: bad shapes are refused") {
  problem const p(4, 2, 6, 1);
  moe::buffer const scratch(moe::device_balance_scratch(4, 6));
  says(refusal(
           [&] { moe::device_balance({}, p.view(p.scores), p.routing, {.devices = 4}, scratch); }),
       "device_balance: K >= 1, devices >= 1 divide E, most >= 1; got E = 6, K = 2, devices = 4");
  says(refusal(
           [&] { moe::device_balance({}, p.view(p.scores), p.routing, {.devices = 0}, scratch); }),
       "devices = 0");
  says(refusal([&] {
         moe::device_balance({}, p.view(p.scores), p.routing, {.devices = 2}, moe::memory{});
       }),
       "device_balance: scratch >= device_balance_scratch(T, D)");
  std::vector<double> sums(13);
  std::vector<std::int64_t> const begin{0, 3};
  says(refusal([&] {
         moe::sum_sequence_balance({}, p.view(p.scores), p.routing, moe::vector_view(begin), true,
                                   moe::vector_view(sums));
       }),
       "sequence_balance: begin is [S + 1], from 0 to T; sums is [S (2E + 1)]");
  std::vector<double> const load(5);
  says(refusal([&] {
         moe::pool_balance(moe::vector_view<double const>(sums),
                           moe::vector_view<double const>(load));
       }),
       "pool_balance: sums is [2E + 1], load [E]; got sums = 13, load = 5");
  std::vector<double> total(11);
  says(refusal([&] {
         moe::add_load_balance_sums(moe::vector_view<double const>(sums), moe::vector_view(total));
       }),
       "add_load_balance_sums: both are [2E + 1]");
}
