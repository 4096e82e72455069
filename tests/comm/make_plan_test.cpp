// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <support/instrumented.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/coordinated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/comm/verify.hpp>

namespace {

using moe::exchange_plan;
using moe::first_hop;
using moe::piece;
using moe::topology;

constexpr moe::two_hop inter_first{first_hop::inter}, intra_first{first_hop::intra};

void check_verdict(std::vector<exchange_plan> const& plans) {
  moe::plan_verdict const v = moe::verify_plans(plans);
  CAPTURE(static_cast<int>(v.error));
  CAPTURE(v.rank);
  CAPTURE(v.phase);
  CAPTURE(v.slot);
  REQUIRE(static_cast<bool>(v));
}

/// The ends are those of an all-to-all, and the schedule does what the ends say.
template <class Path>
void check_all_to_all(Path const& path, topology const& ranks) {
  CAPTURE(ranks.size());
  CAPTURE(ranks.nodes());
  std::vector<exchange_plan> const plans = moe::make_plans(path, ranks);
  int const R = ranks.size();
  REQUIRE(static_cast<int>(plans.size()) == R);
  bool ends = true;
  for (int r = 0; r < R; ++r) {
    exchange_plan const& p = plans[static_cast<std::size_t>(r)];
    ends = ends && p.rank == ranks.rank(r) && p.epoch == ranks.epoch();
    for (int i = 0; i < R; ++i) {
      ends = ends && p.input[static_cast<std::size_t>(i)] == piece{r, i, 0};
      ends = ends && p.output[static_cast<std::size_t>(i)] == piece{i, r, 0};
    }
  }
  REQUIRE(ends);
  check_verdict(plans);
  std::vector<exchange_plan> back, again;
  for (exchange_plan const& p : plans) {
    back.push_back(transpose(p));
    again.push_back(transpose(back.back()));
  }
  check_verdict(back);
  REQUIRE(again == plans);
  // Way and way back: everything comes home.
  std::vector<exchange_plan> home;
  for (std::size_t r = 0; r < plans.size(); ++r) home.push_back(then(plans[r], back[r]));
  check_verdict(home);
  REQUIRE(home[0].output == plans[0].input);
}

std::vector<topology> small_topologies() {
  std::vector<topology> all;
  for (auto const& [nodes, G] : {std::pair{1, 1}, {1, 4}, {4, 1}, {2, 2}, {3, 5}, {4, 8}, {8, 4}})
    all.push_back(topology::even(nodes, G));
  for (std::vector<int> const& sizes :
       {std::vector{1, 2}, {3, 1, 2}, {5, 5, 4}, {1, 7, 1, 3}, {8, 2}, {2, 8}})
    all.push_back(topology::of_nodes(sizes));
  all.push_back(topology::even(3, 5).grouped(4));
  all.push_back(topology::even(1, 16).grouped(7));
  all.push_back(topology::even(3, 2).surviving({.epoch = 3, .alive = {1, 0, 1, 1, 0, 0}}));
  all.push_back(topology::even(2, 4).surviving({.epoch = 9, .alive = {0, 1, 1, 0, 1, 0, 1, 1}}));
  return all;
}

/// A schedule that a user wrote down: who holds the rows after each of three hops.
struct ring_of_three {
  int hops() const { return 3; }
  int holder(topology const& ranks, int hop, int s, int d) const {
    int const R = ranks.size();
    return (d - s + R) % R <= hop ? d : (s + hop) % R;
  }
};

/// Everybody hands rows to the neighbour of their destination: messages of rows for others only.
struct neighbours {
  int hops() const { return 2; }
  int holder(topology const& ranks, int, int, int d) const { return (d + 1) % ranks.size(); }
};

static_assert(moe::exchange_path<neighbours>);
struct without_hops {
  int holder(topology const&, int, int, int) const;
};
struct without_holder {
  int hops() const;
};
struct holder_without_ranks {
  int hops() const;
  int holder(int, int, int) const;
};
static_assert(!moe::exchange_path<without_hops>);
static_assert(!moe::exchange_path<without_holder>);
static_assert(!moe::exchange_path<holder_without_ranks>);

}  // namespace

TEST_CASE(
    "comm/make_plan: every strategy is an all-to-all on every topology, and so is its way back") {
  for (topology const& ranks : small_topologies()) {
    check_all_to_all(moe::flat{}, ranks);
    check_all_to_all(inter_first, ranks);
    check_all_to_all(intra_first, ranks);
    check_all_to_all(moe::leader{}, ranks);
    check_all_to_all(ring_of_three{}, ranks);
    check_all_to_all(neighbours{}, ranks);
  }
}

TEST_CASE("comm/grid: a hop for each level") {
  check_all_to_all(moe::grid<3>{{2, 3, 2}}, topology::even(6, 2));
  check_all_to_all(moe::grid<4>{{2, 1, 2, 2}}, topology::even(1, 8));
  check_all_to_all(moe::grid<2>{{2, 3}},
                   topology::even(2, 4).surviving({.epoch = 2, .alive = {1, 1, 0, 1, 1, 1, 1, 0}}));
  topology const ranks = topology::even(4, 3);
  CHECK(moe::make_plans(moe::grid<1>{{12}}, ranks) == moe::make_plans(moe::flat{}, ranks));
  auto const t = count_traffic(moe::make_plans(moe::grid<2>{{4, 3}}, ranks), ranks);
  CHECK(t.between_nodes == moe::link_traffic{12 * 3, 9 * 4 * 3});
  CHECK(t.within_nodes.messages == 12 * 2);
  auto const three = count_traffic(moe::make_plans(moe::grid<3>{{2, 2, 3}}, ranks), ranks);
  CHECK(three.between_nodes.messages == 12 * (1 + 1));
  CHECK(three.within_nodes.messages == 12 * 2);
}

TEST_CASE("comm/make_plan: one rank's plan is the same as among all") {
  topology const ranks = topology::even(2, 4).surviving({.alive = {0, 1, 1, 0, 1, 0, 1, 1}});
  std::vector<exchange_plan> const all = moe::make_plans(inter_first, ranks);
  for (int i = 0; i < ranks.size(); ++i)
    CHECK(moe::make_plan(inter_first, ranks, ranks.rank(i)) == all[static_cast<std::size_t>(i)]);
}

TEST_CASE("comm/make_plan: the flat plan of two ranks, by hand") {
  exchange_plan const p = moe::make_plan(moe::flat{}, topology::even(2, 1), 1);
  CHECK(p.buffers == std::vector{2, 2});
  REQUIRE(p.phases.size() == 1);
  CHECK(p.phases[0].moves.empty());
  CHECK(p.phases[0].sends == std::vector{moe::message{0, {0, 0}, 1}});
  CHECK(p.phases[0].receives == std::vector{moe::message{0, {1, 0}, 1}});
  CHECK(p.last == std::vector{moe::row_move{{0, 1}, {1, 1}, 1}});
}

TEST_CASE("comm/make_plan: two hops between four ranks on two nodes, by hand") {
  exchange_plan const p = moe::make_plan(inter_first, topology::even(2, 2), 0);
  REQUIRE(p.phases.size() == 2);
  // Hop 1: own node directly; everything for node 1 goes to rank 2, as it lies in the input.
  CHECK(p.phases[0].moves.empty());
  CHECK(p.phases[0].sends == std::vector{moe::message{1, {0, 1}, 1}, moe::message{2, {0, 2}, 2}});
  // Rank 2 hands over what it has for ranks 0 and 1.
  CHECK(p.phases[0].receives ==
        std::vector{moe::message{2, {2, 0}, 2}, moe::message{1, {1, 1}, 1}});
  // Hop 2: rank 1 gets what came for it, from rank 2.
  CHECK(p.phases[1].sends == std::vector{moe::message{1, {2, 1}, 1}});
  CHECK(p.phases[1].receives == std::vector{moe::message{1, {1, 3}, 1}});
  CHECK(p.last == std::vector{moe::row_move{{0, 0}, {1, 0}, 1}, moe::row_move{{2, 0}, {1, 2}, 1}});
}

TEST_CASE("comm/make_plan: messages and rows equal the formulas") {
  for (auto const& [N, G] : {std::pair{1, 4}, {2, 4}, {4, 4}, {3, 5}, {8, 2}, {5, 1}}) {
    topology const ranks = topology::even(N, G);
    CAPTURE(ranks.size());
    CAPTURE(ranks.nodes());
    auto const count = [&](auto const& path) {
      return count_traffic(moe::make_plans(path, ranks), ranks);
    };
    auto const flat = count(moe::flat{}), inter = count(inter_first), intra = count(intra_first),
               lead = count(moe::leader{});
    int const away = G * G * N * (N - 1);  // rows that change their node
    int const home = G * N * (G - 1);      // rows that change their rank, not their node
    CHECK(flat.between_nodes == moe::link_traffic{away, away});
    CHECK(flat.within_nodes == moe::link_traffic{home, home});
    CHECK(flat.copies == G * N);
    CHECK(flat.copied_slots == G * N);
    for (auto const& two : {inter, intra}) {
      CHECK(two.between_nodes == moe::link_traffic{G * N * (N - 1), away});
      CHECK(two.within_nodes.slots == home + G * N * (N - 1) * (G - 1));
    }
    CHECK(inter.within_nodes.messages == (N > 1 ? 2 : 1) * home);
    CHECK(intra.within_nodes.messages == home);
    auto const square = count(moe::grid<2>{{N, G}});
    CHECK(square.between_nodes == inter.between_nodes);
    CHECK(square.within_nodes == moe::link_traffic{home, home * N});
    CHECK(lead.between_nodes == moe::link_traffic{N * (N - 1), away});
    CHECK(lead.within_nodes == moe::link_traffic{home + (N > 1 ? N * (G - 1) : 0),
                                                 home + 2 * (G - 1) * G * N * (N - 1)});
    if (N > 2 && G > 1) {
      CHECK(inter.copied_slots == G * N * (2 * (N - 1) * (G - 1) + N));
      CHECK(intra.copied_slots == G * N * (2 * N * G - N));
    }
    if (G == 4 && N == 2) {
      CHECK(flat.between_nodes.messages == 32);
      CHECK(inter.between_nodes.messages == 8);
      CHECK(lead.between_nodes.messages == 2);
    }
  }
}

TEST_CASE("comm/make_plan: no strategy copies more than a pack and an unpack of each row") {
  topology const ranks = topology::even(4, 4);
  for (auto const& path : {inter_first, intra_first}) {
    auto const t = count_traffic(moe::make_plans(path, ranks), ranks);
    CHECK(t.copied_slots <= 2 * 16 * 16);
    CHECK(t.between_nodes.slots == 16 * 12);
  }
}

TEST_CASE("comm/make_plan: 512 ranks") {
  int const nodes = moe_test::instrumented ? 16 : 64;
  topology const ranks = topology::even(nodes, 8);
  auto const check = [&](auto const& path, int messages) {
    std::vector<exchange_plan> const plans = moe::make_plans(path, ranks);
    check_verdict(plans);
    CHECK(count_traffic(plans, ranks).between_nodes.messages == messages);
  };
  check(moe::flat{}, 64 * nodes * (nodes - 1));
  check(inter_first, 8 * nodes * (nodes - 1));
  check(intra_first, 8 * nodes * (nodes - 1));
  check(moe::leader{}, nodes * (nodes - 1));
}

TEST_CASE("comm/sharded: all rows at all ranks, and their sums back") {
  for (topology const& ranks : small_topologies()) {
    std::vector<exchange_plan> there, back, home;
    int const R = ranks.size();
    for (int i = 0; i < R; ++i) {
      there.push_back(moe::make_sharded_plan(ranks, ranks.rank(i)));
      back.push_back(transpose(there.back()));
      home.push_back(then(there.back(), back.back()));
    }
    REQUIRE(static_cast<int>(there[0].output.size()) == R);
    REQUIRE(there[0].epoch == ranks.epoch());
    for (int s = 0; s < R; ++s)
      REQUIRE(there[0].output[static_cast<std::size_t>(s)] == piece{s, -1, 0});
    check_verdict(there);
    check_verdict(back);
    auto const t = count_traffic(there, ranks);
    CHECK(t.within_nodes.messages + t.between_nodes.messages == R * (R - 1));
    // There and back each row has become R times itself, which is not what the ends say.
    CHECK(moe::verify_plans(home).error ==
          (R == 1 ? moe::plan_error::none : moe::plan_error::wrong_rows));
  }
}

TEST_CASE("comm/coordinated: both forms, any group, any path between groups") {
  for (auto const& [R, L] : {std::pair{1, 1}, {8, 1}, {8, 2}, {8, 8}, {12, 3}, {12, 4}}) {
    topology const ranks = topology::even(R / L, L);
    int const S = R / L;
    for (auto const form : {moe::shared_by::expert, moe::shared_by::expert_slice}) {
      std::vector<exchange_plan> dispatch, combine, back;
      for (int r = 0; r < R; ++r) {
        auto plans = moe::make_coordinated_plans(ranks, L, form, r);
        dispatch.push_back(std::move(plans.dispatch));
        combine.push_back(std::move(plans.combine));
        back.push_back(transpose(combine.back()));
      }
      check_verdict(dispatch);
      check_verdict(combine);
      check_verdict(back);
      for (int r = 0; r < R; ++r) {
        auto const& d = dispatch[static_cast<std::size_t>(r)];
        auto const& c = combine[static_cast<std::size_t>(r)];
        int const g = r / L, l = r % L;
        for (int s = 0; s < S; ++s) {
          REQUIRE(d.input[static_cast<std::size_t>(s)] == piece{g, s, l});
          for (int t = 0; t < L; ++t)
            REQUIRE(c.output[static_cast<std::size_t>(t * S + s)] == piece{s, g, t});
          if (form == moe::shared_by::expert)
            REQUIRE(d.output[static_cast<std::size_t>(s)] == piece{s, g, l});
        }
      }
      // O(R) becomes O(R / L) + O(L), for each rank.
      auto const t = count_traffic(combine, ranks);
      CHECK(t.between_nodes.messages == R * (S - 1));
      CHECK(t.within_nodes.messages == (S > 0 ? R * (L - 1) : 0));
    }
  }
  moe::membership const all{.epoch = 6, .alive = std::vector<std::uint8_t>(4, 1)};
  topology const later = topology::even(2, 2).surviving(all);
  CHECK(moe::make_coordinated_plans(later, 2, moe::shared_by::expert, 1).dispatch.epoch == 6);
  CHECK(moe::make_coordinated_plans(later, 2, moe::shared_by::expert, 1).combine.epoch == 6);
  std::vector<exchange_plan> plans;
  plans.reserve(12);
  for (int r = 0; r < 12; ++r)
    plans.push_back(moe::make_coordinated_plans(topology::even(6, 2), 2, moe::shared_by::expert, r,
                                                ring_of_three{})
                        .combine);
  check_verdict(plans);
}

TEST_CASE("comm/exchange_plan: finer slots change neither messages nor moves") {
  for (topology const& ranks : {topology::even(2, 3), topology::of_nodes(std::vector{1, 3, 2})}) {
    std::vector<exchange_plan> plans, sharded;
    int moves = 0, finer_moves = 0;
    for (exchange_plan const& p : moe::make_plans(inter_first, ranks)) {
      plans.push_back(split_slots(p, 3));
      moves += static_cast<int>(p.last.size());
      finer_moves += static_cast<int>(plans.back().last.size());
      sharded.push_back(transpose(split_slots(moe::make_sharded_plan(ranks, p.rank), 4)));
      CHECK(split_slots(p, 1) == p);
      CHECK(transpose(plans.back()) == split_slots(transpose(p), 3));
      CHECK(split_slots(plans.back(), 2) == split_slots(p, 6));
    }
    check_verdict(plans);
    check_verdict(sharded);
    CHECK(finer_moves == moves);
    CHECK(plans[1].input[3 * 4 + 2] == piece{1, 4, 2});
    CHECK(plans[1].output[3 * 4 + 2] == piece{4, 1, 2});
    auto const t = count_traffic(plans, ranks),
               whole = count_traffic(moe::make_plans(inter_first, ranks), ranks);
    CHECK(t.between_nodes.messages == whole.between_nodes.messages);
    CHECK(t.between_nodes.slots == 3 * whole.between_nodes.slots);
  }
}

TEST_CASE("comm/make_plan: what makes no sense is refused") {
  using moe_test::refusal;
  using moe_test::says;
  topology const ranks = topology::even(2, 3);
  says(refusal([&] { moe::make_plan(moe::flat{}, ranks, 6); }),
       "make_plan: rank is in the topology; got rank = 6");
  struct outside : moe::two_hop {
    int holder(topology const&, int, int, int) const { return 6; }
  };
  says(refusal([&] { moe::make_plans(outside{}, ranks); }),
       "make_plan: holder is in [0, R); got holder = 6, hop = 1, source = 1, destination = 0");
  says(refusal([&] { moe::make_plans(moe::grid<2>{{2, 4}}, ranks); }),
       "grid: the product of the sides is R; got product = 8, R = 6");
  says(refusal([&] { moe::make_plans(moe::grid<2>{{-2, -3}}, ranks); }),
       "grid: the product of the sides is R; got product = 6, R = 6");
  struct nowhere : moe::two_hop {
    int hops() const { return 0; }
  };
  says(refusal([&] { moe::make_plans(nowhere{}, ranks); }), "make_plan: at least one hop");
  says(refusal([&] { moe::make_sharded_plan(ranks, -1); }),
       "make_sharded_plan: rank is in the topology; got rank = -1");
  says(refusal([&] { moe::make_coordinated_plans(ranks, 4, moe::shared_by::expert, 0); }),
       "make_coordinated_plans: L >= 1 divides R; got L = 4, R = 6");
  says(refusal([&] { split_slots(moe::make_plan(moe::flat{}, ranks, 0), 0); }),
       "split_slots: n >= 1; got n = 0");
  says(refusal([&] {
         then(moe::make_plan(moe::flat{}, ranks, 0), moe::make_plan(moe::flat{}, ranks, 0));
       }),
       "then: plans of one rank and epoch");
}
