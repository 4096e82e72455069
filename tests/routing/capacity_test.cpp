// Capacity rules: the rows that published systems give an expert, by hand.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>

#include <moe/routing/capacity.hpp>

namespace capacity = moe::capacity;

namespace {

std::int64_t C(moe::capacity_rule const& rule, std::int64_t T, int E, int K, bool training = true,
               std::int64_t max_load = 0) {
  return rows_of(rule, T, E, K, training, max_load);
}

}  // namespace

TEST_CASE("routing/capacity: dropless is the greatest load, rounded up to a multiple") {
  CHECK(C(capacity::dropless(), 8, 4, 2, true, 7) == 7);
  CHECK(C(capacity::dropless(4), 8, 4, 2, true, 7) == 8);
  CHECK(C(capacity::dropless(4), 8, 4, 2, true, 8) == 8);
  CHECK(C(capacity::dropless(4), 8, 4, 2, true, 0) == 0);
  CHECK_FALSE(is_static(capacity::dropless()));
}

TEST_CASE("routing/capacity: fixed") {
  CHECK(C(capacity::fixed(5), 100, 4, 2, false, 50) == 5);
  CHECK(is_static(capacity::fixed(5)));
}

TEST_CASE("routing/capacity: DeepSpeed's rounding in float") {
  // T / E = 6.67, times 1.05 is 7.000000000000001 in double, 7 in float.
  CHECK(C(capacity::deepspeed({.factor = 1.05}), 20, 3, 1) == 7);
  CHECK(std::ceil(20.0 / 3 * 1.05) == 8);
  CHECK(C(capacity::deepspeed({.factor = 1.25}), 64, 8, 2) == 20);
  CHECK(C(capacity::deepspeed({.factor = 1.25, .eval_factor = 2}), 64, 8, 2, false) == 32);
  CHECK(C(capacity::deepspeed({.factor = 1}), 8, 8, 1) == 4);  // min_capacity
  CHECK(C(capacity::deepspeed({.factor = 1, .min_capacity = 0}), 8, 8, 1) == 1);
  CHECK(C(capacity::deepspeed({.min_capacity = 0}), 0, 8, 1) == 0);
  CHECK(C(capacity::deepspeed({.factor = 8}), 4, 2, 1) == 16);  // more than T
  CHECK(is_static(capacity::deepspeed()));
}

TEST_CASE("routing/capacity: Tutel's three signs of the factor, and alignment") {
  // ceil(24 / 5) = 5
  CHECK(C(capacity::tutel(1), 24, 5, 2) == 10);
  CHECK(C(capacity::tutel(0.5), 24, 5, 3) == 6);  // int(2.5) = 2
  CHECK(C(capacity::tutel(2, 4), 24, 5, 1) == 12);
  CHECK(C(capacity::tutel(0), 24, 5, 2, true, 13) == 13);
  CHECK(C(capacity::tutel(0, 8), 24, 5, 2, true, 13) == 16);
  CHECK(C(capacity::tutel(-1), 24, 5, 2, true, 13) == 10);
  CHECK(C(capacity::tutel(-1), 24, 5, 2, true, 9) == 9);
  CHECK(C(capacity::tutel(1), 24, 5, 2, false) == 10);
  CHECK(is_static(capacity::tutel(0.1)));
  CHECK_FALSE(is_static(capacity::tutel(0)));
  CHECK_FALSE(is_static(capacity::tutel(-1)));
}

TEST_CASE("routing/capacity: GShard as FastMoE rounds it, and Switch") {
  CHECK(C(capacity::gshard(), 100, 8, 2) == 30);              // ceil(1.2 * 100) * 2 / 8
  CHECK(C(capacity::gshard(), 100, 8, 2, false) == 60);       // 240 * 2 / 8
  CHECK(C(capacity::gshard({.factor = 0.5}), 5, 4, 2) == 1);  // ceil(2.5) * 2 / 4 = 1.5
  CHECK(C(capacity::switch_transformer(), 100, 8, 1) == 15);  // 15.6
  CHECK(C(capacity::switch_transformer(), 100, 8, 1, false) == 25);
  CHECK(C(capacity::switch_transformer({.factor = 100}), 100, 8, 1) == 100);  // at most T
  CHECK(C(capacity::switch_transformer(), 8, 8, 1) == 4);                     // at least 4
}

TEST_CASE("routing/capacity: great values are cut to 32 bits") {
  std::int64_t const most = 0x7fffffff;
  CHECK(C(capacity::deepspeed({.factor = 1e9}), 1 << 20, 1, 16) == most);
  CHECK(C(capacity::tutel(1e9, 7), 1 << 20, 1, 16) == most);
  CHECK(C(capacity::gshard({.factor = 1e9}), 1 << 20, 1, 16) == most);
  CHECK(C(capacity::fixed(std::int64_t{1} << 40), 1, 1, 1) == most);
}

TEST_CASE("routing/capacity: is never negative, whatever a caller wrote into a rule") {
  using kind = moe::capacity_rule::kind;
  for (kind const rule : {kind::deepspeed, kind::gshard, kind::switch_transformer})
    CHECK(C({.rule = rule, .factor = -2}, 100, 8, 2) == 0);
}

TEST_CASE("routing/capacity: factors and sizes that make no sense are refused") {
  using moe::precondition_error;
  CHECK_THROWS_WITH_AS(capacity::fixed(0), doctest::Contains("rows >= 1; got rows = 0"),
                       precondition_error);
  CHECK_THROWS_WITH_AS(capacity::dropless(0), doctest::Contains("multiple = 0"),
                       precondition_error);
  CHECK_THROWS_WITH_AS(capacity::deepspeed({.factor = 0}), doctest::Contains("capacity::deepspeed"),
                       precondition_error);
  CHECK_THROWS_AS(capacity::deepspeed({.factor = std::nan("")}), precondition_error);
  CHECK_THROWS_AS(capacity::deepspeed({.eval_factor = INFINITY}), precondition_error);
  CHECK_THROWS_AS(capacity::deepspeed({.min_capacity = -1}), precondition_error);
  CHECK_THROWS_AS(capacity::tutel(std::nan("")), precondition_error);
  CHECK_THROWS_AS(capacity::tutel(1, 0), precondition_error);
  CHECK_THROWS_AS(capacity::gshard({.factor = -1}), precondition_error);
  CHECK_THROWS_AS(capacity::switch_transformer({.eval_factor = 0}), precondition_error);
}
