// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <support/instrumented.hpp>
#include <support/refusal.hpp>
#include <utility>
#include <vector>

#include <moe/comm/deduplicated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/comm/verify.hpp>

namespace {

using moe::exchange_plan;
using moe::first_hop;
using moe::piece;
using moe::row_action;
using moe::row_move;
using moe::topology;
using plans = std::vector<exchange_plan>;

constexpr moe::two_hop inter_first{first_hop::inter}, intra_first{first_hop::intra};

void check_verdict(plans const& p) {
  moe::plan_verdict const v = moe::verify_plans(p);
  CAPTURE(static_cast<int>(v.error));
  CAPTURE(v.rank);
  CAPTURE(v.phase);
  CAPTURE(v.slot);
  REQUIRE(static_cast<bool>(v));
}

plans transposed(plans const& there) {
  plans back;
  back.reserve(there.size());
  for (exchange_plan const& p : there) back.push_back(transpose(p));
  return back;
}

/// Every move as often as it stands there, in one order; moves of slots side by side apart.
std::vector<row_move> sorted(std::vector<row_move> const& moves) {
  std::vector<row_move> single;
  for (row_move const& m : moves)
    for (int i = 0; i < m.count; ++i)
      single.push_back(
          {{m.from.buffer, m.from.slot + i}, {m.to.buffer, m.to.slot + i}, 1, m.action, m.what});
  std::sort(single.begin(), single.end(), [](row_move const& a, row_move const& b) {
    return std::pair(a.to.buffer, a.to.slot) < std::pair(b.to.buffer, b.to.slot);
  });
  return single;
}
/// A token plan writes every slot once, so the order of moves is free.
exchange_plan in_one_order(exchange_plan p) {
  for (moe::exchange_phase& phase : p.phases) phase.moves = sorted(phase.moves);
  p.last = sorted(p.last);
  return p;
}

/// The ends are those of an exchange of tokens, and there and back the plans do what they say.
void check_tokens(plans const& there, topology const& ranks) {
  CAPTURE(ranks.size());
  CAPTURE(ranks.nodes());
  int const R = ranks.size();
  REQUIRE(static_cast<int>(there.size()) == R);
  bool ends = true;
  for (int i = 0; i < R; ++i) {
    exchange_plan const& p = there[static_cast<std::size_t>(i)];
    ends = ends && p.rank == ranks.rank(i) && p.epoch == ranks.epoch();
    ends = ends && p.input == std::vector{piece{i, 0, 0, R}};
    std::vector<piece> names = p.output;
    std::sort(names.begin(), names.end(),
              [](piece const& a, piece const& b) { return a.source < b.source; });
    ends = ends && static_cast<int>(names.size()) == R;
    for (int s = 0; s < R && ends; ++s) ends = names[static_cast<std::size_t>(s)] == piece{s, i};
  }
  REQUIRE(ends);
  check_verdict(there);
  plans const back = transposed(there);
  check_verdict(back);
  plans const again = transposed(back);
  check_verdict(again);
  bool same = true;
  for (std::size_t i = 0; i < there.size(); ++i)
    same = same && in_one_order(again[i]) == in_one_order(there[i]);
  REQUIRE(same);
  // There and back a token is multiplied by the number of ranks that want it, which its name does not say.
  plans home;
  for (std::size_t i = 0; i < there.size(); ++i) home.push_back(then(there[i], back[i]));
  CHECK(moe::verify_plans(home).error ==
        (R == 1 ? moe::plan_error::none : moe::plan_error::wrong_rows));
}

template <class Strategy>
void check_tokens_of(Strategy const& strategy, topology const& ranks) {
  check_tokens(moe::make_token_plans(strategy, ranks), ranks);
}

/// All tokens go to all ranks; what a rank has sent to several comes back as a sum.
void check_sharded_tokens(topology const& ranks) {
  int const R = ranks.size();
  plans const there = moe::make_token_plans(moe::sharded{}, ranks);
  bool ends = static_cast<int>(there.size()) == R;
  for (int i = 0; i < R && ends; ++i) {
    exchange_plan const& p = there[static_cast<std::size_t>(i)];
    ends = p.rank == ranks.rank(i) && p.epoch == ranks.epoch() &&
           p.input == std::vector{piece{i, 0, 0, R}} && static_cast<int>(p.output.size()) == R;
    for (int s = 0; s < R && ends; ++s)
      ends = p.output[static_cast<std::size_t>(s)] == piece{s, 0, 0, R};
  }
  REQUIRE(ends);
  check_verdict(there);
  plans const back = transposed(there);
  check_verdict(back);
  check_verdict(transposed(back));
}

std::vector<topology> small_topologies() {
  std::vector<topology> all;
  for (auto const& [nodes, G] :
       {std::pair{1, 1}, {1, 2}, {2, 1}, {1, 5}, {5, 1}, {2, 2}, {3, 5}, {4, 8}, {8, 4}})
    all.push_back(topology::even(nodes, G));
  for (std::vector<int> const& sizes :
       {std::vector{1, 2}, {2, 1}, {3, 1, 2}, {5, 5, 4}, {1, 7, 1, 3}, {8, 2}, {2, 8}, {1, 1, 9}})
    all.push_back(topology::of_nodes(sizes));
  all.push_back(topology::even(3, 5).grouped(4));
  all.push_back(topology::even(1, 16).grouped(7));
  all.push_back(topology::even(3, 2).surviving({.epoch = 3, .alive = {1, 0, 1, 1, 0, 0}}));
  all.push_back(topology::even(3, 3).surviving({.epoch = 4, .alive = {0, 0, 1, 1, 1, 1, 0, 0, 1}}));
  all.push_back(topology::even(2, 4).surviving({.epoch = 9, .alive = {0, 1, 1, 0, 1, 0, 1, 1}}));
  all.push_back(topology::even(2, 2).surviving({.epoch = 1, .alive = {0, 0, 1, 0}}));
  return all;
}

}  // namespace

TEST_CASE(
    "comm/token_plan: every strategy brings tokens to who wants them, and back, on every "
    "topology") {
  for (topology const& ranks : small_topologies()) {
    check_tokens_of(moe::flat{}, ranks);
    check_tokens_of(inter_first, ranks);
    check_tokens_of(intra_first, ranks);
    check_tokens_of(moe::leader{}, ranks);
    check_tokens_of(moe::deduplicated{}, ranks);
    check_tokens_of(moe::grid<2>{{1, ranks.size()}}, ranks);
    check_sharded_tokens(ranks);
  }
  check_tokens_of(moe::grid<2>{{3, 4}}, topology::even(3, 4));
  check_tokens_of(moe::grid<3>{{2, 3, 2}}, topology::even(6, 2));
}

TEST_CASE("comm/token_plan: one rank's plan is the same as among all") {
  topology const ranks = topology::even(2, 4).surviving({.alive = {0, 1, 1, 0, 1, 0, 1, 1}});
  plans const all = moe::make_token_plans(inter_first, ranks);
  for (int i = 0; i < ranks.size(); ++i)
    CHECK(moe::make_token_plan(inter_first, ranks, ranks.rank(i)) ==
          all[static_cast<std::size_t>(i)]);
}

TEST_CASE("comm/deduplicated: the plan of four ranks on two nodes, by hand") {
  exchange_plan const p = make_token_plan(moe::deduplicated{}, topology::even(2, 2), 1);
  CHECK(p.buffers == std::vector{1, 4, 1, 2, 2});
  CHECK(p.output == std::vector{piece{0, 1}, piece{2, 1}, piece{1, 1}, piece{3, 1}});
  REQUIRE(p.phases.size() == 2);
  // What either rank of node 1 wants goes to rank 3, which has the same place there.
  CHECK(p.phases[0].moves ==
        std::vector{row_move{{0, 0}, {2, 0}, 1, row_action::select, {1, 2, 0, 2}}});
  CHECK(p.phases[0].sends == std::vector{moe::message{3, {2, 0}, 1}});
  CHECK(p.phases[0].receives == std::vector{moe::message{3, {3, 1}, 1}});
  // Then the own tokens and those of rank 3 are handed out.
  CHECK(p.phases[1].moves ==
        std::vector{row_move{{0, 0}, {4, 0}, 1, row_action::select, {1, 0, 0, 1}},
                    row_move{{3, 1}, {4, 1}, 1, row_action::select, {3, 0, 0, 1}},
                    row_move{{0, 0}, {1, 2}, 1, row_action::select, {1, 1, 0, 1}},
                    row_move{{3, 1}, {1, 3}, 1, row_action::select, {3, 1, 0, 1}}});
  CHECK(p.phases[1].sends == std::vector{moe::message{0, {4, 0}, 2}});
  CHECK(p.phases[1].receives == std::vector{moe::message{0, {1, 0}, 2}});
  CHECK(p.last.empty());
}

TEST_CASE("comm/token_plan: messages equal the formulas") {
  for (auto const& nodes : {std::pair{1, 4}, {2, 4}, {4, 4}, {3, 5}, {8, 2}, {5, 1}}) {
    int const N = nodes.first, G = nodes.second;
    topology const ranks = topology::even(N, G);
    CAPTURE(N);
    CAPTURE(G);
    auto const count = [&](auto const& strategy) {
      plans const there = moe::make_token_plans(strategy, ranks);
      auto const t = count_traffic(there, ranks), back = count_traffic(transposed(there), ranks);
      CHECK(back.between_nodes == t.between_nodes);
      CHECK(back.within_nodes == t.within_nodes);
      return t;
    };
    auto const once = count(moe::deduplicated{});
    CHECK(once.between_nodes == moe::link_traffic{G * N * (N - 1), G * N * (N - 1)});
    CHECK(once.within_nodes == moe::link_traffic{G * (G - 1) * N, G * (G - 1) * N * N});
    if (G > 1) CHECK(once.copied_slots == G * N * (N - 1 + G * N));
    auto const all = count(moe::sharded{});
    int const R = N * G;
    CHECK(all.between_nodes == moe::link_traffic{R * (R - G), R * (R - G)});
    CHECK(all.within_nodes == moe::link_traffic{R * (G - 1), R * (G - 1)});
    // Tokens change nothing in the messages of a path.
    auto const same = [&](auto const& path) {
      auto const plain = count_traffic(moe::make_plans(path, ranks), ranks), t = count(path);
      CHECK(t.between_nodes == plain.between_nodes);
      CHECK(t.within_nodes == plain.within_nodes);
    };
    same(moe::flat{});
    same(inter_first);
    same(intra_first);
    same(moe::leader{});
    same(moe::grid<2>{{N, G}});
  }
}

TEST_CASE("comm/token_plan: 1024 ranks, on even nodes and on others") {
  auto const uneven = [](int R) {
    std::vector<int> sizes;
    for (int left = R; left > 0; left -= sizes.back())
      sizes.push_back(std::min(left, 1 + static_cast<int>(sizes.size() * 5 % 16)));
    return topology::of_nodes(sizes);
  };
  double slowest = 0;
  auto const check = [&](auto const& strategy, topology const& ranks) {
    plans p = moe::make_token_plans(strategy, ranks);
    auto const begin = std::chrono::steady_clock::now();
    check_verdict(p);
    slowest = std::max(
        slowest, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    for (exchange_plan& plan : p) plan = transpose(plan);
    check_verdict(p);
  };
  auto const check_paths = [&](topology const& ranks) {
    check(moe::flat{}, ranks);
    check(inter_first, ranks);
    check(intra_first, ranks);
    check(moe::leader{}, ranks);
  };
  int const most = moe_test::instrumented ? 128 : 1024;
  check_paths(topology::even(most / 8, 8));
  check_paths(uneven(most / 4));
  for (topology const& ranks : {topology::even(most / 8, 8), uneven(most)}) {
    check(moe::deduplicated{}, ranks);
    check(moe::sharded{}, ranks);
  }
  MESSAGE("the slowest verdict took " << slowest << " s");
}

TEST_CASE("comm/token_plan: what makes no sense is refused") {
  using moe_test::refusal;
  using moe_test::says;
  topology const ranks = topology::even(2, 3);
  says(refusal([&] { make_token_plan(moe::deduplicated{}, ranks, 6); }),
       "make_token_plan: rank is in the topology; got rank = 6");
  says(refusal([&] { moe::make_token_plan(moe::flat{}, ranks, -1); }),
       "make_plan: rank is in the topology; got rank = -1");
  says(refusal([&] { split_slots(make_token_plan(moe::deduplicated{}, ranks, 0), 2); }),
       "split_slots: the plan selects no tokens");
}
