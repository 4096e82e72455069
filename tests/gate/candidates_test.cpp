// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <gate/selected.hpp>
#include <numeric>
#include <set>
#include <support/laws.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/gate/candidates.hpp>
#include <moe/gate/fixed_experts.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/group_limited.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/top_p.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using moe_test::ids;
using moe_test::refusal;
using moe_test::says;
using moe_test::selected;
constexpr float none = moe::no_score<float>;

}  // namespace

TEST_CASE("gate/listed: only experts of the token's list are chosen") {
  moe_test::select_policy_laws(moe::listed<moe::top_k<2>>{});
  std::vector<std::int64_t> const begin{0, 3, 3, 7};
  std::vector<std::int32_t> const expert{4, 0, 2, 1, 1, -5, 99};
  moe::listed<moe::top_k<2>> const p{{}, begin.data(), expert.data()};
  std::vector<float> const keys{1, 9, 3, 8, 2};
  CHECK(selected(p, keys, {.row = 0}) == ids{2, 4});
  CHECK(selected(p, keys, {.row = 1}) == ids{-1, -1});  // an empty list
  CHECK(selected(p, keys, {.row = 2}) == ids{1, -1});   // twice the same, and no experts
  CHECK(selected(p, std::vector<float>{none, 9, none, 8, 2}, {.row = 0}) == ids{4, -1});
}

TEST_CASE("gate/listed: keeps the laws of select policies with lists of its own") {
  std::vector<std::int64_t> const begin{0, 0, 0, 0, 40};  // the law's token has row 3
  std::vector<std::int32_t> expert(40);
  for (std::size_t i = 0; i < 40; ++i) expert[i] = static_cast<std::int32_t>(4 * i);
  moe_test::select_policy_laws(moe::listed<moe::top_k<4>>{{}, begin.data(), expert.data()});
  moe_test::select_policy_laws(
      moe::listed<moe::group_limited<moe::top_k<4>>>{{4, 2, 1}, begin.data(), expert.data()});
}

TEST_CASE("gate/visible_to: a modality sees its own experts") {
  moe_test::select_policy_laws(moe::visible_to<moe::top_k<2>>{});
  std::vector<std::uint8_t> const mask{1, 1, 1, 0, 0, 0, 0, 1, 1, 1};  // text, images
  std::vector<std::int32_t> const modality{1, 0, 7, -1};
  moe::visible_to<moe::top_k<3>> const p{{}, {mask.data(), 2, 5}, modality.data()};
  std::vector<float> const keys{5, 4, 3, 2, 1};
  CHECK(selected(p, keys, {.row = 0}) == ids{2, 3, 4});
  CHECK(selected(p, keys, {.row = 1}) == ids{0, 1, 2});
  CHECK(selected(p, keys, {.row = 2}) == ids{-1, -1, -1});  // no such class
  CHECK(selected(p, keys, {.row = 3}) == ids{-1, -1, -1});
  // Without classes the mask is one of tokens.
  moe::visible_to<moe::top_k<3>> const by_token{{}, {mask.data(), 2, 5}};
  CHECK(selected(by_token, keys, {.row = 1}) == ids{2, 3, 4});
  says(refusal([&] { selected(p, std::vector<float>{1, 2}, {.row = 0}); }),
       "visible_to: the mask has E columns; got columns = 5");
}

TEST_CASE("gate/visible_to: one table of a batch of two modalities") {
  std::vector<std::uint8_t> const mask{1, 1, 0, 0, 0, 0, 1, 1};
  std::vector<std::int32_t> const modality{0, 1, 1, 0};
  using router = moe::gate<moe::softmax, moe::visible_to<moe::top_k<1>>, moe::renormalised>;
  router const gate{.select = {{}, {mask.data(), 2, 4}, modality.data()}};
  std::vector<float> const logits{0, 1, 9, 9, 9, 9, 1, 0, 9, 9, 0, 1, 1, 0, 9, 9};
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<router>(exec, 4));
  moe::routing_buffer out(4, 1, 4);
  moe::route(exec, gate, moe::matrix_view(logits, 4, 4), {}, scratch, out);
  CHECK(ids(out.expert, out.expert + 4) == ids{1, 2, 3, 0});
}

TEST_CASE("gate/top_p: a worked example") {
  std::vector<float> const keys{0.5f, 0.125f, 0.25f, 0.125f};
  CHECK(selected(moe::top_p<3>(0.7f), keys) == ids{0, 2, -1});
  CHECK(selected(moe::top_p<3>(0.5f), keys) == ids{0, -1, -1});
  CHECK(selected(moe::top_p<3>(0.8f), keys) == ids{0, 2, 1});
  CHECK(selected(moe::top_p<3>(1.0f), keys) == ids{0, 2, 1});  // the cap
  CHECK(selected(moe::top_p<4>(1.0f, 2), keys) == ids{0, 2});  // a lower one
  CHECK(selected(moe::top_p<2>(0.01f), keys) == ids{0, -1});   // at least one
  // Shares of the candidates, which need not add up to 1.
  CHECK(selected(moe::top_p<3>(0.6f), std::vector<float>{none, 2, 2, none, 1}) == ids{1, 2, -1});
  CHECK(selected(moe::top_p<2>(0.6f), std::vector<float>{none, none}) == ids{-1, -1});
  CHECK(selected(moe::top_p<2>(0.6f), std::vector<float>{0, 0}) == ids{0, -1});
  says(refusal([] { moe::top_p<2>(0); }), "top_p: 0 < p <= 1, 1 <= k <= MaxK; got p = 0");
  says(refusal([] { moe::top_p<2>(0.5f, 3); }), "got p = 0.5, k = 3, MaxK = 2");
}

TEST_CASE("gate/top_p: the fewest experts that reach the share") {
  moe_test::select_policy_laws(moe::top_p<4>(0.5f), {.mean = 3, .sd = 0.5});
  int counts[9] = {};
  for (unsigned trial = 0; trial < 500; ++trial) {
    auto const logits = moe_test::law_scores<double>(20, trial, 0, 0, 2);
    auto const p = moe_test::law_score(moe::softmax{}, logits, {});
    auto const found = selected(moe::top_p<8>(0.6f), p);
    double reached = 0, before = 0;
    int used = 0;
    for (int const e : found)
      if (e >= 0) {
        before = reached;
        reached += p[static_cast<std::size_t>(e)];
        ++used;
      }
    ++counts[used];
    CHECK(before < 0.6);
    if (used < 8) CHECK(reached >= double(0.6f) - 1e-12);
  }
  CHECK(counts[1] > 0);
  CHECK(counts[3] > 0);
  CHECK(counts[5] > 0);
  CHECK(counts[0] == 0);
  using router = moe::gate<moe::softmax, moe::top_p<4>, moe::renormalised>;
  moe_test::token_gate_laws(router{.select = moe::top_p<4>(0.5f)}, {.sizes = {4, 31, 64}});
}

TEST_CASE("gate/by_table: the experts of the token's word") {
  std::vector<std::int32_t> const table{3, 1, 0, 2, 2, 2, 4, -1};  // [4,2]
  std::vector<std::int32_t> const word{1, 0, 2, 3, 4, -1};
  moe::by_table<4> const p({table.data(), 4, 2}, word.data());
  CHECK(p.k() == 2);
  std::vector<float> const keys{9, 1, 2, 3};
  CHECK(selected(p, keys, {.row = 0}) == ids{0, 2});
  CHECK(selected(p, keys, {.row = 1}) == ids{3, 1});
  CHECK(selected(p, keys, {.row = 2}) == ids{2, -1});   // twice the same
  CHECK(selected(p, keys, {.row = 3}) == ids{-1, -1});  // no experts
  CHECK(selected(p, keys, {.row = 4}) == ids{-1, -1});  // no word
  CHECK(selected(p, keys, {.row = 5}) == ids{-1, -1});
  CHECK(selected(p, std::vector<float>{9, none, 2, 3}, {.row = 1}) == ids{3, -1});
  CHECK(selected(moe::by_table<2>{}, keys) == ids{-1, -1});
  char const* const rule = "by_table: the table is [words,k], 1 <= k <= MaxK";
  says(refusal([&] { moe::by_table<1>({table.data(), 4, 2}, word.data()); }), rule);
  says(refusal([&] { moe::by_table<2>({table.data(), 4, 2}, nullptr); }), rule);
  says(refusal([&] { moe::by_table<2>({table.data(), 4, 2, 1}, word.data()); }), rule);
}

TEST_CASE("gate/by_table: weights are learned scores, with their gradient, or 1") {
  std::vector<std::int32_t> const table{2, 0}, word{0};
  std::vector<double> const logits{1, 5, -1};
  moe::cpu const exec;
  moe::basic_routing_buffer<double> out(1, 2, 3);
  using v4 = moe::gate<moe::sqrt_softplus, moe::by_table<2>, moe::renormalised>;
  v4 const learned{.select = moe::by_table<2>({table.data(), 1, 2}, word.data())};
  moe::buffer const scratch(moe::route_scratch<v4, double>(exec, 3));
  moe::route(exec, learned, moe::matrix_view(logits, 1, 3), {}, scratch, out);
  double const a = std::sqrt(std::log1p(std::exp(-1.0))), b = std::sqrt(std::log1p(std::exp(1.0)));
  CHECK(out.expert[0] == 2);
  CHECK(out.expert[1] == 0);
  CHECK(out.weight[0] == doctest::Approx(a / (a + b)));
  CHECK(out.weight[1] == doctest::Approx(b / (a + b)));
  std::vector<double> const dweights{1, 0};
  std::vector<double> dlogits(3);
  moe::route_backward(exec, learned, moe::matrix_view(logits, 1, 3), out,
                      moe::matrix_view(dweights, 1, 2), {}, scratch,
                      moe::matrix_view(dlogits, 1, 3));
  double const slope = 1 / (1 + std::exp(-1.0)) / (2 * b);  // of b
  CHECK(dlogits[0] == doctest::Approx(-a / ((a + b) * (a + b)) * slope));
  CHECK(dlogits[1] == 0);

  using hash = moe::gate<moe::identity, moe::by_table<2>, moe::constant_weight>;
  hash const fixed{.select = moe::by_table<2>({table.data(), 1, 2}, word.data())};
  moe::route(exec, fixed, moe::matrix_view(logits, 1, 3), {}, scratch, out);
  CHECK(out.weight[0] == 1);
  CHECK(out.weight[1] == 1);
}

TEST_CASE("gate/by_hash: different experts, the same for the same word, spread evenly") {
  constexpr int words = 60000;
  std::vector<std::int32_t> word(words);
  std::iota(word.begin(), word.end(), 0);
  for (int const E : {2, 3, 7, 16, 60, 256})
    for (int const k : {1, 2, 4}) {
      if (k > E) continue;
      CAPTURE(E);
      CAPTURE(k);
      moe::by_hash<4> const p(k, word.data());
      std::vector<int> first(static_cast<std::size_t>(E)), all(first);
      std::vector<float> const keys(static_cast<std::size_t>(E), 0.0f);
      std::set<ids> different;
      for (int w = 0; w < words; w += 3) {
        auto const found = selected(p, keys, {.row = w});
        REQUIRE(std::set<int>(found.begin(), found.end()).size() == found.size());
        REQUIRE(*std::min_element(found.begin(), found.end()) >= 0);
        REQUIRE(*std::max_element(found.begin(), found.end()) < E);
        ++first[static_cast<std::size_t>(found[0])];
        for (int const e : found) ++all[static_cast<std::size_t>(e)];
        different.insert(found);
      }
      double const mean = words / 3.0 / E;
      for (int const n : first) CHECK(std::abs(n - mean) < 6 * std::sqrt(mean));
      if (k == 2 && E > 3) CHECK(different.size() > static_cast<std::size_t>(2 * E));
    }
}

TEST_CASE("gate/by_hash: of the token's id without words; hidden experts are not replaced") {
  moe::by_hash<2> const p(2), other(2, nullptr, 0x2545F4914F6CDD1Du);
  std::vector<float> keys(64, 0.0f);
  auto const found = selected(p, keys, {.id = 77, .row = 5});
  CHECK(found == selected(p, keys, {.id = 77, .row = 6}));
  int same = 0;
  for (int id = 0; id < 200; ++id)
    same += selected(p, keys, {.id = id}) == selected(other, keys, {.id = id});
  CHECK(same < 5);
  keys[static_cast<std::size_t>(found[0])] = none;
  CHECK(selected(p, keys, {.id = 77}) == ids{-1, found[1]});
  says(refusal([] { moe::by_hash<2>(3); }), "by_hash: 1 <= k <= MaxK, the multiplier is odd");
  says(refusal([] { moe::by_hash<2>(2, nullptr, 2); }), "got k = 2, MaxK = 2, multiplier = 2");
}
