// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

namespace {

constexpr double none = moe::no_score<double>;
using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;

/// A problem with all gradients given: d/dweights, d/dscores by expert and by token.
struct problem {
  std::int64_t T;
  int E;
  std::vector<double> logits, dweight, dexpert, dtoken;
  moe::batch tokens;
  bool reaches_masked = false;

  problem(std::int64_t tokens_count, int experts, int K)
      : T(tokens_count),
        E(experts),
        logits(moe_test::normals(T * E, 1)),
        dweight(moe_test::normals(T * K, 2)),
        dexpert(moe_test::normals(E, 3)),
        dtoken(moe_test::normals(T * E, 4)) {}

  /// The loss that has these gradients, as a function of the logits.
  template <class G>
  double loss(G const& g, std::vector<double> const& l) const {
    moe::cpu const exec;
    moe::basic_routing_buffer<double> r(T, g.k(), E);
    moe::buffer const scratch(moe::route_scratch<G, double>(exec, E));
    std::vector<double> scores(l.size());
    moe::route(exec, g, moe::matrix_view(l, T, E), tokens, scratch, r, {scores, T, E});
    double sum = 0;
    for (std::int64_t i = 0; i < r.pairs(); ++i)
      sum += r.weight[i] * dweight[static_cast<std::size_t>(i)];
    for (std::int64_t t = 0; t < T; ++t)
      for (int e = 0; e < E; ++e) {
        auto const i = static_cast<std::size_t>(t * E + e);
        if (!moe::is_candidate(scores[i])) continue;
        sum += scores[i] * dtoken[i];
        if (tokens.is_live(t) || reaches_masked)
          sum += scores[i] * dexpert[static_cast<std::size_t>(e)];
      }
    return sum;
  }

  template <class V = double, class G>
  std::vector<V> gradient(G const& g, moe::cpu const& exec = {}) const {
    auto const cast = [](std::vector<double> const& from) {
      return std::vector<V>(from.begin(), from.end());
    };
    auto const l = cast(logits), dw = cast(dweight), de = cast(dexpert), dt = cast(dtoken);
    moe::basic_routing_buffer<V> r(T, g.k(), E);
    moe::buffer const scratch(moe::route_scratch<G, V>(exec, E));
    moe::route(exec, g, moe::matrix_view(l, T, E), tokens, scratch, r);
    std::vector<V> dlogits(l.size(), V(99));
    moe::route_backward(exec, g, moe::matrix_view(l, T, E), r, {dw, T, g.k()},
                        {.expert = de, .reaches_masked = reaches_masked, .token = {dt, T, E}},
                        scratch, moe::matrix_view(dlogits, T, E));
    return dlogits;
  }

  template <class G>
  void check(G const& g) const {
    moe_test::check_gradient([&](std::vector<double> const& l) { return loss(g, l); }, logits,
                             gradient(g));
  }
};

}  // namespace

TEST_CASE("gate/route_backward: gradients of whole gates agree with central differences") {
  problem const p(5, 7, 2);
  p.check(mixtral{});
  p.check(moe::gate<moe::softmax, moe::top_k<2>, moe::as_scored>{});
  p.check(moe::gate<moe::softmax, moe::top_k<2>, moe::softmax_of_selected>{});
  p.check(moe::gate<moe::sigmoid, moe::top_k<2>, moe::scaled<moe::renormalised>>{{}, {}, {2.5f}});
  p.check(moe::gate<moe::identity, moe::top_k<2>, moe::softmax_of_selected>{});
  p.check(moe::gate<moe::sigmoid, moe::top_k<2>, moe::renormalised>{{}, {}, {.floor = 10}});
  std::vector<std::uint8_t> const mask{1, 0, 1, 1, 0, 1, 1};
  p.check(moe::gate<moe::softmax, moe::visible<moe::top_k<2>>, moe::renormalised>{
      {}, {{}, mask.data()}, {}});
  std::vector<std::int32_t> const ids{0, 1, 2, 3, 4, 5, 6, 0, 3, 3};
  p.check(moe::gate<moe::softmax, moe::replayed<2>, moe::renormalised>{
      {}, moe::replayed<2>(ids.data(), 2, 2), {}});
  problem(6, 1, 1).check(moe::gate<moe::sigmoid, moe::top_k<1>, moe::as_scored>{});
  problem(2, 40, 8).check(moe::gate<moe::softmax, moe::top_k<8>, moe::renormalised>{});
  problem(3, 4, 4).check(moe::gate<moe::softmax, moe::top_k<4>, moe::renormalised>{});
}

TEST_CASE("gate/route_backward: noise is drawn again") {
  problem p(20, 6, 2);
  p.tokens = {.first_id = 3, .seed = 4, .step = 5, .training = true};
  p.check(moe::gate<moe::noisy<moe::softmax>, moe::top_k<2>, moe::renormalised>{});
  p.check(moe::gate<moe::softmax, moe::sampled<moe::top_k<2>>, moe::renormalised>{});
  p.check(moe::gate<moe::softmax, moe::sampled_second<>, moe::renormalised>{});
  p.check(moe::random_second<
          moe::gate<moe::noisy<moe::softmax>, moe::sampled_second<>, moe::renormalised>>{});
}

TEST_CASE("gate/route_backward: -inf logits have gradient 0, and rows with few candidates work") {
  problem p(4, 5, 2);
  for (std::size_t const i : {0u, 3u, 6u, 7u, 8u, 9u, 10u, 11u, 12u, 13u, 14u}) p.logits[i] = none;
  p.check(mixtral{});
  p.check(moe::gate<moe::sigmoid, moe::top_k<2>, moe::renormalised>{});
  p.check(moe::gate<moe::identity, moe::top_k<2>, moe::softmax_of_selected>{});
  auto const d = p.gradient(mixtral{});
  for (std::size_t i = 0; i < d.size(); ++i)
    if (p.logits[i] == none) CHECK(d[i] == 0);
}

TEST_CASE("gate/route_backward: masked tokens take gradients of scores only where told") {
  problem p(3, 4, 2);
  std::vector<std::uint8_t> const live{1, 0, 1};
  p.tokens.live = live.data();
  p.check(mixtral{});
  p.reaches_masked = true;
  p.check(mixtral{});
  p.dtoken.assign(p.dtoken.size(), 0.0);
  auto d = p.gradient(mixtral{});
  CHECK(d[4] != 0);
  p.reaches_masked = false;
  d = p.gradient(mixtral{});
  for (std::size_t const i : {4u, 5u, 6u, 7u}) CHECK(d[i] == 0);
  CHECK(d[0] != 0);

  // Gradients of a masked token's weights are not read, even where a routing gives it experts.
  moe::cpu const exec;
  std::vector<std::int32_t> expert{0, 1, 2, 3, 1, 2};
  moe::basic_routing<double> const given{
      .T = 3, .K = 2, .E = 4, .expert = expert.data(), .tokens = p.tokens};
  p.dweight[2] = p.dweight[3] = std::numeric_limits<double>::quiet_NaN();
  moe::buffer const scratch(moe::route_scratch<mixtral, double>(exec, 4));
  moe::route_backward(exec, mixtral{}, moe::matrix_view(p.logits, 3, 4), given, {p.dweight, 3, 2},
                      {}, scratch, moe::matrix_view(d, 3, 4));
  for (std::size_t const i : {4u, 5u, 6u, 7u}) CHECK(d[i] == 0);
  CHECK(d[0] != 0);
}

TEST_CASE("gate/route_backward: invalid tokens have gradient 0 and spoil no other") {
  problem p(3, 4, 2);
  auto const clean = p.gradient(mixtral{});
  p.logits[5] = std::numeric_limits<double>::quiet_NaN();
  auto d = p.gradient(mixtral{});
  for (std::size_t i = 0; i < 12; ++i) CHECK(d[i] == (i / 4 == 1 ? 0 : clean[i]));
  p.logits[5] = std::numeric_limits<double>::infinity();
  d = p.gradient(mixtral{});
  for (std::size_t i = 0; i < 12; ++i) CHECK(d[i] == (i / 4 == 1 ? 0 : clean[i]));
}

TEST_CASE("gate/route_backward: parts that are not given count as 0") {
  problem p(3, 4, 2);
  moe::cpu const exec;
  moe::basic_routing_buffer<double> r(3, 2, 4);
  moe::buffer const scratch(moe::route_scratch<mixtral, double>(exec, 4));
  moe::matrix_view const logits(p.logits, 3, 4);
  moe::route(exec, mixtral{}, logits, {}, scratch, r);
  std::vector<double> d(12, 99);
  moe::route_backward(exec, mixtral{}, logits, r, {}, {}, scratch, moe::matrix_view(d, 3, 4));
  CHECK(d == std::vector<double>(12, 0.0));

  moe::route_backward(exec, mixtral{}, logits, r, {}, {.token = {p.dtoken, 3, 4}}, scratch,
                      moe::matrix_view(d, 3, 4));
  auto q = p;
  q.dweight.assign(6, 0.0);
  q.dexpert.assign(4, 0.0);
  CHECK(d == q.gradient(mixtral{}));

  moe::route_backward(exec, mixtral{}, logits, r, {p.dweight, 3, 2}, {}, scratch,
                      moe::matrix_view(d, 3, 4));
  q = p;
  q.dexpert.assign(4, 0.0);
  q.dtoken.assign(12, 0.0);
  CHECK(d == q.gradient(mixtral{}));

  // Ids that are no experts of these logits take no part, and read nothing.
  r.expert[0] = 1000000;
  r.expert[1] = -17;
  moe::route_backward(exec, mixtral{}, logits, r, {p.dweight, 3, 2}, {}, scratch,
                      moe::matrix_view(d, 3, 4));
  for (std::size_t e = 0; e < 4; ++e) CHECK(d[e] == 0);
  CHECK(d[4] == q.gradient(mixtral{})[4]);
}

TEST_CASE("gate/route_backward: float agrees with double; threads change nothing") {
  problem p(301, 24, 3);
  p.tokens = {.seed = 1, .training = true};
  using gate = moe::gate<moe::noisy<moe::softmax>, moe::top_k<3>, moe::renormalised>;
  auto const exact = p.gradient(gate{});
  auto const d = p.gradient<float>(gate{});
  for (std::size_t i = 0; i < d.size(); ++i) CHECK(std::abs(d[i] - exact[i]) < 2e-5);
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    CHECK(p.gradient<float>(gate{}, moe::cpu(team)) == d);
  }
}

TEST_CASE("gate/route_backward: leading dimensions, another output type, no tokens") {
  problem p(3, 4, 2);
  auto const expected = p.gradient(mixtral{});
  moe::cpu const exec;
  std::vector<double> wide(3 * 6, std::numeric_limits<double>::quiet_NaN());
  std::vector<double> dw(3 * 5, 99.0), dt(3 * 7, 99.0);
  for (std::size_t t = 0; t < 3; ++t) {
    for (std::size_t e = 0; e < 4; ++e) {
      wide[t * 6 + e] = p.logits[t * 4 + e];
      dt[t * 7 + e] = p.dtoken[t * 4 + e];
    }
    for (std::size_t j = 0; j < 2; ++j) dw[t * 5 + j] = p.dweight[t * 2 + j];
  }
  moe::basic_routing_buffer<double> r(3, 2, 4);
  moe::buffer const scratch(moe::route_scratch<mixtral, double>(exec, 4));
  moe::matrix_view const logits(wide.data(), 3, 4, 6);
  moe::route(exec, mixtral{}, logits, {}, scratch, r);
  std::vector<float> d(3 * 8, 99.0f);
  moe::route_backward(exec, mixtral{}, logits, r, {dw.data(), 3, 2, 5},
                      {.expert = p.dexpert, .token = {dt.data(), 3, 4, 7}}, scratch,
                      moe::matrix_view(d.data(), 3, 4, 8));
  for (std::size_t t = 0; t < 3; ++t)
    for (std::size_t e = 0; e < 8; ++e)
      CHECK(d[t * 8 + e] == (e < 4 ? static_cast<float>(expected[t * 4 + e]) : 99.0f));

  moe::routing const nothing{.T = 0, .K = 2, .E = 4, .tokens = {}};
  moe::route_backward(exec, mixtral{}, moe::matrix_view<float const>(nullptr, 0, 4), nothing, {},
                      {}, scratch, moe::matrix_view<float>(nullptr, 0, 4));
}

TEST_CASE("gate/route_backward: bad input is refused") {
  moe::cpu const exec;
  std::vector<float> const logits(12), dw(8);
  std::vector<float> d(12);
  moe::buffer const scratch(moe::route_scratch<mixtral>(exec, 3));
  moe::routing_buffer r(4, 2, 3);
  moe::route(exec, mixtral{}, moe::matrix_view(logits, 4, 3), {}, scratch, r);
  using in = moe::matrix_view<float const>;
  using out = moe::matrix_view<float>;
  auto const with = [&](in l, moe::routing const& given, in dweight,
                        moe::score_gradient<float> const& ds, out dl, moe::memory m,
                        char const* text) {
    std::string got = "nothing was thrown";
    try {
      moe::route_backward(exec, mixtral{}, l, given, dweight, ds, m, dl);
    } catch (moe::precondition_error const& e) {
      got = e.what();
    }
    CAPTURE(got);
    CAPTURE(text);
    CHECK(got.find(text) == 0);
  };
  in const l{logits.data(), 4, 3}, w{dw.data(), 4, 2};
  out const dl{d.data(), 4, 3};
  with(l, r, w, {}, dl, scratch, "nothing");
  with({logits.data(), 4, 3, 2}, r, w, {}, dl, scratch, "route_backward: logits are [T,E]");
  with({logits.data(), 3, 3}, r, w, {}, dl, scratch, "route_backward: the routing is one that");
  with({logits.data(), 3, 4}, r, w, {}, dl, scratch, "route_backward: the routing is one that");
  with(l, r, {dw.data(), 4, 1}, {}, dl, scratch, "route_backward: dweight is [T,K], ld >= K");
  with(l, r, w, {.expert = {dw.data(), 2}}, dl, scratch,
       "route_backward: dscores.expert is [E]; got size = 2, E = 3");
  with(l, r, w, {.token = {logits.data(), 4, 2}}, dl, scratch, "route_backward: dscores.token is");
  with(l, r, w, {}, {}, scratch, "route_backward: dlogits is given");
  with(l, r, w, {}, {d.data(), 4, 3, 1}, scratch, "route_backward: dlogits is [T,E], ld >= E");
  with({d.data(), 4, 3}, r, w, {}, dl, scratch, "route_backward: dlogits overlaps no input");
  with(l, r, {d.data(), 4, 2}, {}, dl, scratch, "route_backward: dlogits overlaps no input");
  with(l, r, w, {.expert = {d.data() + 11, 3}}, dl, scratch, "route_backward: dlogits overlaps");
  with(l, r, w, {.token = {d.data() + 6, 4, 3}}, dl, scratch, "route_backward: dlogits overlaps");
  with(l, r, w, {}, dl, {scratch.data(), 16}, "route_backward: scratch has route_scratch<");
}
