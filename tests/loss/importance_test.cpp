// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/loss/importance.hpp>

namespace {

struct problem {
  std::int64_t T;
  int E;
  std::vector<double> scores, threshold;
  std::vector<std::uint8_t> live;
  double gate_noise = 1.5;
  moe::batch tokens;
  moe::buffer scratch;

  problem(std::int64_t tokens_count, int experts, std::uint32_t seed)
      : T(tokens_count),
        E(experts),
        scores(static_cast<std::size_t>(T * E)),
        threshold(static_cast<std::size_t>(T)),
        live(static_cast<std::size_t>(T), 1),
        scratch(moe::importance_and_load_scratch(T, E)) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> unit(0, 1);
    for (double& s : scores) s = unit(random) / E;
    for (double& s : threshold) s = unit(random);
    for (std::size_t t = 0; t < live.size(); ++t) {
      if (t % 5 == 1) live[t] = 0;
      if (t % 5 == 2) threshold[t] = std::nan("");
      if (t % 5 == 3)
        scores[t * static_cast<std::size_t>(E)] = -std::numeric_limits<double>::infinity();
    }
    tokens.live = live.data();
  }
  moe::matrix_view<double const> view() const { return {scores.data(), T, E}; }
  double loss(moe::cpu const& exec = {}) const {
    return moe::importance_and_load(exec, view(), threshold, gate_noise, tokens, scratch);
  }
  void gradient(double dloss, std::vector<double>& ds, std::vector<double>& dthreshold,
                moe::cpu const& exec = {}) const {
    ds.assign(scores.size(), 99);
    dthreshold.assign(threshold.size(), 99);
    moe::importance_and_load_backward(exec, view(), threshold, gate_noise, tokens, dloss, scratch,
                                      {ds, T, E}, dthreshold);
  }
};

double variation(std::vector<double> const& x) {
  double mean = 0, squares = 0;
  for (double v : x) mean += v / static_cast<double>(x.size());
  for (double v : x) squares += (v - mean) * (v - mean);
  return x.size() < 2 ? 0 : squares / static_cast<double>(x.size() - 1) / (mean * mean + 1e-10);
}

double slow_loss(problem const& p) {
  std::vector<double> importance(static_cast<std::size_t>(p.E)), load(importance);
  for (std::size_t t = 0; t < p.threshold.size(); ++t)
    for (std::size_t e = 0; e < importance.size(); ++e) {
      double const s = p.scores[t * importance.size() + e];
      if (p.live[t] == 0 || std::isnan(p.threshold[t]) || std::isinf(s)) continue;
      importance[e] += s;
      load[e] += 0.5 * (1 + std::erf((s - p.threshold[t]) / (p.gate_noise / p.E) / std::sqrt(2.0)));
    }
  return (variation(importance) + variation(load)) / 2;
}

}  // namespace

TEST_CASE("loss/importance: golden value of Tutel") {
  std::ifstream file(MOE_TEST_DATA "/tutel_golden.json");
  auto const data = nlohmann::json::parse(file);
  auto const& golden = data["load_importance"];
  std::int64_t const T = data["S"];
  int const E = data["E"], k = golden["k"];
  auto scores = data["logits"].get<std::vector<double>>();
  auto noisy = golden["logits_w_noise"].get<std::vector<double>>();
  std::vector<double> threshold(static_cast<std::size_t>(T));
  for (std::size_t t = 0; t < threshold.size(); ++t) {
    double* const s = scores.data() + t * static_cast<std::size_t>(E);
    double total = 0;
    for (int e = 0; e < E; ++e) total += s[e] = std::exp(s[e]);
    for (int e = 0; e < E; ++e) s[e] /= total;
    double* const n = noisy.data() + t * static_cast<std::size_t>(E);
    std::sort(n, n + E, std::greater<>());
    threshold[t] = n[k - 1];
  }
  moe::buffer const scratch(moe::importance_and_load_scratch(T, E));
  CHECK(moe::importance_and_load(moe::cpu{}, moe::matrix_view(scores.data(), T, E), threshold,
                                 golden["gate_noise"], {}, scratch) ==
        doctest::Approx(golden["value"].get<double>()).epsilon(1e-5));  // data has 7 digits
}

TEST_CASE("loss/importance: even scores and even loads cost nothing") {
  std::vector<double> const scores(12, 0.25), threshold(3, 0.3);
  moe::buffer const scratch(moe::importance_and_load_scratch(3, 4));
  CHECK(moe::importance_and_load(moe::cpu{}, moe::matrix_view(scores.data(), 3, 4), threshold, 1,
                                 {}, scratch) == doctest::Approx(0));
}

TEST_CASE("loss/importance: equals the formula on random input; the gradient central differences") {
  for (std::int64_t T : {0, 1, 3, 30, 300})
    for (int E : {1, 2, 5, 33}) {
      problem p(T, E, static_cast<std::uint32_t>(T + E));
      CHECK(p.loss() == doctest::Approx(slow_loss(p)).epsilon(1e-10));
      if (E > 1 && T > 3) CHECK(p.loss() > 1e-3);
      if (T > 30) continue;
      std::vector<double> ds, dthreshold;
      p.gradient(0.7, ds, dthreshold);
      auto const slope = [&](double& x) {
        double const before = x, h = 1e-5;
        x = before + h;
        double const up = slow_loss(p);
        x = before - h;
        double const down = slow_loss(p);
        x = before;
        return 0.7 * (up - down) / (2 * h);
      };
      for (std::size_t i = 0; i < ds.size(); ++i)
        CHECK(std::abs(ds[i] - slope(p.scores[i])) < 1e-7 * (1 + std::abs(ds[i])));
      for (std::size_t t = 0; t < dthreshold.size(); ++t)
        CHECK(std::abs(dthreshold[t] - slope(p.threshold[t])) <
              1e-7 * (1 + std::abs(dthreshold[t])));
    }
}

TEST_CASE("loss/importance: the same bits for any number of threads") {
  problem const p(2000, 17, 3);
  double const loss = p.loss();
  std::vector<double> ds, dt, other_ds, other_dt;
  p.gradient(1, ds, dt);
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    double const other = p.loss(team);
    CHECK(std::memcmp(&loss, &other, sizeof loss) == 0);
    p.gradient(1, other_ds, other_dt, team);
    CHECK(ds == other_ds);
    CHECK(dt == other_dt);
  }
}

TEST_CASE("loss/importance: refuses no noise, shapes that disagree and short scratch") {
  problem p(300, 5, 1);
  auto const text = [&] {
    try {
      p.loss();
    } catch (moe::precondition_error const& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  p.gate_noise = 0;
  CHECK(text().find("importance_and_load: gate_noise > 0; got gate_noise = 0") == 0);
  p.gate_noise = 1;
  p.threshold.pop_back();
  CHECK(text().find("importance_and_load: scores is [T,E], E >= 1, threshold is [T]; got") == 0);
  p.threshold.push_back(0);
  p.scratch = moe::buffer(100);
  CHECK(text().find("importance_and_load: scratch >= importance_and_load_scratch(T, E)") == 0);
  std::vector<double> ds(1500), dt(299);
  CHECK_THROWS_WITH_AS(moe::importance_and_load_backward(moe::cpu{}, p.view(), p.threshold, 1,
                                                         p.tokens, 1, p.scratch, {ds, 300, 5}, dt),
                       doctest::Contains("dscores is [T,E], dthreshold is [T]"),
                       moe::precondition_error);
}
