// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/loss/z_loss.hpp>

namespace {

constexpr double minus_infinity = -std::numeric_limits<double>::infinity();

struct problem {
  std::int64_t T;
  int E;
  std::vector<double> logits;
  std::vector<std::uint8_t> live;
  moe::batch tokens;
  moe::buffer scratch;

  problem(std::int64_t tokens_count, int experts, std::uint32_t seed)
      : T(tokens_count),
        E(experts),
        logits(static_cast<std::size_t>(T * E)),
        live(static_cast<std::size_t>(T), 1),
        scratch(moe::z_loss_scratch(T)) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0, 3);
    for (double& l : logits) l = normal(random);
    for (std::size_t t = 0; t < live.size(); ++t) {
      double* const l = logits.data() + t * static_cast<std::size_t>(E);
      if (t % 7 == 1) live[t] = 0;
      if (t % 7 == 2) l[0] = std::nan("");
      if (t % 7 == 3) l[E - 1] = -minus_infinity;
      if (t % 7 == 4) l[0] = minus_infinity;  // counts, if E > 1
      if (t % 7 == 5)
        for (int e = 0; e < E; ++e) l[e] = minus_infinity;
    }
    tokens.live = live.data();
  }
  moe::matrix_view<double> view() { return {logits.data(), T, E}; }
  double loss(moe::cpu const& exec = {}) { return moe::z_loss(exec, view(), tokens, scratch); }
  std::vector<double> gradient(double dloss, moe::cpu const& exec = {}) {
    std::vector<double> d(logits.size(), 0.25);
    moe::z_loss_backward(exec, view(), tokens, dloss, scratch, {d, T, E});
    return d;
  }
};

double slow_loss(problem const& p) {
  double total = 0;
  int tokens = 0;
  for (std::int64_t t = 0; t < p.T; ++t) {
    double sum = 0;
    for (int e = 0; e < p.E; ++e) sum += std::exp(p.logits[static_cast<std::size_t>(t * p.E + e)]);
    if (p.live[static_cast<std::size_t>(t)] == 0 || !std::isfinite(sum) || sum == 0) continue;
    total += std::log(sum) * std::log(sum);
    ++tokens;
  }
  return tokens == 0 ? 0 : total / tokens;
}

}  // namespace

TEST_CASE("loss/z_loss: worked example") {
  float logits[] = {0, 0};
  moe::buffer const scratch(moe::z_loss_scratch(1));
  CHECK(moe::z_loss(moe::cpu{}, moe::matrix_view(logits, 1, 2), {}, scratch) ==
        doctest::Approx(std::log(2) * std::log(2)));
  float d[] = {1, 2};  // added to
  moe::z_loss_backward(moe::cpu{}, moe::matrix_view(logits, 1, 2), {}, 3, scratch, {d, 1, 2});
  CHECK(d[0] == doctest::Approx(1 + 3 * std::log(2)));
  CHECK(d[1] == doctest::Approx(2 + 3 * std::log(2)));
}

TEST_CASE("loss/z_loss: large logits do not overflow") {
  float const logits[] = {1000, 1000, -1000, 0};
  moe::buffer const scratch(moe::z_loss_scratch(1));
  double const z = 1000 + std::log(2);
  CHECK(moe::z_loss(moe::cpu{}, moe::matrix_view(logits, 1, 4), {}, scratch) ==
        doctest::Approx(z * z));
}

TEST_CASE("loss/z_loss: equals the formula on random input; the gradient central differences") {
  for (std::int64_t T : {0, 1, 2, 30, 300})
    for (int E : {1, 2, 5, 60}) {
      problem p(T, E, static_cast<std::uint32_t>(T + E));
      CHECK(p.loss() == doctest::Approx(slow_loss(p)).epsilon(1e-12));
      if (T > 30) continue;
      auto const d = p.gradient(0.7);
      for (std::size_t i = 0; i < d.size(); ++i) {
        double const before = p.logits[i], h = 1e-5;
        p.logits[i] = before + h;
        double const up = slow_loss(p);
        p.logits[i] = before - h;
        double const down = slow_loss(p);
        p.logits[i] = before;
        CHECK(d[i] == doctest::Approx(0.25 + 0.7 * (up - down) / (2 * h)).epsilon(1e-6));
      }
    }
}

TEST_CASE("loss/z_loss: the same bits for any number of threads") {
  problem p(2000, 17, 3);
  double const loss = p.loss();
  auto const d = p.gradient(1);
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    double const other = p.loss(team);
    CHECK(std::memcmp(&loss, &other, sizeof loss) == 0);
    CHECK(std::memcmp(d.data(), p.gradient(1, team).data(), d.size() * sizeof(double)) == 0);
  }
}

TEST_CASE("loss/z_loss: refuses shapes that disagree and short scratch") {
  problem p(300, 3, 1);
  std::vector<double> d(1000);
  CHECK_THROWS_WITH_AS(
      moe::z_loss_backward(moe::cpu{}, p.view(), p.tokens, 1, p.scratch, {d, 300, 2}),
      doctest::Contains("z_loss_backward: logits and dlogits are [T,E]; got rows of logits = 300"),
      moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::z_loss(moe::cpu{}, moe::matrix_view(d.data(), 2, 3, 2), {}, p.scratch),
                       doctest::Contains("z_loss: logits are [T,E], ld >= E; got ld = 2, E = 3"),
                       moe::precondition_error);
  CHECK_THROWS_WITH_AS(moe::z_loss(moe::cpu{}, p.view(), p.tokens, {}),
                       doctest::Contains("scratch >= z_loss_scratch(T)"), moe::precondition_error);
}
