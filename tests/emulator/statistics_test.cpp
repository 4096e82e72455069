// Statistics of a routing by kernels, and arrays in their memory, on the block emulator.
// SPDX-License-Identifier: MIT
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <vector>

#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>
#include <moe/routing/statistics.cuh>

#include "emulator/emulated_gpu.hpp"
#include "support/refusal.hpp"

namespace {

using moe_test::emulated_gpu;
using moe_test::on_emulator;

/// A routing with masked, invalid, missing and hostile ids.
struct drawn_routing {
  std::vector<std::int32_t> expert, token_begin;
  std::vector<std::uint8_t> live;
  std::vector<double> scores;
  moe::basic_routing<double> in;

  drawn_routing(int T, int K, int E, bool variable) {
    std::mt19937 random(static_cast<unsigned>(T + E));
    auto const draw = [&](int n) {
      return static_cast<std::int32_t>(random() % static_cast<unsigned>(n));
    };
    token_begin.push_back(0);
    for (int t = 0; t < T; ++t) token_begin.push_back(token_begin.back() + draw(K + 1));
    in.T = T;
    in.K = K;
    in.E = E;
    if (variable) in.token_begin = token_begin.data();
    for (std::int64_t i = 0; i < in.pairs(); ++i) {
      std::int32_t const odd[] = {moe::no_candidate, moe::invalid_token, E, 2147483647};
      expert.push_back(draw(12) == 0 ? odd[draw(4)] : draw(E));
    }
    for (int i = 0; i < T * E; ++i)
      scores.push_back(draw(9) == 0 ? moe::no_score<double> : draw(1000) / 1000.0);
    for (int e = 0; e < E && T > 2; ++e) scores[static_cast<std::size_t>(2 * E + e)] = 0;
    for (int t = 0; t < T; ++t) live.push_back(draw(6) != 0);
    expert.reserve(1);
    in.expert = expert.data();
    in.tokens.live = live.data();
  }
};

}  // namespace

TEST_CASE("emulator/statistics: loads") {
  std::mt19937 random(3);
  for (int const n : {0, 1, 5, 64, 200}) {
    std::vector<std::int32_t> loads;
    for (int i = 0; i < n; ++i) loads.push_back(static_cast<std::int32_t>(random() % 50) / 7 * 7);
    for (bool const none : {false, true}) {
      if (none) loads.assign(loads.size(), 0);
      auto const want = moe::measure_load(loads);
      on_emulator([&](emulated_gpu const& exec) {
        moe::load_statistics found{.total = -1, .entropy = -1};
        measure_load(exec, loads, &found);
        CHECK(found.total == want.total);
        CHECK(found.least == want.least);
        CHECK(found.greatest == want.greatest);
        CHECK(found.idle == want.idle);
        CHECK(found.imbalance == want.imbalance);
        CHECK(found.variation == doctest::Approx(want.variation).epsilon(1e-12));
        CHECK(found.entropy == doctest::Approx(want.entropy).epsilon(1e-12));
      });
      moe::load_statistics again;
      measure_load(moe::cpu{}, loads, &again);
      CHECK(again.entropy == want.entropy);
    }
  }
}

TEST_CASE("emulator/statistics: physical loads") {
  std::vector<std::int32_t> used(70 * 3);
  for (std::size_t q = 0; q < used.size(); ++q) used[q] = static_cast<std::int32_t>(q * q % 17);
  moe::routing_table table;
  table.P = 70;
  table.sources = 3;
  table.used = used.data();
  std::vector<std::int32_t> want(70), again(70);
  moe::physical_loads(table, want);
  moe::physical_loads(moe::cpu{}, table, again);
  CHECK(again == want);
  on_emulator([&](emulated_gpu const& exec) {
    std::vector<std::int32_t> found(70, -1);
    physical_loads(exec, table, found);
    CHECK(found == want);
    std::vector<std::int32_t> few(69);
    moe_test::says(moe_test::refusal([&] { physical_loads(exec, table, few); }),
                   "physical_loads: loads has P elements");
  });
}

TEST_CASE("emulator/statistics: entropy and margin of scores") {
  for (int const T : {0, 1, 33, 100})
    for (int const E : {1, 5, 40})
      for (bool const variable : {false, true}) {
        if (moe_test::has_thread_sanitizer && (T != 33 || E != 40)) continue;
        drawn_routing const r(T, 3, E, variable);
        moe::matrix_view<double const> const scores(r.scores.data(), T, E);
        moe::buffer const scratch(moe::measure_scores_scratch(moe::cpu{}, T));
        moe::score_statistics want;
        measure_scores(moe::cpu{}, r.in, scores, scratch, &want);
        on_emulator([&](emulated_gpu const& exec) {
          std::size_t const bytes = moe::measure_scores_scratch(exec, T);
          moe::buffer const room(bytes);
          moe::score_statistics found{.tokens = -1};
          measure_scores(exec, r.in, scores, room, &found);
          CHECK(found.tokens == want.tokens);
          CHECK(found.margins == want.margins);
          CHECK(found.entropy == doctest::Approx(want.entropy).epsilon(1e-12));
          CHECK(found.margin == doctest::Approx(want.margin).epsilon(1e-12));
        });
      }
  drawn_routing const r(4, 2, 5, false);
  moe::matrix_view<double const> const wrong(r.scores.data(), 5, 4);
  moe::score_statistics s;
  moe_test::says(moe_test::refusal([&] { measure_scores(emulated_gpu(), r.in, wrong, {}, &s); }),
                 "measure_scores: scores is [T,E]");
}

TEST_CASE("emulator/statistics: co-activation") {
  for (int const T : {0, 1, 50})
    for (bool const variable : {false, true}) {
      drawn_routing const r(T, 3, 6, variable);
      std::vector<std::int64_t> want(36, 5);
      count_co_activation(moe::cpu{}, r.in, moe::matrix_view(want.data(), 6, 6));
      on_emulator([&](emulated_gpu const& exec) {
        std::vector<std::int64_t> found(36, 5);
        count_co_activation(exec, r.in, moe::matrix_view(found.data(), 6, 6));
        CHECK(found == want);
        moe_test::says(moe_test::refusal([&] {
                         count_co_activation(exec, r.in, moe::matrix_view(found.data(), 5, 6));
                       }),
                       "count_co_activation: counts is [E,E]");
      });
    }
}

TEST_CASE("emulator/statistics: carved arrays are those of the CPU") {
  emulated_gpu const exec;
  moe::buffer const here(moe::routing_bytes<float>(5, 3)), there(moe::routing_bytes<float>(5, 3));
  std::memset(there.data(), 77, there.size());
  moe::memory from_here = here, from_there = there;
  auto const want = moe::carve_routing<float>(moe::cpu{}, from_here, 5, 3, 7);
  auto const found = moe::carve_routing<float>(exec, from_there, 5, 3, 7);
  CHECK(found.T == 5);
  CHECK(found.K == 3);
  CHECK(found.E == 7);
  CHECK(std::memcmp(found.expert, want.expert, 15 * sizeof(std::int32_t)) == 0);
  CHECK(std::memcmp(found.weight, want.weight, 15 * sizeof(float)) == 0);
  CHECK(std::memcmp(found.score, want.score, 15 * sizeof(float)) == 0);
  CHECK(from_here.size() == from_there.size());

  moe::table_shape const shape{.T = 5, .K = 3, .E = 7, .P = 8, .sources = 2, .max_rows = 21};
  moe::buffer const table_here(moe::table_bytes(shape)), table_there(moe::table_bytes(shape));
  std::memset(table_there.data(), 77, table_there.size());
  from_here = table_here;
  from_there = table_there;
  auto const a = moe::carve_table(moe::cpu{}, from_here, shape);
  auto const b = moe::carve_table(exec, from_there, shape);
  auto const same = [](std::int32_t const* x, std::int32_t const* y, std::size_t n) {
    return std::memcmp(x, y, n * sizeof *x) == 0;
  };
  CHECK(same(a.row_of, b.row_of, 15));
  CHECK(same(a.pair_of, b.pair_of, 21));
  CHECK(same(a.begin, b.begin, 17));
  CHECK(same(a.used, b.used, 16));
  CHECK(same(a.wanted, b.wanted, 7));
  CHECK(*b.counts == moe::table_counts{});
  CHECK(b.segments() == 16);
  CHECK(b.room.P == 8);
  CHECK(from_here.size() == from_there.size());
  moe_test::says(moe_test::refusal([&] { moe::carve_table(exec, from_there, shape); }),
                 "carve_table: memory holds table_bytes(shape)");
}
