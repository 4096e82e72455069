// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/layer/cosine_router.hpp>

namespace {

using moe_test::refusal;
using moe_test::says;

constexpr std::int64_t T = 5, M = 6, D = 4, E = 3;

/// All numbers of a case in one vector, tokens first.
struct parameters {
  static constexpr std::int64_t tokens = T * M, weights = M * D + D + D * E + 1;

  template <class V>
  static moe::cosine_router_weights<V> of(V* w) {
    return {{w, M, D}, {w + M * D, D}, {w + M * D + D, D, E}, {w + M * D + D + D * E, 1}};
  }
};

template <class V>
std::vector<V> logits_of(std::vector<V> const& numbers, moe::cosine_router_rule const& rule,
                         moe::cpu const& exec = {}) {
  auto const w = parameters::of<V const>(numbers.data() + T * M);
  std::vector<V> logits(T * E, V(77));
  moe::buffer const scratch(moe::cosine_logits_scratch<V>(exec, T, w));
  moe::cosine_logits<V>(exec, {numbers.data(), T, M}, w, rule, {logits.data(), T, E}, scratch);
  return logits;
}

template <class V>
std::vector<V> gradient_of(std::vector<V> const& numbers, std::vector<V> const& dlogits,
                           moe::cosine_router_rule const& rule, V before = 0,
                           moe::cpu const& exec = {}) {
  auto const w = parameters::of<V const>(numbers.data() + T * M);
  auto const logits = logits_of(numbers, rule, exec);
  std::vector<V> d(numbers.size(), before);
  moe::buffer const scratch(moe::cosine_logits_scratch<V>(exec, T, w));
  moe::cosine_logits_backward<V>(exec, {numbers.data(), T, M}, w, rule, {logits.data(), T, E},
                                 {dlogits.data(), T, E}, {d.data(), T, M},
                                 parameters::of<V>(d.data() + T * M),
                                 before == 0 ? moe::update::assign : moe::update::add, scratch);
  return d;
}

std::vector<double> random_case(unsigned seed, double log_scale) {
  auto numbers = moe_test::normals(parameters::tokens + parameters::weights, seed);
  numbers.back() = log_scale;
  return numbers;
}

}  // namespace

TEST_CASE("layer/cosine_router: a worked example") {
  // One token (3, 4), the identity as projection; experts (1, 0), (-6, -8), (0, 5): cosines 0.6, -1, 0.8.
  std::vector<double> const x{3, 4}, p{1, 0, 0, 1}, experts{1, -6, 0, 0, -8, 5}, t{std::log(2.0)};
  moe::cosine_router_weights<double const> const w{
      {p.data(), 2, 2}, {}, {experts.data(), 2, 3}, {t.data(), 1}};
  moe::cpu const exec;
  moe::buffer const scratch(moe::cosine_logits_scratch<double>(exec, 1, w));
  std::vector<double> logits(3);
  auto const run = [&](moe::cosine_router_rule const& rule) {
    moe::cosine_logits<double>(exec, {x.data(), 1, 2}, w, rule, {logits.data(), 1, 3}, scratch);
  };
  run({});
  CHECK(logits[0] == doctest::Approx(1.2));
  CHECK(logits[1] == doctest::Approx(-2));
  CHECK(logits[2] == doctest::Approx(1.6));
  run({.max_log_scale = 0});  // the scale is held to 1
  CHECK(logits[1] == doctest::Approx(-1));
  run({.unit_experts = false});
  CHECK(logits[1] == doctest::Approx(-20));
}

TEST_CASE("layer/cosine_router: equals the formula, and does not see the length of a token") {
  auto const numbers = random_case(1, 0.7);
  auto const found = logits_of(numbers, {});
  auto const* const w = numbers.data() + T * M;
  for (int t = 0; t < T; ++t)
    for (int e = 0; e < E; ++e) {
      double dot = 0, yy = 0, cc = 0;
      for (int d = 0; d < D; ++d) {
        double y = w[M * D + d];
        for (int m = 0; m < M; ++m) y += numbers[std::size_t(t * M + m)] * w[m * D + d];
        double const c = w[M * D + D + d * E + e];
        dot += y * c;
        yy += y * y;
        cc += c * c;
      }
      CHECK(found[std::size_t(t * E + e)] ==
            doctest::Approx(std::exp(0.7) * dot / std::sqrt(yy * cc)));
    }
  auto unbiased = numbers;
  std::fill_n(unbiased.begin() + T * M + M * D, D, 0.0);
  auto longer = unbiased;
  for (int i = 0; i < T * M; ++i) longer[std::size_t(i)] *= 1000;
  auto const a = logits_of(unbiased, {}), b = logits_of(longer, {});
  for (std::size_t i = 0; i < a.size(); ++i) CHECK(a[i] == doctest::Approx(b[i]));
}

TEST_CASE("layer/cosine_router: gradients of tokens and of every parameter") {
  auto const dlogits = moe_test::normals(T * E, 9);
  for (moe::cosine_router_rule const rule :
       {moe::cosine_router_rule{}, moe::cosine_router_rule{.unit_experts = false},
        moe::cosine_router_rule{.max_log_scale = 0.5}}) {
    auto const numbers = random_case(2, 0.7);
    auto const objective = [&](std::vector<double> const& x) {
      auto const l = logits_of(x, rule);
      double sum = 0;
      for (std::size_t i = 0; i < l.size(); ++i) sum += dlogits[i] * l[i];
      return sum;
    };
    auto const found = gradient_of(numbers, dlogits, rule);
    moe_test::check_gradient(objective, numbers, found);
    CHECK((found.back() == 0) == (rule.max_log_scale < 0.7));
    auto const added = gradient_of(numbers, dlogits, rule, 2.0);
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(added[i] == doctest::Approx(found[i] + 2));
  }
}

TEST_CASE("layer/cosine_router: a token of no direction, and one of no number") {
  auto numbers = random_case(3, 0.7);
  std::fill_n(numbers.begin(), M, 0.0);  // token 0, and no bias:
  std::fill_n(numbers.begin() + T * M + M * D, D, 0.0);
  auto const l = logits_of(numbers, {});
  for (std::size_t e = 0; e < E; ++e) CHECK(l[e] == 0);
  auto dlogits = moe_test::normals(T * E, 9);
  for (double const d : gradient_of(numbers, dlogits, {})) CHECK(std::isfinite(d));

  numbers[M + 1] = std::numeric_limits<double>::quiet_NaN();  // token 1
  CHECK(std::isnan(logits_of(numbers, {})[E]));
  std::fill_n(dlogits.begin() + E, E, 0.0);
  auto const found = gradient_of(numbers, dlogits, {});
  for (std::size_t i = T * M; i < found.size(); ++i) CHECK(std::isfinite(found[i]));
  auto without = numbers;
  std::fill_n(without.begin() + M, M, 0.0);
  auto const expected = gradient_of(without, dlogits, {});
  for (std::size_t i = T * M; i < found.size(); ++i)
    CHECK(found[i] == doctest::Approx(expected[i]));
}

TEST_CASE("layer/cosine_router: float agrees with double, and threads change no bit") {
  auto const numbers = random_case(4, 1.1);
  auto const dlogits = moe_test::normals(T * E, 9);
  std::vector<float> const narrow(numbers.begin(), numbers.end());
  std::vector<float> const dnarrow(dlogits.begin(), dlogits.end());
  auto const l = logits_of(numbers, {});
  auto const f = logits_of(narrow, {});
  for (std::size_t i = 0; i < l.size(); ++i)
    CHECK(double(f[i]) == doctest::Approx(l[i]).epsilon(1e-5));
  moe::thread_team team(3);
  CHECK(logits_of(narrow, {}, moe::cpu(team)) == f);
  CHECK(gradient_of<float>(narrow, dnarrow, {}, 0, moe::cpu(team)) ==
        gradient_of<float>(narrow, dnarrow, {}));
}

TEST_CASE("layer/cosine_router: bad shapes and memory are refused") {
  auto const numbers = random_case(5, 0);
  auto w = parameters::of<double const>(numbers.data() + T * M);
  moe::cpu const exec;
  std::vector<double> logits(T * E);
  moe::buffer const scratch(moe::cosine_logits_scratch<double>(exec, T, w));
  auto const run = [&](auto const& weights, moe::memory room) {
    return refusal([&] {
      moe::cosine_logits<double>(exec, {numbers.data(), T, M}, weights, {}, {logits.data(), T, E},
                                 room);
    });
  };
  says(run(w, moe::memory{}), "cosine_logits: scratch >= cosine_logits_scratch");
  w.bias = {numbers.data(), D - 1};
  says(run(w, scratch), "cosine_logits: tokens are [T,M], projection [M,D], bias [D] or empty");
}
