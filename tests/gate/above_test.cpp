// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <support/gradient.hpp>
#include <support/laws.hpp>
#include <support/random.hpp>
#include <vector>

#include <moe/gate/above.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using by_threshold = moe::gate<moe::identity, moe::above<>, moe::as_scored>;

std::vector<int> decide(std::vector<double> const& r, float threshold) {
  auto const T = static_cast<std::int64_t>(r.size());
  moe::cpu const exec;
  by_threshold const gate{{}, {{}, threshold}, {}};
  moe::basic_routing_buffer<double> routed(T, 1, 1);
  moe::buffer const scratch(moe::route_scratch<by_threshold, double>(exec, 1));
  moe::route(exec, gate, moe::matrix_view(r, T, 1), {}, scratch, routed);
  for (std::int64_t t = 0; t < T; ++t)
    CHECK(routed.weight[t] == (routed.expert[t] < 0 ? 0 : r[static_cast<std::size_t>(t)]));
  return {routed.expert, routed.expert + T};
}

}  // namespace

TEST_CASE("gate/above: keeps the laws of select policies") {
  float const none = -std::numeric_limits<float>::infinity();
  moe_test::select_policy_laws(moe::above<>{{}, none});
  moe_test::select_policy_laws(moe::above<moe::top_k<3>>{{}, none});
  moe_test::select_policy_laws(moe::above<moe::top_k<16>>{moe::top_k<16>(2), none});
  CHECK(moe::above<moe::top_k<4>>{moe::top_k<4>(3)}.k() == 3);
}

TEST_CASE("gate/above: mixture of depths token by token, by hand") {
  CHECK(decide({0.5, -1, 2, 0, 0.25}, 0) == std::vector<int>{0, -1, 0, -1, 0});
  CHECK(decide({0.5, -1, 2, 0, 0.25}, 0.25f) == std::vector<int>{0, -1, 0, -1, -1});
  CHECK(decide({0.5, -1}, -1) == std::vector<int>{0, -1});
}

TEST_CASE("gate/above: is causal: a decision does not depend on other tokens") {
  auto const r = moe_test::normals(50, 1);
  auto const all = decide(r, 0.3f);
  for (std::size_t t = 1; t <= r.size(); ++t)
    CHECK(decide({r.begin(), r.begin() + static_cast<std::ptrdiff_t>(t)}, 0.3f) ==
          std::vector<int>(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(t)));
}

TEST_CASE("gate/above: of several experts, the best ones above the threshold") {
  moe_test::owned_row<float> row({1, 5, 3, 0, 4}, 0);
  moe::choices<4> chosen;
  moe::above<moe::top_k<4>>{{}, 1}(row.row(), chosen, {});
  CHECK(std::vector<int>(chosen.expert, chosen.expert + 4) == std::vector<int>{1, 4, 2, -1});
}

TEST_CASE("gate/above: gradients reach the logits of tokens that pass") {
  moe::cpu const exec;
  by_threshold const gate{};
  auto const r = moe_test::normals(9, 2), dweight = moe_test::normals(9, 3);
  moe::basic_routing_buffer<double> routed(9, 1, 1);
  moe::buffer const scratch(moe::route_scratch<by_threshold, double>(exec, 1));
  auto const loss = [&](std::vector<double> const& l) {
    moe::route(exec, gate, moe::matrix_view(l, 9, 1), {}, scratch, routed);
    double sum = 0;
    for (int t = 0; t < 9; ++t) sum += dweight[static_cast<std::size_t>(t)] * routed.weight[t];
    return sum;
  };
  loss(r);
  std::vector<double> d(9);
  moe::route_backward(exec, gate, moe::matrix_view(r, 9, 1), routed, {dweight, 9, 1}, {}, scratch,
                      moe::matrix_view(d, 9, 1));
  moe_test::check_gradient(loss, r, d);
}
