// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <numeric>
#include <string>
#include <support/laws.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <utility>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;
using any_k = moe::gate<moe::softmax, moe::top_k<16>, moe::as_scored>;

constexpr float none = moe::no_score<float>;
constexpr float nan_ = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

/// A routing and scores that own their arrays, made by one call of route.
template <class V>
struct routed {
  moe::basic_routing_buffer<V> routing;
  std::vector<V> scores;

  template <class G, class L>
  routed(G const& g, std::vector<L> const& logits, int E, moe::batch const& tokens = {},
         moe::cpu const& exec = {})
      : routing(static_cast<std::int64_t>(logits.size()) / E, g.k(), E),
        scores(logits.size(), V(99)) {
    moe::buffer const scratch(moe::route_scratch<G, V>(exec, E));
    std::fill_n(routing.expert, routing.pairs(), 77);
    moe::route(exec, g, moe::matrix_view(logits, routing.T, E), tokens, scratch, routing,
               moe::matrix_view(scores, routing.T, E));
  }
  std::vector<int> experts() const { return {routing.expert, routing.expert + routing.pairs()}; }
  std::vector<V> weights() const { return {routing.weight, routing.weight + routing.pairs()}; }
  std::vector<V> score() const { return {routing.score, routing.score + routing.pairs()}; }
  bool operator==(routed const& other) const {
    return experts() == other.experts() && weights() == other.weights() &&
           score() == other.score() && scores == other.scores;
  }
};

using moe_test::refusal;
using ids = std::vector<int>;

/// A gate from scratch: the last expert, weighed by its logit.
struct last_expert {
  static constexpr int max_k = 1;
  static constexpr int copies = 0;
  int k() const { return 1; }
  void operator()(moe::array_row<float>& row, moe::choices<1>& c, moe::token const&) const {
    c.k = 1;
    c.expert[0] = row.size() - 1;
    c.weight[0] = row.at(row.size() - 1);
  }
  void backward(moe::array_row<float> const&, moe::choices<1> const& c, moe::choices<1> const& dc,
                moe::array_row<float>& d, moe::token const&) const {
    d.add(c.expert[0], dc.weight[0]);
  }
};

/// A select policy that copies its row and does not say so.
struct greedy {
  int k() const { return 1; }
  static constexpr int max_k = 1;
  void operator()(moe::array_row<float>& keys, moe::choices<1>& c, moe::token const&) const {
    auto const copy = keys.copy();
    c.k = 1;
    c.expert[0] = copy.size() - 1;
  }
};

}  // namespace

TEST_CASE("gate/route: a worked example") {
  std::vector<double> const logits{0,
                                   std::log(2.0),
                                   std::log(5.0),  // 1/8, 2/8, 5/8
                                   std::log(3.0),
                                   std::log(3.0),
                                   0};  // 3/7, 3/7, 1/7
  routed<double> const r(mixtral{}, logits, 3, {.first_id = 4, .step = 9});
  CHECK(r.experts() == ids{2, 1, 0, 1});
  std::vector<double> const weights{5.0 / 7, 2.0 / 7, 0.5, 0.5};
  std::vector<double> const score{5.0 / 8, 2.0 / 8, 3.0 / 7, 3.0 / 7};
  std::vector<double> const scores{1.0 / 8, 2.0 / 8, 5.0 / 8, 3.0 / 7, 3.0 / 7, 1.0 / 7};
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(r.weights()[i] == doctest::Approx(weights[i]).epsilon(1e-14));
    CHECK(r.score()[i] == doctest::Approx(score[i]).epsilon(1e-14));
  }
  for (std::size_t i = 0; i < 6; ++i)
    CHECK(r.scores[i] == doctest::Approx(scores[i]).epsilon(1e-14));
  CHECK(r.routing.tokens.first_id == 4);
  CHECK(r.routing.tokens.step == 9);
}

TEST_CASE("gate/route: agrees with a slow reference in double, whatever the shape") {
  for (auto const& [T_, K_, E_] : {std::array{1, 1, 1},
                                   {5, 2, 2},
                                   {40, 3, 7},
                                   {33, 8, 60},
                                   {70, 2, 64},
                                   {9, 16, 160},
                                   {3, 16, 16},
                                   {4, 6, 384}}) {
    int const T = T_, K = K_, E = E_;  // clang 14 does not capture bindings
    CAPTURE(E);
    CAPTURE(K);
    auto const logits = moe_test::normals<float>(std::int64_t{T} * E, 1);
    any_k g;
    g.select = moe::top_k<16>(K);
    routed<float> const r(g, logits, E);
    routed<double> const exact(g, logits, E);  // float logits, double arithmetic
    for (int t = 0; t < T; ++t) {
      std::vector<double> p;
      double total = 0;
      for (int e = 0; e < E; ++e) {
        p.push_back(std::exp(static_cast<double>(logits[static_cast<std::size_t>(t * E + e)])));
        total += p.back();
      }
      ids order(static_cast<std::size_t>(E));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
        return p[static_cast<std::size_t>(a)] > p[static_cast<std::size_t>(b)];
      });
      for (int j = 0; j < K; ++j) {
        auto const i = static_cast<std::size_t>(t * K + j);
        double const expected =
            p[static_cast<std::size_t>(order[static_cast<std::size_t>(j)])] / total;
        REQUIRE(r.experts()[i] == order[static_cast<std::size_t>(j)]);
        CHECK(std::abs(r.weights()[i] - expected) <= 1e-6 * expected);
        CHECK(std::abs(exact.weights()[i] - expected) <= 1e-14 * expected);
      }
    }
  }
}

TEST_CASE("gate/route: tokens that hold NaN or +inf get no expert, and the others theirs") {
  std::vector<float> const logits{1,        2,    3,    nan_, 5, 6,    0, 0,
                                  infinity, none, none, none, 3, none, 1};
  routed<float> const r(mixtral{}, logits, 3);
  CHECK(r.experts() == ids{2, 1, -2, -2, -2, -2, -1, -1, 0, 2});
  CHECK(r.weights()[2] == 0);
  CHECK(r.weights()[5] == 0);
  CHECK(r.weights()[6] == 0);
  CHECK(r.score()[3] == 0);
  CHECK(r.weights()[8] == doctest::Approx(0.8807971f));
  for (std::size_t const e : {3u, 4u, 5u, 6u, 7u, 8u, 9u, 10u, 11u, 13u})
    CHECK(r.scores[e] == none);
  CHECK(r.scores[12] == doctest::Approx(0.8807971f));
  // A NaN or infinity in any place of a row is seen.
  for (int E : {1, 3, 4, 31, 64, 70})
    for (int at = 0; at < E; ++at)
      for (float const bad : {nan_, -nan_, infinity}) {
        std::vector<float> row(static_cast<std::size_t>(E), 1.0f);
        row[static_cast<std::size_t>(at)] = bad;
        any_k g;
        g.select = moe::top_k<16>(1);
        CHECK(routed<float>(g, row, E).experts() == ids{moe::invalid_token});
        std::vector<double> const wide(row.begin(), row.end());
        CHECK(routed<double>(g, wide, E).experts() == ids{moe::invalid_token});
      }
}

TEST_CASE("gate/route: masked tokens get no expert, but scores") {
  std::vector<float> const logits{0, 1, 2, 3, nan_, 0};
  std::vector<std::uint8_t> const live{1, 0, 0};
  routed<float> const r(mixtral{}, logits, 2, {.live = live.data()});
  CHECK(r.experts() == ids{1, 0, -1, -1, -1, -1});
  CHECK(r.weights()[2] == 0);
  CHECK(r.scores[3] == doctest::Approx(0.7310586f));
  CHECK(r.scores[4] == none);  // masked and invalid: masked
}

TEST_CASE("gate/route: results do not depend on threads or on the batch split") {
  constexpr int E = 20;
  constexpr std::int64_t T = 301;
  auto const logits = moe_test::normals<float>(T * E, 3);
  using gate = moe::random_second<
      moe::gate<moe::noisy<moe::softmax>, moe::sampled_second<>, moe::renormalised>>;
  moe::batch const tokens{.first_id = 1000, .seed = 5, .step = 2, .training = true};
  routed<float> const all(gate{}, logits, E, tokens);
  for (int threads : {2, 3, 7}) {
    CAPTURE(threads);
    moe::thread_team team(threads);
    CHECK(routed<float>(gate{}, logits, E, tokens, moe::cpu(team)) == all);
  }
  auto rest = tokens;
  rest.first_id += 200;
  routed<float> const tail(gate{}, std::vector<float>(logits.begin() + 200 * E, logits.end()), E,
                           rest);
  auto const experts = all.experts();
  CHECK(tail.experts() == ids(experts.begin() + 400, experts.end()));
  auto other = tokens;
  other.seed = 6;
  CHECK(routed<float>(gate{}, logits, E, other).experts() != experts);
  other = tokens;
  other.training = false;
  routed<float> const quiet(gate{}, logits, E, other);
  CHECK(quiet.experts() == routed<float>(mixtral{}, logits, E).experts());
}

TEST_CASE("gate/route: no tokens, no score array, leading dimensions, no scores") {
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<mixtral>(exec, 3));
  moe::routing nothing{.T = 0, .K = 2, .E = 3, .tokens = {}};
  moe::route(exec, mixtral{}, moe::matrix_view<float const>(nullptr, 0, 3), {}, scratch, nothing);

  std::vector<float> const logits{1, 2, 3, nan_, nan_, 3, 2, 1, nan_, nan_};
  std::vector<std::int32_t> expert(4, 77);
  std::vector<float> weight(4, 77.0f);
  moe::routing r{
      .T = 2, .K = 2, .E = 3, .expert = expert.data(), .weight = weight.data(), .tokens = {}};
  moe::route(exec, mixtral{}, moe::matrix_view(logits.data(), 2, 3, 5), {}, scratch, r);
  CHECK(expert == std::vector<std::int32_t>{2, 1, 0, 1});
  std::vector<float> scores(8, 55.0f);
  moe::route(exec, mixtral{}, moe::matrix_view(logits.data(), 2, 3, 5), {}, scratch, r,
             {scores.data(), 2, 3, 4});
  CHECK(scores[3] == 55);
  CHECK(scores[7] == 55);
  CHECK(scores[4] == doctest::Approx(0.6652410f));
  CHECK(expert == std::vector<std::int32_t>{2, 1, 0, 1});
}

TEST_CASE("gate/route: a gate that is not a composition") {
  std::vector<float> const logits{1, 2, 3, 4};
  routed<float> const r(last_expert{}, logits, 2);
  CHECK(r.experts() == ids{1, 1});
  CHECK(r.weights() == std::vector<float>{2, 4});
  std::vector<float> const dweight{5, 6};
  std::vector<float> dlogits(4, 99.0f);
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<last_expert>(exec, 2));
  moe::route_backward(exec, last_expert{}, moe::matrix_view(logits, 2, 2), r.routing,
                      {dweight, 2, 1}, {}, scratch, moe::matrix_view(dlogits, 2, 2));
  CHECK(dlogits == std::vector<float>{0, 5, 0, 6});
}

TEST_CASE("gate/route: a gate that makes more copies than it declares is caught") {
  CHECK(refusal([] {
          routed<float>(moe::gate<moe::softmax, greedy, moe::as_scored>{}, std::vector<float>{1, 2},
                        2);
        }).find("array_row::copy: ") == 0);
}

TEST_CASE("gate/route: bad input is refused with the values") {
  moe::cpu const exec;
  std::vector<float> const logits(12);
  std::vector<float> scores(12);
  moe::buffer const scratch(moe::route_scratch<mixtral>(exec, 3));
  moe::routing_buffer good(4, 2, 3);
  auto const with = [&](moe::matrix_view<float const> view, moe::routing& r,
                        moe::matrix_view<float> s = {}, moe::memory m = {}) {
    return refusal([&] { moe::route(exec, mixtral{}, view, {}, m, r, s); });
  };
  auto const starts = [](std::string const& text, char const* with_this) {
    CAPTURE(text);
    CHECK(text.find(with_this) == 0);
  };
  char const* const shape = "route: logits are [T,E], E >= K, ld >= E; got T = ";
  starts(with({logits.data(), 4, 1}, good), shape);
  starts(with({logits.data(), 4, 3, 2}, good), shape);
  starts(with({nullptr, 4, 3}, good), shape);
  char const* const extents =
      "route: the routing has the T and E of the logits and the k of the gate; got routing's T = ";
  moe::routing_buffer shorter(3, 2, 3), wider(4, 3, 3), more(4, 2, 4);
  starts(with({logits.data(), 4, 3}, shorter), extents);
  starts(with({logits.data(), 4, 3}, wider), extents);
  starts(with({logits.data(), 4, 3}, more), extents);
  moe::routing empty{.T = 4, .K = 2, .E = 3, .tokens = {}};
  starts(with({logits.data(), 4, 3}, empty), "route: the routing has arrays");
  starts(with({logits.data(), 4, 3}, good, {scores.data(), 3, 3}), "route: scores are [T,E]");
  starts(with({logits.data(), 4, 3}, good, {scores.data(), 4, 3, 2}), "route: scores are [T,E]");
  char const* const apart = "route: outputs overlap neither the logits nor each other";
  starts(with({scores.data(), 4, 3}, good, {scores.data(), 4, 3}), apart);
  starts(with({logits.data(), 4, 3}, good, {good.weight - 4, 4, 3}), apart);
  starts(with({logits.data(), 4, 3}, good, {}, {scratch.data(), 8}),
         "route: scratch has route_scratch<Gate, V>(exec, E) bytes; got bytes needed = ");
  starts(with({logits.data(), 4, 3}, good, {}, scratch), "nothing was thrown");
}

TEST_CASE("gate/gate: compositions keep the laws of token gates") {
  moe_test::token_gate_laws(mixtral{});
  moe_test::token_gate_laws(moe::gate<moe::softmax, moe::top_k<1>, moe::as_scored>{});
  moe_test::token_gate_laws(
      moe::gate<moe::sigmoid, moe::top_k<4>, moe::scaled<moe::renormalised>>{{}, {}, {2.5f}});
  moe_test::token_gate_laws(moe::gate<moe::identity, moe::top_k<4>, moe::softmax_of_selected>{});
  moe_test::law_options options;
  options.token.training = true;
  moe_test::token_gate_laws(
      moe::gate<moe::noisy<moe::softmax>, moe::sampled<moe::top_k<3>>, moe::renormalised>{},
      options);
}
