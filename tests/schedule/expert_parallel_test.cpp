// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <set>
#include <string>

#include <moe/schedule/expert_parallel.hpp>
#include <moe/schedule/pyramid.hpp>

namespace {

using moe::expert_parallelism;
using moe::spare_ranks;
using moe::spread_experts;

static_assert(spread_experts(32, 128).data_parallel == 4);

}  // namespace

TEST_CASE("schedule/expert_parallel: 128 ranks and layers of 32, 64 and 128 experts") {
  CHECK(spread_experts(32, 128) == expert_parallelism{32, 4, 1, 1});
  CHECK(spread_experts(64, 128) == expert_parallelism{64, 2, 1, 1});
  CHECK(spread_experts(128, 128) == expert_parallelism{128, 1, 1, 1});
  CHECK(spread_experts(32, 128, spare_ranks::slice) == expert_parallelism{32, 1, 4, 1});
}

TEST_CASE(
    "schedule/expert_parallel: fewer ranks than experts, one rank, sizes that do not divide") {
  CHECK(spread_experts(128, 8) == expert_parallelism{8, 1, 1, 16});
  CHECK(spread_experts(128, 8, spare_ranks::slice) == expert_parallelism{8, 1, 1, 16});
  CHECK(spread_experts(60, 8) == expert_parallelism{4, 2, 1, 15});
  CHECK(spread_experts(48, 128) == expert_parallelism{16, 8, 1, 3});
  CHECK(spread_experts(7, 16, spare_ranks::slice) == expert_parallelism{1, 1, 16, 7});
  CHECK(spread_experts(7, 1) == expert_parallelism{1, 1, 1, 7});
  CHECK(spread_experts(1, 4) == expert_parallelism{1, 4, 1, 1});
  CHECK(spread_experts(0, 4) == expert_parallelism{1, 4, 1, 0});
  CHECK(spread_experts(0, 4, spare_ranks::slice) == expert_parallelism{1, 4, 1, 0});
}

TEST_CASE("schedule/expert_parallel: every expert has all copies or slices, on different ranks") {
  constexpr int most = 24;
  for (int E = 1; E <= most; ++E) {
    for (int R = 1; R <= most; ++R) {
      for (auto const spare : {spare_ranks::replicate, spare_ranks::slice}) {
        auto const p = spread_experts(E, R, spare);
        REQUIRE(p.expert_parallel * p.data_parallel * p.slices == R);
        REQUIRE(p.expert_parallel * p.experts_per_rank == E);
        std::set<std::pair<int, int>> held;
        for (int r = 0; r < R; ++r) {
          REQUIRE(p.copy(r) < p.data_parallel * p.slices);
          for (int i = 0; i < p.experts_per_rank; ++i)
            held.insert({p.first_expert(r) + i, p.copy(r)});
        }
        REQUIRE(static_cast<int>(held.size()) == E * p.data_parallel * p.slices);
        REQUIRE(held.rbegin()->first == E - 1);
        // No larger degree would divide both.
        for (int more = p.expert_parallel + 1; more <= R; ++more) {
          REQUIRE_FALSE((E % more == 0 && R % more == 0));
        }
      }
    }
  }
}

TEST_CASE(
    "schedule/expert_parallel: a pyramid on as many ranks as its top has one expert per rank") {
  constexpr auto schedule =
      moe::expert_schedule::pyramid({.layers = 24, .base = 64, .top = 128, .last = 2});
  for (int l = 0; l < schedule.layers(); ++l) {
    CHECK(spread_experts(schedule.experts(l), 128).experts_per_rank ==
          (schedule.is_moe(l) ? 1 : 0));
  }
}

TEST_CASE("schedule/expert_parallel: broken rules are refused by name and value") {
  auto const refusal = [](int E, int R) -> std::string {
    try {
      spread_experts(E, R);
    } catch (moe::precondition_error const& e) {
      return e.what();
    }
    return "no exception";
  };
  CHECK(refusal(-1, 4).find("spread_experts: E >= 0 and R >= 1; got E = -1, R = 4") == 0);
  CHECK(refusal(4, 0).find("R = 0") != std::string::npos);
}
