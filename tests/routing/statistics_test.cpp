// Statistics of a routing: by hand, against plain loops, and for any number of threads.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <vector>

#include <moe/routing/build_table.hpp>
#include <moe/routing/statistics.hpp>

TEST_CASE("routing/statistics: loads") {
  std::vector<std::int32_t> const loads{6, 2, 0, 0};
  auto const s = moe::measure_load(loads);
  CHECK(s.total == 8);
  CHECK(s.least == 0);
  CHECK(s.greatest == 6);
  CHECK(s.idle == 2);
  CHECK(s.imbalance == doctest::Approx(3));
  CHECK(s.variation == doctest::Approx(std::sqrt((16 + 0 + 4 + 4) / 4.0) / 2));
  CHECK(s.entropy == doctest::Approx(-0.75 * std::log(0.75) - 0.25 * std::log(0.25)));

  std::vector<std::int32_t> const even(5, 3);
  auto const e = moe::measure_load(even);
  CHECK(e.imbalance == 1);
  CHECK(e.variation == 0);
  CHECK(e.entropy == doctest::Approx(std::log(5)));

  std::vector<std::int32_t> const none(3, 0);
  CHECK(moe::measure_load(none).idle == 3);
  CHECK(moe::measure_load(none).imbalance == 1);
  CHECK(moe::measure_load({}).total == 0);
}

TEST_CASE("routing/statistics: physical loads and the fraction that is dropped") {
  moe::routing_buffer r(6, 1, 2);
  std::int32_t const chosen[] = {0, 0, 1, 0, 0, 1}, source[] = {0, 1, 0, 0, 0, 1};
  std::copy(chosen, chosen + 6, r.expert);
  r.tokens.source = source;
  moe::table_rules const rules{.cap = moe::capacity::fixed(2)};
  moe::table_buffer table({.T = 6, .K = 1, .E = 2, .sources = 2, .max_rows = 6});
  moe::buffer scratch(build_table_scratch(moe::cpu{}, table.room));
  build_table(moe::cpu{}, r, rules, scratch, table);
  std::vector<std::int32_t> loads(2, -1);
  physical_loads(table, loads);
  CHECK(loads == std::vector<std::int32_t>{3, 2});
  CHECK(drop_fraction(*table.counts) == doctest::Approx(1.0 / 6));
  CHECK(drop_fraction(moe::table_counts{}) == 0);
  CHECK(moe::drop_fraction({.kept = 1, .dropped = 1, .beyond_max_rows = 2}) ==
        doctest::Approx(0.75));
  std::vector<std::int32_t> one(1);
  CHECK_THROWS_WITH_AS(physical_loads(table, one), doctest::Contains("size = 1, P = 2"),
                       moe::precondition_error);
}

TEST_CASE("routing/statistics: entropy and margin of scores") {
  double const no = moe::no_score<double>;
  std::vector<double> const scores{0.5,  0.25, 0.25, 0,     // margin 0 of {0, 1}
                                   0.25, 0.25, 0.25, 0.25,  // margin 0
                                   0.7,  0.2,  0.1,  no,    // margin 0.1
                                   0.6,  0.4,  no,   no,    // no other candidate
                                   9,    9,    9,    9};    // masked
  moe::basic_routing_buffer<double> r(5, 2, 4);
  std::int32_t const chosen[] = {0, 1, 0, 1, 0, 1, 0, 1, 0, 1};
  std::copy(chosen, chosen + 10, r.expert);
  std::uint8_t const live[] = {1, 1, 1, 1, 0};
  r.tokens.live = live;
  moe::buffer scratch(moe::measure_scores_scratch(5));
  auto const s = measure_scores(moe::cpu{}, r, moe::matrix_view(scores.data(), 5, 4), scratch);
  auto const h = [](double p) { return -p * std::log(p); };
  CHECK(s.tokens == 4);
  CHECK(s.entropy ==
        doctest::Approx(
            (h(0.5) + 2 * h(0.25) + std::log(4) + h(0.7) + h(0.2) + h(0.1) + h(0.6) + h(0.4)) / 4));
  CHECK(s.margins == 3);
  CHECK(s.margin == doctest::Approx(0.1 / 3));

  r.expert[0] = moe::invalid_token;
  r.expert[3] = moe::no_candidate;
  auto const fewer = measure_scores(moe::cpu{}, r, moe::matrix_view(scores.data(), 5, 4), scratch);
  CHECK(fewer.tokens == 3);
  CHECK(fewer.margins == 1);
  CHECK(fewer.margin == doctest::Approx(0.1));

  CHECK_THROWS_WITH_AS(
      measure_scores(moe::cpu{}, r, moe::matrix_view(scores.data(), 4, 5), scratch),
      doctest::Contains("scores is [T,E]"), moe::precondition_error);
  CHECK_THROWS_AS(
      measure_scores(moe::cpu{}, r, moe::matrix_view(scores.data(), 5, 4), moe::memory{}),
      moe::precondition_error);
}

TEST_CASE("routing/statistics: co-activation counts pairs of experts of one token") {
  moe::routing_buffer r(4, 3, 3);
  std::int32_t const chosen[] = {0, 1, 2, 1, 0, -1, 2, 2, 7, -2, 0, 1};
  std::copy(chosen, chosen + 12, r.expert);
  std::vector<std::int64_t> counts(9, 0);
  count_co_activation(moe::cpu{}, r, moe::matrix_view(counts.data(), 3, 3));
  CHECK(counts == std::vector<std::int64_t>{2, 2, 1, 2, 2, 1, 1, 1, 3});
  count_co_activation(moe::cpu{}, r, moe::matrix_view(counts.data(), 3, 3));
  CHECK(counts[0] == 4);  // it adds
  CHECK_THROWS_AS(count_co_activation(moe::cpu{}, r, moe::matrix_view(counts.data(), 3, 2)),
                  moe::precondition_error);
}

TEST_CASE("routing/statistics: the same for any number of threads") {
  std::mt19937 random(1);
  constexpr int T = 3001, E = 20, K = 3;
  moe::routing_buffer r(T, K, E);
  std::vector<float> scores(T * E);
  for (float& s : scores) s = static_cast<float>(random() % 1000) / 1000;
  for (int i = 0; i < T * K; ++i) r.expert[i] = static_cast<std::int32_t>(random() % E);
  moe::buffer scratch(moe::measure_scores_scratch(T));
  auto const view = moe::matrix_view(scores.data(), T, E);
  auto const one = measure_scores(moe::cpu{}, r, view, scratch);
  std::vector<std::int64_t> counts(E * E);
  count_co_activation(moe::cpu{}, r, moe::matrix_view(counts.data(), E, E));
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    auto const many = measure_scores(team, r, view, scratch);
    CHECK(std::memcmp(&one, &many, sizeof(one)) == 0);
    std::vector<std::int64_t> again(E * E);
    count_co_activation(team, r, moe::matrix_view(again.data(), E, E));
    CHECK(again == counts);
  }
}
