// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <gate/selected.hpp>
#include <limits>
#include <random>
#include <string>
#include <support/laws.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <utility>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/group_limited.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using moe_test::ids;
using moe_test::refusal;
using moe_test::says;
using moe_test::selected;
constexpr float none = moe::no_score<float>;

template <int K>
using limited = moe::group_limited<moe::top_k<K>>;

}  // namespace

TEST_CASE("gate/group_limited: keeps the laws of select policies") {
  moe_test::select_policy_laws(limited<4>{});
  moe_test::select_policy_laws(limited<4>{8, 4, 2});
  moe_test::select_policy_laws(limited<3>{3, 1, 1});
  moe_test::select_policy_laws(moe::biased<limited<8>>{{8, 4, 2}, nullptr});
}

TEST_CASE("gate/group_limited: a worked example of each group score") {
  // Groups {9, 0}, {7, 6}, {8, 1}: maxima 9, 7, 8; sums of two 9, 13, 9 (ties to the lower group).
  std::vector<float> const keys{9, 0, 7, 6, 8, 1};
  CHECK(selected(limited<2>(3, 2, 1), keys) == ids{0, 4});
  CHECK(selected(limited<2>(3, 2, 2), keys) == ids{0, 2});
  CHECK(selected(limited<3>(3, 1, 2), keys) == ids{2, 3, -1});
  CHECK(selected(limited<2>(3, 3, 2), keys) == ids{0, 4});  // all groups: plain top-k
}

TEST_CASE("gate/group_limited: Megatron's sum of the best k / kept keys of a group") {
  // k = 6, kept = 2: of the best 3. Groups {5,5,0}, {4,4,4}, {6,0,0}: 10, 12, 6.
  std::vector<float> const keys{5, 5, 0, 4, 4, 4, 6, 0, 0};
  CHECK(selected(limited<6>(3, 2, 3), keys) == ids{0, 1, 3, 4, 5, 2});
  CHECK(selected(limited<1>(3, 1, 1), keys) == ids{6});
}

TEST_CASE("gate/group_limited: fewer candidates than choices give -1, not a masked expert") {
  // The kept group has two experts for three choices.
  CHECK(selected(limited<3>(2, 1, 2), std::vector<float>{3, 2, 1, 0}) == ids{0, 1, -1});
  // A group counts by the candidates it has, and one without any is kept last.
  CHECK(selected(limited<2>(2, 1, 2), std::vector<float>{none, -3, none, none}) == ids{1, -1});
  CHECK(selected(limited<3>(3, 2, 2), std::vector<float>{none, none, 5, none, -1, -2}) ==
        ids{2, 4, 5});
}

TEST_CASE("gate/group_limited: experts that no group divides evenly, fewer experts than groups") {
  // n = 2: {1, 2}, {3, 4}, {9}.
  std::vector<float> const keys{1, 2, 3, 4, 9};
  CHECK(selected(limited<3>(3, 2, 2), keys) == ids{4, 3, 2});
  CHECK(selected(limited<2>(3, 1, 1), keys) == ids{4, -1});
  CHECK(selected(limited<2>(8, 2, 2), std::vector<float>{1, 3, 2}) == ids{1, 2});
  CHECK(selected(limited<1>(64, 1, 2), std::vector<float>{1, 3, 2}) == ids{1});
}

TEST_CASE("gate/group_limited: groups as a plain sort finds them") {
  std::mt19937 random(3);
  int pruned = 0;
  for (int trial = 0; trial < 2000; ++trial) {
    int const groups = 1 + static_cast<int>(random() % 8), n = 1 + static_cast<int>(random() % 7);
    int const kept = 1 + static_cast<int>(random() % static_cast<unsigned>(groups));
    int const best = 1 + static_cast<int>(random() % 3);
    auto keys = moe_test::law_scores<double>(groups * n, static_cast<unsigned>(trial), 0.1);
    if (trial % 2 == 0)
      for (double& v : keys) v = moe::is_candidate(v) ? std::round(v) : v;
    std::vector<std::pair<double, int>> order;
    for (int g = 0; g < groups; ++g) {
      std::vector<double> own(keys.begin() + g * n, keys.begin() + (g + 1) * n);
      std::sort(own.rbegin(), own.rend());
      double sum = own[0];
      for (int i = 1; i < std::min(best, n); ++i)
        if (moe::is_candidate(own[static_cast<std::size_t>(i)]))
          sum += own[static_cast<std::size_t>(i)];
      order.push_back({-sum, g});
    }
    std::stable_sort(order.begin(), order.end());
    std::vector<double> masked(keys.size(), moe::no_score<double>);
    for (int i = 0; i < kept; ++i)
      for (int e = order[static_cast<std::size_t>(i)].second * n;
           e < (order[static_cast<std::size_t>(i)].second + 1) * n; ++e)
        masked[static_cast<std::size_t>(e)] = keys[static_cast<std::size_t>(e)];
    auto const found = selected(limited<4>(groups, kept, best), keys);
    REQUIRE(found == selected(moe::top_k<4>{}, masked));
    pruned += found != selected(moe::top_k<4>{}, keys) ? 1 : 0;
  }
  CHECK(pruned > 500);
}

TEST_CASE("gate/group_limited: negative biased keys, where a mask of 0 would be wrong") {
  // The trap: DeepSeek-V3's keys s + b may be negative. Groups {-1, -2} and {-3, -9}: the first is
  // kept, and both of its experts stand above those of the other, but below a mask of 0.
  std::vector<float> const keys{-1, -2, -3, -9};
  CHECK(selected(limited<2>(2, 1, 2), keys) == ids{0, 1});
  auto masked_by_0 = keys;
  masked_by_0[2] = masked_by_0[3] = 0;
  CHECK(selected(moe::top_k<2>{}, masked_by_0) == ids{2, 3});

  // How often that happens to a router of 256 experts in 8 groups whose biases are low.
  int differ = 0;
  constexpr int rows = 400;
  for (unsigned row = 0; row < rows; ++row) {
    auto const s = moe_test::uniforms<float>(256, row, 0, 1);
    auto const b = moe_test::normals<float>(256, 5000 + row, -1.4, 0.3);
    std::vector<float> biased;
    for (std::size_t e = 0; e < 256; ++e) biased.push_back(s[e] + b[e]);
    std::vector<std::pair<float, int>> order;
    for (int g = 0; g < 8; ++g) {
      std::vector<float> own(biased.begin() + g * 32, biased.begin() + (g + 1) * 32);
      std::sort(own.rbegin(), own.rend());
      order.push_back({-(own[0] + own[1]), g});
    }
    std::stable_sort(order.begin(), order.end());
    auto wrong = biased;
    for (std::size_t i = 4; i < 8; ++i) std::fill_n(wrong.begin() + order[i].second * 32, 32, 0.0f);
    auto const right = selected(limited<8>(8, 4, 2), biased);
    for (int const e : right)
      CHECK(std::any_of(order.begin(), order.begin() + 4,
                        [&](auto const& g) { return g.second == e / 32; }));
    differ += right != selected(moe::top_k<8>{}, wrong) ? 1 : 0;
  }
  CHECK(differ > 0);
}

TEST_CASE("gate/group_limited: bad groups are refused with the values") {
  says(refusal([] { limited<2>(8, 9, 2); }),
       "group_limited: 1 <= kept <= groups <= 64, best >= 1; got kept = 9, groups = 8, best = 2");
  says(refusal([] { limited<2>(65, 1, 2); }), "got kept = 1, groups = 65");
  says(refusal([] { limited<2>(8, 0, 2); }), "got kept = 0");
  says(refusal([] { limited<2>(8, 1, 0); }), "best = 0");
}

TEST_CASE("gate/biased: the bias selects, the scores weigh") {
  std::vector<float> const bias{0, 0, 10, none};
  moe::biased<moe::top_k<3>> const p{{}, bias.data()};
  moe_test::select_policy_laws(moe::biased<moe::top_k<3>>{});
  CHECK(selected(p, std::vector<float>{3, 2, 1, 9}) == ids{2, 0, 1});
  CHECK(selected(p, std::vector<float>{3, none, none, 9}) == ids{0, -1, -1});
  CHECK(selected(moe::biased<moe::top_k<2>>{}, std::vector<float>{3, 2, 1, 9}) == ids{3, 0});
}

TEST_CASE("gate/biased: weights are the scores themselves, however large the bias is") {
  // The trap: (s + b) - b of s = 1e-8 and b = 12 is 0 in float.
  volatile float const s = 1e-8f, b = 12;
  CHECK((s + b) - b == 0);
  using v3 = moe::gate<moe::identity, moe::biased<moe::top_k<2>>, moe::as_scored>;
  std::vector<float> const scores{1e-8f, 3e-8f, 2e-8f}, bias{12, -12, 12};
  v3 const gate{.select = {.bias = bias.data()}};
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<v3>(exec, 3));
  moe::routing_buffer out(1, 2, 3);
  moe::route(exec, gate, moe::matrix_view(scores, 1, 3), {}, scratch, out);
  // Both keys round to 12, so that the tie goes to the lower id: selection has float's precision.
  CHECK(out.expert[0] == 0);
  CHECK(out.expert[1] == 2);
  CHECK(out.weight[0] == 1e-8f);
  CHECK(out.weight[1] == 2e-8f);
}

TEST_CASE("gate/biased: gates with a bias and groups keep the laws of gates") {
  std::vector<float> const bias = moe_test::normals<float>(160, 9, 0, 0.5);
  using v3 = moe::gate<moe::sigmoid, moe::biased<limited<8>>, moe::scaled<moe::renormalised>>;
  v3 const gate{.select = {{8, 4, 2}, bias.data()}, .weigh = {2.5f, {.floor = 0, .added = 1e-20f}}};
  moe_test::token_gate_laws(gate, {.sizes = {8, 31, 64, 160}});
}

TEST_CASE(
    "gate/logit_bias: a bias of the router is seen by scores and weights, and has a gradient") {
  std::vector<float> const bias = moe_test::normals<float>(160, 4);
  moe_test::score_policy_laws(moe::logit_bias<moe::softmax>{{}, bias.data()});
  moe_test::score_policy_laws(moe::logit_bias<moe::identity>{});

  using gpt_oss =
      moe::gate<moe::logit_bias<moe::identity>, moe::top_k<2>, moe::softmax_of_selected>;
  std::vector<double> const logits{1, 2, 3, 0, 5, 1};
  std::vector<float> own{0, 4, 0};
  gpt_oss const gate{.score = {.bias = own.data()}};
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<gpt_oss, double>(exec, 3));
  moe::basic_routing_buffer<double> out(2, 2, 3);
  std::vector<double> const dweights{1, -2, 0.5, 3};
  auto const objective = [&] {
    moe::route(exec, gate, moe::matrix_view(logits, 2, 3), {}, scratch, out);
    double sum = 0;
    for (std::size_t i = 0; i < 4; ++i) sum += dweights[i] * out.weight[i];
    return sum;
  };
  objective();
  // z + b = {1, 6, 3}: experts 1 and 2, weights e^3 / (e^3 + 1) and the rest.
  CHECK(out.expert[0] == 1);
  CHECK(out.expert[1] == 2);
  CHECK(out.weight[0] == doctest::Approx(1 / (1 + std::exp(-3.0))));
  std::vector<double> dlogits(6), dbias(3, 1.0);
  moe::route_backward(exec, gate, moe::matrix_view(logits, 2, 3), out,
                      moe::matrix_view(dweights, 2, 2), {}, scratch,
                      moe::matrix_view(dlogits, 2, 3));
  moe::logit_bias_backward(exec, moe::matrix_view(dlogits, 2, 3), moe::update::add,
                           moe::vector_view(dbias));
  for (std::size_t e = 0; e < 3; ++e) {
    float const before = own[e], h = 0x1p-8f;
    own[e] = before + h;
    double const up = objective();
    own[e] = before - h;
    double const down = objective();
    own[e] = before;
    CHECK(dbias[e] - 1 == doctest::Approx((up - down) / (2 * double(h))).epsilon(1e-4));
  }
  moe::logit_bias_backward(exec, moe::matrix_view(dlogits, 2, 3), moe::update::assign,
                           moe::vector_view(dbias));
  CHECK(dbias[0] == dlogits[0] + dlogits[3]);
  says(refusal([&] {
         moe::logit_bias_backward(exec, moe::matrix_view(dlogits, 3, 2), moe::update::assign,
                                  moe::vector_view(dbias));
       }),
       "logit_bias_backward: dlogits is [T,E], ld >= E, dbias [E]; got E = 2");
}
