// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <doctest/doctest.h>
#include <map>
#include <set>
#include <string>
#include <support/disturbed.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/collectives.hpp>
#include <moe/comm/expert_groups.hpp>
#include <moe/comm/expert_hosts.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>

namespace {

using moe::consecutive_ranks;
using moe::expert_groups;
using moe::expert_parallelism;
using moe::group_place;
using moe::rank_layout;
using namespace std::chrono_literals;
using groups = std::vector<std::vector<int>>;
constexpr consecutive_ranks orders[] = {consecutive_ranks::experts, consecutive_ranks::slices,
                                        consecutive_ranks::copies};
constexpr group_place expert_groups<group_place>::* kinds[] = {
    &expert_groups<group_place>::copy,     &expert_groups<group_place>::experts,
    &expert_groups<group_place>::replicas, &expert_groups<group_place>::slices,
    &expert_groups<group_place>::tokens,   &expert_groups<group_place>::data};

std::size_t at(int i) {
  return static_cast<std::size_t>(i);
}
int ranks(expert_parallelism const& p) {
  return p.expert_parallel * p.data_parallel * p.slices;
}

/// The groups of one kind, in the order of colours, each in the order of keys.
groups all(expert_parallelism const& p, group_place expert_groups<group_place>::* kind,
           rank_layout const& layout = {}) {
  std::map<int, std::map<int, int>> found;  // colour, key, rank
  for (int r = 0; r < ranks(p); ++r) {
    group_place const place = groups_of(p, r, layout).*kind;
    bool const anew = found[place.color].emplace(place.key, r).second;
    CHECK(anew);
    CHECK(place.color >= 0);
  }
  groups result;
  for (auto const& [color, members] : found) {
    result.emplace_back();
    for (auto const& [key, r] : members) {
      CHECK(key == static_cast<int>(result.back().size()));
      result.back().push_back(r);
    }
  }
  return result;
}

/// Every degree up to 4, and what spread_experts makes of many numbers of experts and ranks.
template <class F>
void for_each_parallelism(F&& f) {
  for (int EP = 1; EP <= 4; ++EP)
    for (int D = 1; D <= 4; ++D)
      for (int S = 1; S <= 4; ++S) f(6 * EP, expert_parallelism{EP, D, S, 6});
  for (int const E : {1, 2, 3, 4, 6, 8, 12, 60})
    for (int R = 1; R <= 24; ++R)
      for (auto const spare : {moe::spare_ranks::replicate, moe::spare_ranks::slice})
        f(E, moe::spread_experts(E, R, spare));
}

}  // namespace

TEST_CASE("comm/expert_groups: PR-MoE on 128 ranks, of 32, 64 and 128 experts") {
  int const E[] = {32, 64, 128}, copies[] = {4, 2, 1};
  for (int i = 0; i < 3; ++i) {
    expert_parallelism const p = moe::spread_experts(E[i], 128);
    auto const experts = all(p, &expert_groups<group_place>::experts);
    auto const replicas = all(p, &expert_groups<group_place>::replicas);
    CHECK(all(p, &expert_groups<group_place>::copy) == experts);
    REQUIRE(static_cast<int>(experts.size()) == copies[i]);
    REQUIRE(static_cast<int>(replicas.size()) == E[i]);
    for (int r = 0; r < 128; ++r) {
      CHECK(experts[at(r / E[i])][at(r % E[i])] == r);   // consecutive
      CHECK(replicas[at(r % E[i])][at(r / E[i])] == r);  // with stride E
    }
    for (auto const& alone : all(p, &expert_groups<group_place>::slices)) CHECK(alone.size() == 1);
  }
  // The example of the docstring.
  CHECK(groups_of(moe::spread_experts(32, 128), 70).copy == group_place{2, 6});
  CHECK(groups_of(moe::spread_experts(64, 128), 70).copy == group_place{1, 6});
  CHECK(groups_of(moe::spread_experts(128, 128), 70).copy == group_place{0, 70});
}

TEST_CASE("comm/expert_groups: more ranks than experts, which are sliced") {
  expert_parallelism const p = moe::spread_experts(3, 6, moe::spare_ranks::slice);
  CHECK(all(p, &expert_groups<group_place>::copy) == groups{{0, 1, 2, 3, 4, 5}});
  CHECK(all(p, &expert_groups<group_place>::experts) == groups{{0, 1, 2}, {3, 4, 5}});
  CHECK(all(p, &expert_groups<group_place>::slices) == groups{{0, 3}, {1, 4}, {2, 5}});
  CHECK(all(p, &expert_groups<group_place>::replicas) == groups{{0}, {1}, {2}, {3}, {4}, {5}});
}

TEST_CASE("comm/expert_groups: DeepSpeed's groups") {
  // Experts and data: EP = [i ep, (i + 1) ep), expert data parallel with stride ep.
  expert_parallelism const p{.expert_parallel = 2, .data_parallel = 4, .experts_per_rank = 1};
  CHECK(all(p, &expert_groups<group_place>::experts) == groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}});
  CHECK(all(p, &expert_groups<group_place>::replicas) == groups{{0, 2, 4, 6}, {1, 3, 5, 7}});
  // use_data_before_expert_parallel: the other way round.
  rank_layout const data_first{.consecutive = consecutive_ranks::copies};
  CHECK(all(p, &expert_groups<group_place>::experts, data_first) ==
        groups{{0, 4}, {1, 5}, {2, 6}, {3, 7}});
  CHECK(all(p, &expert_groups<group_place>::replicas, data_first) ==
        groups{{0, 1, 2, 3}, {4, 5, 6, 7}});
  // Experts, model and data: 16 ranks, model parallel 2, EP 4, the experts sliced, too.
  expert_parallelism const sliced{
      .expert_parallel = 4, .data_parallel = 2, .slices = 2, .experts_per_rank = 1};
  rank_layout const layout{.same_tokens = 2, .consecutive = consecutive_ranks::slices};
  CHECK(all(sliced, &expert_groups<group_place>::experts, layout) ==
        groups{{0, 2, 4, 6}, {1, 3, 5, 7}, {8, 10, 12, 14}, {9, 11, 13, 15}});
  CHECK(all(sliced, &expert_groups<group_place>::replicas, layout) ==
        groups{{0, 8}, {2, 10}, {4, 12}, {6, 14}, {1, 9}, {3, 11}, {5, 13}, {7, 15}});
  CHECK(all(sliced, &expert_groups<group_place>::tokens, layout) ==
        groups{{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}, {12, 13}, {14, 15}});
  CHECK(all(sliced, &expert_groups<group_place>::tokens, layout) ==
        all(sliced, &expert_groups<group_place>::slices, layout));
  CHECK(all(sliced, &expert_groups<group_place>::data, layout) ==
        groups{{0, 2, 4, 6, 8, 10, 12, 14}, {1, 3, 5, 7, 9, 11, 13, 15}});
}

TEST_CASE("comm/expert_groups: every rank is in one group of each kind, of the right size") {
  for_each_parallelism([](int, expert_parallelism const& p) {
    int const R = ranks(p);
    for (int const L : {1, 2, 3, R})
      for (auto const order : orders) {
        if (R % L != 0) continue;
        int const sizes[] = {
            p.expert_parallel * p.slices, p.expert_parallel, p.data_parallel, p.slices, L, R / L};
        for (int k = 0; k < 6; ++k) {
          std::set<int> members;
          for (auto const& group : all(p, kinds[k], {L, order})) {
            CHECK(static_cast<int>(group.size()) == sizes[k]);
            members.insert(group.begin(), group.end());
          }
          CHECK(static_cast<int>(members.size()) == R);
        }
      }
  });
}

TEST_CASE("comm/expert_groups: groups hold what their names say") {
  for_each_parallelism([](int E, expert_parallelism const& p) {
    std::vector<moe::expert_hosts> hosts;
    for (int r = 0; r < ranks(p); ++r) hosts.emplace_back(E, p, r);
    auto const first = [&](int r) { return hosts[at(r)].first() % E; };
    for (auto const& group : all(p, &expert_groups<group_place>::copy)) {
      std::set<int> const members(group.begin(), group.end());
      for (int const r : group)
        for (int e = 0; e < E; ++e)
          for (int const host : hosts[at(r)].ranks_of(hosts[at(r)].physical(e)))
            CHECK(members.count(host) == 1);
      // In the group alone the hosts are those of one copy.
      expert_parallelism one = p;
      one.data_parallel = 1;
      for (std::size_t i = 0; i < group.size(); ++i) {
        moe::expert_hosts const alone(E, one, static_cast<int>(i));
        CHECK(alone.first() == first(group[i]));
        CHECK(alone.slice() == hosts[at(group[i])].slice());
      }
    }
    for (auto const& group : all(p, &expert_groups<group_place>::experts)) {
      int next = 0;
      for (int const r : group) {
        CHECK(first(r) == next);
        next += p.experts_per_rank;
        CHECK(hosts[at(r)].slice() == hosts[at(group[0])].slice());
      }
      CHECK(next == E);
    }
    for (auto const& group : all(p, &expert_groups<group_place>::replicas))
      for (int const r : group) {
        CHECK(first(r) == first(group[0]));
        CHECK(hosts[at(r)].slice() == hosts[at(group[0])].slice());
      }
    for (auto const& group : all(p, &expert_groups<group_place>::slices))
      for (std::size_t i = 0; i < group.size(); ++i) {
        CHECK(hosts[at(group[i])].first() == hosts[at(group[0])].first());
        CHECK(hosts[at(group[i])].slice() == static_cast<int>(i));
      }
  });
}

TEST_CASE("comm/expert_groups: their communicators") {
  expert_parallelism const p{
      .expert_parallel = 3, .data_parallel = 2, .slices = 2, .experts_per_rank = 1};
  for (auto const order : orders) {
    rank_layout const layout{.same_tokens = 4, .consecutive = order};
    std::vector<char> right(12);
    moe::thread_world world(12);
    world.run([&](moe::thread_communicator& inner) {
      using disturbed = moe_test::disturbed<moe::thread_communicator>;
      disturbed comm(inner, static_cast<unsigned>(inner.rank()) + 1);
      expert_groups<disturbed> made;
      if (!split_groups(comm, p, layout, moe::within(60s), made)) return;
      disturbed* const communicators[] = {&made.copy,   &made.experts, &made.replicas,
                                          &made.slices, &made.tokens,  &made.data};
      bool good = true;
      for (int k = 0; k < 6; ++k) {
        // Whose ranks they are: the sum of one bit of each.
        std::int64_t expected = 0, mine = std::int64_t{1} << comm.rank();
        auto const own = groups_of(p, comm.rank(), layout).*kinds[k];
        for (int r = 0; r < 12; ++r)
          if ((groups_of(p, r, layout).*kinds[k]).color == own.color)
            expected += std::int64_t{1} << r;
        moe::buffer const scratch(moe::all_reduce_scratch<std::int64_t>(1, 12));
        good = good && communicators[k]->rank() == own.key &&
               moe::all_reduce(*communicators[k], moe::vector_view<std::int64_t>(&mine, 1), scratch,
                               moe::within(60s)) &&
               mine == expected;
      }
      right[at(comm.rank())] = good;
    });
    CHECK(right == std::vector<char>(12, true));
  }
}

TEST_CASE("comm/expert_groups: one rank by itself, a dead rank, broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  moe::self_communicator self;
  expert_groups<moe::self_communicator> alone;
  CHECK(split_groups(self, moe::spread_experts(4, 1), {}, moe::within(60s), alone));
  CHECK(alone.replicas.size() == 1);

  moe::thread_world world(2);
  world.kill(1);
  auto comm = world.communicator(0);
  expert_groups<moe::thread_communicator> none;
  CHECK(split_groups(comm, moe::spread_experts(4, 2), {}, moe::within(60s), none) ==
        moe::outcome{moe::exchange_status::peer_failed, 1});

  expert_parallelism const p = moe::spread_experts(4, 6);
  says(refusal([&] { groups_of(p, 6); }), "expert_groups: 0 <= rank < R; got rank = 6, R = 6");
  says(refusal([&] { groups_of(p, -1); }), "got rank = -1");
  says(refusal([&] { groups_of(p, 0, {.same_tokens = 4}); }),
       "same_tokens divides the number of ranks; got same_tokens = 4, R = 6");
  says(refusal([&] { moe::groups_of({.expert_parallel = 0}, 0); }), "degrees >= 1");
  says(refusal([&] { static_cast<void>(split_groups(self, p, {}, moe::within(60s), alone)); }),
       "split_groups: comm has as many ranks as the degrees; got comm.size() = 1, R = 6");
}
