// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <numeric>
#include <string>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/sinkhorn.hpp>
#include <moe/gate/weigh.hpp>

namespace {

constexpr double none = moe::no_score<double>;
using ids = std::vector<std::int32_t>;

template <class V>
struct assigned {
  ids expert;
  moe::sinkhorn_result result;

  assigned(moe::sinkhorn const& rule, std::vector<V> const& logits, int E,
           moe::batch const& tokens = {.training = true}, moe::cpu const& exec = {}) {
    auto const T = static_cast<std::int64_t>(logits.size()) / E;
    expert.assign(static_cast<std::size_t>(T * rule.k), 99);
    moe::buffer const scratch(moe::sinkhorn_scratch<V>(exec, T, E));
    result = moe::assign_by_sinkhorn<V>(exec, rule, moe::matrix_view(logits, T, E), tokens, scratch,
                                        moe::matrix_view(expert, T, rule.k));
  }
};
template <class V>
assigned(moe::sinkhorn, std::vector<V>, int) -> assigned<V>;

/// The matrix itself, as its authors write it, in double.
std::vector<double> slow_sinkhorn(std::vector<double> const& z, std::size_t E, double tolerance) {
  std::size_t const T = z.size() / E;
  std::vector<double> d0(T, 1), d1(E, 1);
  double error = 1e9;
  while (error > tolerance) {
    for (std::size_t t = 0; t < T; ++t) {
      double sum = 0;
      for (std::size_t e = 0; e < E; ++e) sum += d1[e] * std::exp(z[t * E + e]);
      d0[t] = 1 / (static_cast<double>(T) * (sum + 1e-8));
    }
    error = 0;
    for (std::size_t e = 0; e < E; ++e) {
      double sum = 0;
      for (std::size_t t = 0; t < T; ++t) sum += d0[t] * std::exp(z[t * E + e]);
      double const now = 1 / (static_cast<double>(E) * (sum + 1e-8));
      error += std::abs(now - d1[e]) / static_cast<double>(E);
      d1[e] = now;
    }
  }
  std::vector<double> p(z.size());
  for (std::size_t i = 0; i < z.size(); ++i) p[i] = d1[i % E] * std::exp(z[i]) * d0[i / E];
  return p;
}

int greatest_load(ids const& expert, int E) {
  std::vector<int> load(static_cast<std::size_t>(E));
  for (std::int32_t const e : expert) ++load[static_cast<std::size_t>(e)];
  return *std::max_element(load.begin(), load.end());
}

/// Logits that like some experts better.
std::vector<double> skewed(std::int64_t T, int E, unsigned seed) {
  auto logits = moe_test::normals(T * E, seed);
  for (std::size_t i = 0; i < logits.size(); ++i)
    logits[i] += 3.0 - 3.0 * static_cast<double>(i % static_cast<std::size_t>(E)) / E;
  return logits;
}

}  // namespace

TEST_CASE("gate/sinkhorn: two tokens and two experts by hand") {
  // exp(z) = (8 1; 2 1): both tokens like expert 0. Scaling keeps 8 * 1 / (1 * 2) = 4, so that the
  // balanced matrix is (2 1; 1 2) / 6, and token 1 goes to expert 1.
  std::vector<double> const z{std::log(8), 0, std::log(2), 0};
  assigned<double> const a({}, z, 2);
  CHECK(a.expert == ids{0, 1});
  CHECK(a.result.converged);
  auto const p = slow_sinkhorn(z, 2, 1e-6);
  for (std::size_t i = 0; i < 4; ++i)
    CHECK(p[i] == doctest::Approx(i == 0 || i == 3 ? 2.0 / 6 : 1.0 / 6).epsilon(1e-5));
  CHECK(assigned<double>({}, z, 2, {}).expert == ids{0, 0});  // evaluation
}

TEST_CASE("gate/sinkhorn: agrees with the matrix as its authors write it") {
  int cases = 0;
  for (unsigned seed = 0; seed < 40; ++seed) {
    CAPTURE(seed);
    int const E = 2 + static_cast<int>(seed % 7), k = 1 + static_cast<int>(seed % 3) % E;
    std::int64_t const T = 1 + 7 * seed % 200;
    auto const z = skewed(T, E, seed);
    auto const p = slow_sinkhorn(z, static_cast<std::size_t>(E), 1e-4);
    assigned<double> const a({.k = k}, z, E);
    REQUIRE(a.result.converged);
    for (std::int64_t t = 0; t < T; ++t) {
      std::vector<std::int32_t> order(static_cast<std::size_t>(E));
      std::iota(order.begin(), order.end(), 0);
      auto const at = [&](std::int32_t e) { return p[static_cast<std::size_t>(t * E + e)]; };
      std::stable_sort(order.begin(), order.end(),
                       [&](std::int32_t x, std::int32_t y) { return at(x) > at(y); });
      for (int j = 0; j < k; ++j)
        CHECK(a.expert[static_cast<std::size_t>(t * k + j)] == order[static_cast<std::size_t>(j)]);
      ++cases;
    }
  }
  CHECK(cases > 2000);
}

TEST_CASE("gate/sinkhorn: balances in training, and does nothing in evaluation") {
  int const E = 8;
  auto const z = skewed(800, E, 1);
  CHECK(greatest_load(assigned<double>({}, z, E, {}).expert, E) > 250);
  CHECK(greatest_load(assigned<double>({}, z, E).expert, E) < 140);
}

TEST_CASE("gate/sinkhorn: equal logits go to the lower id") {
  CHECK(assigned<float>({.k = 2}, std::vector<float>(12, 1.0f), 4).expert == ids{0, 1, 0, 1, 0, 1});
}

TEST_CASE("gate/sinkhorn: great logits neither overflow nor matter row by row") {
  auto const z = skewed(64, 4, 3);
  auto shifted = z;
  for (std::size_t i = 0; i < z.size(); ++i) {
    std::size_t const t = i / 4;
    shifted[i] += 100.0 * static_cast<double>(t) - 3000;
  }
  CHECK(assigned<double>({}, shifted, 4).expert == assigned<double>({}, z, 4).expert);
  std::vector<float> const narrow(shifted.begin(), shifted.end());
  assigned<float> const a({}, narrow, 4);
  CHECK(a.result.converged);
  CHECK(greatest_load(a.expert, 4) < 30);
}

TEST_CASE("gate/sinkhorn: masked, invalid and hidden take no part") {
  auto const clean = skewed(6, 3, 5);
  auto const expected = assigned<double>({.k = 2}, clean, 3);
  // Two tokens more that take no part change nothing for the others.
  auto more = clean;
  more.insert(more.end(), {5, std::numeric_limits<double>::quiet_NaN(), 5, 9, 9, 9});
  std::vector<std::uint8_t> const live{1, 1, 1, 1, 1, 1, 1, 0};
  auto const got = assigned<double>({.k = 2}, more, 3, {.training = true, .live = live.data()});
  for (std::size_t i = 0; i < 16; ++i) CHECK(got.expert[i] == (i < 12 ? expected.expert[i] : -1));
  CHECK(got.result.passes == expected.result.passes);

  std::vector<double> few{1, none, 2, none, none, none, none, 3, none};
  auto const a = assigned<double>({.k = 2}, few, 3);
  CHECK(a.expert[2] == -1);
  CHECK(a.expert[3] == -1);
  CHECK(a.expert[4] == 1);
  CHECK(a.expert[5] == -1);
  CHECK(a.expert[0] + a.expert[1] == 2);  // 0 and 2, never 1
}

TEST_CASE("gate/sinkhorn: gradients are those of a gate that is told the ids") {
  int const E = 5;
  std::int64_t const T = 12;
  auto const z = skewed(T, E, 7), dweight = moe_test::normals(T * 2, 8);
  assigned<double> const a({.k = 2}, z, E);
  using gate_type = moe::gate<moe::softmax, moe::replayed<2>, moe::as_scored>;
  gate_type const gate{{}, moe::replayed<2>(a.expert.data(), 2, 2), {}};
  moe::cpu const exec;
  moe::basic_routing_buffer<double> routed(T, 2, E);
  moe::buffer const scratch(moe::route_scratch<gate_type, double>(exec, E));
  auto const loss = [&](std::vector<double> const& l) {
    moe::route(exec, gate, moe::matrix_view(l, T, E), {.training = true}, scratch, routed);
    double sum = 0;
    for (std::int64_t i = 0; i < T * 2; ++i)
      sum += dweight[static_cast<std::size_t>(i)] * routed.weight[i];
    return sum;
  };
  loss(z);
  for (std::size_t i = 0; i < a.expert.size(); ++i)
    CHECK(routed.expert[static_cast<std::int64_t>(i)] == a.expert[i]);
  std::vector<double> d(z.size());
  moe::route_backward(exec, gate, moe::matrix_view(z, T, E), routed, {dweight, T, 2}, {}, scratch,
                      moe::matrix_view(d, T, E));
  moe_test::check_gradient(loss, z, d);
}

TEST_CASE("gate/sinkhorn: threads change nothing; passes are bounded; no tokens") {
  auto const z = skewed(501, 6, 9);
  assigned<double> const one({}, z, 6);
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    assigned<double> const many({}, z, 6, {.training = true}, moe::cpu(team));
    CHECK(many.expert == one.expert);
    CHECK(many.result.error == one.result.error);
  }
  assigned<double> const cut({.tolerance = 1e-300, .most_passes = 3}, z, 6);
  CHECK(cut.result.passes == 3);
  CHECK_FALSE(cut.result.converged);
  CHECK(one.result.error <= 1e-4);
  assigned<float> const nothing({}, std::vector<float>{}, 3);
  CHECK(nothing.result.converged);
  CHECK(nothing.result.passes == 0);
}

TEST_CASE("gate/sinkhorn: bad input is refused") {
  moe::cpu const exec;
  std::vector<float> const logits(12);
  ids expert(8);
  moe::buffer const scratch(moe::sinkhorn_scratch(exec, 4, 3));
  auto const text = [&](moe::sinkhorn const& rule, std::int64_t rows, std::int64_t cols,
                        moe::memory room) {
    return moe_test::refusal([&] {
      moe::assign_by_sinkhorn(exec, rule, moe::matrix_view(logits, 4, 3), {.training = true}, room,
                              moe::matrix_view(expert.data(), rows, cols));
    });
  };
  CHECK(text({}, 4, 1, scratch) == "nothing was thrown");
  moe_test::says(text({.k = 0}, 4, 1, scratch), "assign_by_sinkhorn: 1 <= k <= 16");
  moe_test::says(text({.k = 4}, 4, 2, scratch), "logits are [T,E], E >= k");
  moe_test::says(text({.tolerance = 0}, 4, 1, scratch), "tolerance = 0");
  moe_test::says(text({.k = 2}, 4, 1, scratch), "ids are [T,k]");
  moe_test::says(text({}, 3, 1, scratch), "rows = 3");
  moe_test::says(text({}, 4, 1, {scratch.data(), 64}), "scratch has sinkhorn_scratch");
}
