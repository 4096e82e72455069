#include <cmath>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <vector>

#include <moe/core/score_row.hpp>

#include "support/laws.hpp"

using moe::array_row;

TEST_CASE("core/score_row: array_row<float> obeys the laws of a score_row") {
  moe_test::score_row_laws<array_row<float>>(moe_test::on_array{});
}

TEST_CASE("core/score_row: array_row<double> obeys the laws of a score_row") {
  moe_test::score_row_laws<array_row<double>>(moe_test::on_array{});
}

TEST_CASE("core/score_row: worked example") {
  float scores[] = {0.5f, 2.0f, 2.0f, -1.0f};
  array_row<float> row(scores, 4);
  CHECK(row.max(0, 4) == 2.0f);
  CHECK(row.sum([](int, float s) { return s; }) == 3.5f);
  CHECK(row.pop_max(0, 4).expert == 1);  // ties go to the lower id
  CHECK(row.pop_max(0, 4).expert == 2);
  CHECK(row.pop_max(0, 2).key == 0.5f);
  CHECK(scores[0] == moe::no_score<float>);
  CHECK(scores[3] == -1.0f);
}

TEST_CASE("core/score_row: the order of a sum shows in its bits") {
  // 1 is lost beside 2^24, so that another order gives another sum: lane 0 adds 2^24 and 1 (lost),
  // lane 1 adds 1 and 1.
  std::vector<float> scores(64, 0.0f);
  scores[0] = 0x1p24f;
  scores[32] = 1.0f;
  scores[1] = 1.0f;
  scores[33] = 1.0f;
  array_row<float> const row(scores.data(), 64);
  CHECK(row.sum([](int, float s) { return s; }) == 0x1p24f + 2.0f);
  for (int const width : {1, 2, 4, 8, 16, 32})
    CHECK(moe_test::law_sum(scores, [](int, float s) { return s; }, width) == 0x1p24f + 2.0f);
}

TEST_CASE("core/score_row: NaN is no candidate") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  float scores[] = {nan, -3.0f, nan};
  array_row<float> row(scores, 3);
  CHECK_FALSE(moe::is_candidate(nan));
  CHECK(row.max(0, 3) == -3.0f);
  CHECK(row.pop_max(0, 3).expert == 1);
  CHECK(row.pop_max(0, 3).expert == -1);
}

TEST_CASE("core/score_row: +inf is a candidate, and the best") {
  double scores[] = {1.0, std::numeric_limits<double>::infinity(), 2.0};
  array_row<double> row(scores, 3);
  CHECK(row.pop_max(0, 3).expert == 1);
}

TEST_CASE("core/score_row: an empty row") {
  array_row<float> row(nullptr, 0);
  CHECK(row.size() == 0);
  CHECK(row.max(0, 0) == moe::no_score<float>);
  CHECK(row.sum([](int, float s) { return s; }) == 0.0f);
  CHECK(row.pop_max(0, 0).expert == -1);
}

TEST_CASE("core/score_row: copies share one room, and its end is refused") {
  float scores[] = {1, 2, 3};
  float storage[7] = {0, 0, 0, 0, 0, 0, 99};
  moe::row_room<float> room{storage, 2};
  array_row<float> row(scores, 3, &room);
  array_row<float> a = row.copy();
  array_row<float> b = a.copy();
  CHECK(a.data() == storage);
  CHECK(b.data() == storage + 3);
  CHECK(room.left == 0);
  CHECK(storage[6] == 99);
  for (auto const* from : {&row, &a, &b}) {
    std::string text;
    try {
      (void)from->copy();
    } catch (moe::precondition_error const& e) {
      text = e.what();
    }
    CHECK(text.find("array_row::copy: a policy makes at most as many copies") == 0);
  }
  array_row<float> const without(scores, 3);
  CHECK_THROWS_AS((void)without.copy(), moe::precondition_error);
}

TEST_CASE("core/score_row: usable in constant expressions") {
  static_assert([] {
    double scores[] = {1, 4, 2};
    array_row<double> row(scores, 3);
    row.transform([](int e, double s) { return s + e; });
    return row.pop_max(0, 3).expert == 1 && row.sum([](int e, double) { return double(e); }) == 3;
  }());
}
