// SPDX-License-Identifier: MIT
#include <cmath>
#include <doctest/doctest.h>
#include <limits>
#include <support/gradient.hpp>
#include <support/laws.hpp>
#include <support/random.hpp>
#include <vector>

#include <moe/gate/weigh.hpp>

namespace {

template <class V>
moe::choices<4, V> chosen(std::vector<int> const& experts) {
  moe::choices<4, V> c;
  c.k = static_cast<int>(experts.size());
  for (int j = 0; j < c.k; ++j) c.expert[j] = experts[static_cast<std::size_t>(j)];
  return c;
}

template <class P, class V>
std::vector<V> weights(P const& p, std::vector<V> const& scores, std::vector<int> const& experts) {
  auto const c = moe_test::law_weigh(p, scores, chosen<V>(experts));
  return {c.weight, c.weight + c.k};
}

/// Checks backward at these scores, with gradients 1, 2, 3, ... of the weights.
template <class P = moe::renormalised>
void check_backward(P const& p, std::vector<double> const& scores, std::vector<int> const& experts,
                    double tolerance = 1e-7) {
  auto const loss = [&](std::vector<double> const& s) {
    auto const w = weights(p, s, experts);
    double sum = 0;
    for (std::size_t j = 0; j < w.size(); ++j) sum += static_cast<double>(j + 1) * w[j];
    return sum;
  };
  auto const c = moe_test::law_weigh(p, scores, chosen<double>(experts));
  auto dc = c;
  for (int j = 0; j < c.k; ++j) dc.weight[j] = j + 1;
  moe_test::check_gradient(
      loss, scores,
      moe_test::law_weigh_backward(p, scores, c, dc, std::vector<double>(scores.size(), 0.0)),
      tolerance);
}

}  // namespace

TEST_CASE("gate/weigh: every policy keeps the laws of weigh policies") {
  moe_test::weigh_policy_laws(moe::as_scored{});
  moe_test::weigh_policy_laws(moe::renormalised{});
  moe_test::weigh_policy_laws(moe::renormalised{.from_k = 3});
  moe_test::weigh_policy_laws(moe::renormalised{.floor = 100});
  moe_test::weigh_policy_laws(moe::softmax_of_selected{}, {.sd = 3});
  moe_test::weigh_policy_laws(moe::scaled<moe::renormalised>{.factor = 2.5f});
  moe_test::weigh_policy_laws(moe::scaled<moe::as_scored>{.factor = 0});
  moe_test::weigh_policy_laws(moe::renormalised{.floor = 0, .added = 1e-20f});
  moe_test::weigh_policy_laws(moe::renormalised{.floor = 0, .added = 3});
  moe_test::weigh_policy_laws(moe::without<moe::renormalised>{3, 2});
  moe_test::weigh_policy_laws(moe::without<moe::scaled<moe::renormalised>>{0, 1, {2.5f, {}}});
  moe_test::weigh_policy_laws(moe::constant_weight{0.5f});
  moe_test::weigh_policy_laws(moe::sigmoid_of_selected{}, {.sd = 3});
}

TEST_CASE("gate/renormalised: a worked example") {
  std::vector<double> const scores{0.5, 0.125, 0.375};
  CHECK(weights(moe::renormalised{}, scores, {0, 1}) == std::vector<double>{0.8, 0.2});
  CHECK(weights(moe::renormalised{}, scores, {2, -1}) == std::vector<double>{1, 0});
  CHECK(weights(moe::renormalised{}, scores, {-1, -1}) == std::vector<double>{0, 0});
}

TEST_CASE("gate/renormalised: fewer choices than from_k keep their scores") {
  std::vector<double> const scores{0.5, 0.25};
  moe::renormalised const tutel{.from_k = 2};
  CHECK(weights(tutel, scores, {0}) == std::vector<double>{0.5});
  CHECK(weights(tutel, scores, {0, 1})[0] == doctest::Approx(2.0 / 3));
  // k counts what the gate asks for, not what was found.
  CHECK(weights(tutel, scores, {0, -1}) == std::vector<double>{1, 0});
  check_backward(tutel, scores, {0});
  check_backward(tutel, scores, {0, 1});
}

TEST_CASE("gate/renormalised: below the floor the divisor is the floor, and a constant") {
  double const floor = std::numeric_limits<float>::epsilon();
  CHECK(moe::renormalised{}.floor == std::numeric_limits<float>::epsilon());
  CHECK(weights(moe::renormalised{}, std::vector<double>{floor / 4, floor / 8}, {0, 1}) ==
        std::vector<double>{0.25, 0.125});
  CHECK(weights(moe::renormalised{}, std::vector<float>{0, 0}, {0, 1}) == std::vector<float>{0, 0});
  moe::renormalised const high{.floor = 10};
  check_backward(high, {1, 2, 3}, {0, 2});
  check_backward(high, {6, 2, 7}, {0, 2});
}

TEST_CASE("gate/renormalised: right for sums below zero, too") {
  // The floor catches them: no sign changes.
  moe::renormalised const p{.floor = 0.5f};
  CHECK(weights(p, std::vector<double>{-1, -2}, {0, 1}) == std::vector<double>{-2, -4});
  check_backward(p, {-1, -2}, {0, 1});
}

TEST_CASE("gate/renormalised: DeepSeek-V3 adds 1e-20 to the sum instead of a floor") {
  moe::renormalised const v3{.floor = 0, .added = 1e-20f};
  CHECK(weights(v3, std::vector<float>{0.25f, 0.75f}, {0, 1}) == std::vector<float>{0.25f, 0.75f});
  CHECK(weights(v3, std::vector<float>{0, 0}, {0, 1}) == std::vector<float>{0, 0});
  // A sum of 1e-20 weighs half of what a floor of 1e-20 would give.
  CHECK(weights(v3, std::vector<float>{1e-20f}, {0})[0] == doctest::Approx(0.5));
  CHECK(weights(moe::renormalised{.floor = 1e-20f}, std::vector<float>{1e-20f}, {0})[0] == 1);
  // Scores far below FLT_EPSILON still add up to 1.
  CHECK(weights(v3, std::vector<float>{1e-10f, 3e-10f}, {0, 1})[1] == doctest::Approx(0.75));
  check_backward(v3, {0.25, 0.5, 0.75}, {0, 2});
  check_backward({.floor = 0, .added = 0.5f}, {0.25, 0.5, 0.75}, {0, 2});
}

TEST_CASE("gate/without: a zero expert's weight is 0 before the others are renormalised") {
  std::vector<double> const scores{0.5, 0.125, 0.375};
  moe::without<moe::renormalised> const p{2, 1};
  CHECK(weights(p, scores, {0, 1}) == std::vector<double>{0.8, 0.2});
  CHECK(weights(p, scores, {0, 2}) == std::vector<double>{1, 0});
  CHECK(weights(p, scores, {2, 1}) == std::vector<double>{0, 1});
  CHECK(weights(p, scores, {2, -1}) == std::vector<double>{0, 0});
  check_backward(p, scores, {0, 2});
  check_backward(p, scores, {2, 0, 1});
}

TEST_CASE("gate/sigmoid_of_selected: a worked example") {
  std::vector<double> const logits{0, std::log(3.0), -1000, 1000};
  auto const w = weights(moe::sigmoid_of_selected{}, logits, {3, 1, -1, 2});
  CHECK(w[0] == 1);
  CHECK(w[1] == doctest::Approx(0.75));
  CHECK(w[2] == 0);
  CHECK(w[3] == 0);
  check_backward(moe::sigmoid_of_selected{}, {0, 1, -2}, {1, 0});
}

TEST_CASE("gate/constant_weight: 1 for every expert, whatever its score") {
  std::vector<double> const scores{0.5, 0.125, 0.375};
  CHECK(weights(moe::constant_weight{}, scores, {2, -1, 0}) == std::vector<double>{1, 0, 1});
  check_backward(moe::constant_weight{}, scores, {2, 0});
}

TEST_CASE("gate/softmax_of_selected: scores of any size") {
  std::vector<float> const scores{1e38f, -1e38f, 88, 89, 1e38f};
  CHECK(weights(moe::softmax_of_selected{}, scores, {0, 1}) == std::vector<float>{1, 0});
  CHECK(weights(moe::softmax_of_selected{}, scores, {0, 4}) == std::vector<float>{0.5f, 0.5f});
  CHECK(weights(moe::softmax_of_selected{}, scores, {3, 2})[0] == doctest::Approx(0.7310586f));
  CHECK(weights(moe::softmax_of_selected{}, scores, {-1, 1}) == std::vector<float>{0, 1});
  CHECK(weights(moe::softmax_of_selected{}, scores, {-1, -1}) == std::vector<float>{0, 0});
}

TEST_CASE("gate/softmax_of_selected: on logits it is softmax and renormalisation") {
  auto const logits = moe_test::normals(6, 1);
  std::vector<double> p;
  double total = 0;
  for (double l : logits) total += std::exp(l);
  for (double l : logits) p.push_back(std::exp(l) / total);
  auto const a = weights(moe::softmax_of_selected{}, logits, {4, 1, 2});
  auto const b = weights(moe::renormalised{}, p, {4, 1, 2});
  for (std::size_t j = 0; j < 3; ++j) CHECK(a[j] == doctest::Approx(b[j]).epsilon(1e-14));
}

TEST_CASE("gate/scaled: scales weights and gradients") {
  moe::scaled<moe::renormalised> const p{.factor = 2.5f};
  CHECK(weights(p, std::vector<double>{0.25, 0.75}, {1, 0}) == std::vector<double>{1.875, 0.625});
  check_backward(p, {0.25, 0.75}, {1, 0});
  check_backward(moe::scaled<moe::scaled<moe::softmax_of_selected>>{3, {0.5f}}, {1, 2, 3}, {1, 0});
}

TEST_CASE("gate/weigh: gradients do not depend on weights that were changed since") {
  std::vector<double> const scores{0.5, 0.3, 0.2};
  std::vector<double> const zero(3, 0.0);
  auto const check = [&](auto const& p) {
    auto const c = moe_test::law_weigh(p, scores, chosen<double>({0, 2}));
    auto changed = c;
    changed.weight[0] = 17;
    auto dc = c;
    dc.weight[0] = 1;
    dc.weight[1] = -2;
    CHECK(moe_test::law_weigh_backward(p, scores, c, dc, zero) ==
          moe_test::law_weigh_backward(p, scores, changed, dc, zero));
  };
  check(moe::as_scored{});
  check(moe::renormalised{});
  check(moe::softmax_of_selected{});
  check(moe::scaled<moe::softmax_of_selected>{2});
}
