// Tests of moe/dispatch/combine.cuh and combine_kernel.hpp.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <vector>

#include "emulator/movement_cases.hpp"

using namespace moe_test;

namespace {

template <class S>
void check_combines(movement<S> const& m) {
  auto const expected = all_combines(cpu{}, m);
  on_emulator([&](emulated_gpu const& exec) { check_equal(all_combines(exec, m), expected); });
}

}  // namespace

TEST_CASE_TEMPLATE("dispatch/combine_kernel: bitwise as on the CPU where dot products are exact", S,
                   float, bf16, half) {
  for_emulated_cases([](table_case const& c, emulated_shape const& shape) {
    check_combines(movement<S>(c, shape.M, shape.at, numbers::exact));
  });
}

TEST_CASE_TEMPLATE("dispatch/combine_kernel: several slices of a row, several turns of a warp", S,
                   float, bf16) {
  check_combines(movement<S>({.T = 3, .K = 2, .E = 3, .align = 16}, 1096, {}, numbers::exact));
  check_combines(movement<S>({.T = 2, .K = 3, .E = 3, .align = 2}, 395, {1, 3}, numbers::exact));
  if (has_thread_sanitizer || has_address_sanitizer) return;
  check_combines(movement<S>({.T = 40, .K = 3, .E = 3, .align = 8}, 1048, {}, numbers::exact));
}

TEST_CASE("dispatch/combine_kernel: rows are summed in the order of the pairs, dots nearly so") {
  for (std::int64_t const M : {std::int64_t(41), std::int64_t(264)}) {
    movement<float> const m({.T = 5, .K = 12, .E = 13, .dropped = 0.2}, M, {});
    auto const expected = all_combines(cpu{}, m);
    on_emulator([&](emulated_gpu const& exec) {
      auto const found = all_combines(exec, m);
      check_equal<float>({found.matrices, {}}, {expected.matrices, {}});
      // M products of numbers below 1, rounded M times at most in either order.
      for (std::size_t v = 0; v < found.vectors.size(); ++v)
        for (std::size_t i = 0; i < m.weight.size(); ++i)
          CHECK(std::abs(found.vectors[v][i] - expected.vectors[v][i]) <
                2e-7f * static_cast<float>(M));
    });
  }
}

TEST_CASE("dispatch/combine_kernel: a negative zero stays one, and infinity is no one else's") {
  // Token 0: -0 alone. Token 1: nothing. Token 2: a dropped pair beside a finite row.
  hand_made_table const table(3, 2, {0, moe::dropped_row, -1, -1, -1, 1}, {0, 5},
                              {.rows = 2, .kept = 2, .dropped = 4});
  moe::routing_table bounds = table;
  bounds.max_rows = 2;
  std::int64_t const M = 8;
  float const inf = std::numeric_limits<float>::infinity();
  matrix<float> rows(2, M), tokens(3, M);
  for (std::int64_t c = 0; c < M; ++c) {
    rows(0, c) = -0.0f;
    rows(1, c) = c % 2 == 0 ? inf : 2.0f;
    tokens(2, c) = c == 3 ? inf : 1.0f;
  }
  std::vector<float> const weight{1, inf, inf, inf, inf, 1};
  on_emulator([&](emulated_gpu const& exec) {
    matrix<float> out(3, M);
    moe::combine(exec, rows, bounds, weight, out.view());
    for (std::int64_t c = 0; c < M; ++c) {
      CHECK(out(0, c) == 0);
      CHECK(std::signbit(out(0, c)));
      CHECK(out(1, c) == 0);
      CHECK_FALSE(std::signbit(out(1, c)));
      CHECK(out(2, c) == (c % 2 == 0 ? inf : 2.0f));
    }
    std::vector<float> dweight(6, 9);
    moe::combine_backward(exec, tokens, rows, bounds, weight, matrix<float>(2, M).view(), dweight);
    CHECK(dweight[1] == 0);
    CHECK(dweight[4] == 0);
    CHECK(dweight[5] == inf);
  });
}

TEST_CASE("dispatch/combine_kernel: bad input is refused with the rule and the values") {
  movement<float> m({.T = 4, .K = 2, .E = 3}, 6, {}, numbers::exact, 0);
  moe::routing_table table = m.s.table;
  emulated_gpu const exec;
  matrix<float> rows(8, 6), few(7, 6), out(4, 6), tokens(4, 6), drows(8, 6), both(9, 6);
  std::vector<float> weight(8), dweight(8), short_weight(7);
  auto const check = [](std::string const& message, char const* rule) {
    says(message, rule);
    says(message, "combine_kernel_test.cpp");
  };
  check(refusal([&] { moe::combine(exec, few, table, weight, out.view()); }),
        "combine: rows has table.max_rows rows or more of M columns, ld >= M; got rows = 7");
  check(refusal([&] { moe::combine(exec, rows, table, short_weight, out.view()); }),
        "combine: weight has a value for each pair: T * K; got size = 7, T * K = 8");
  check(refusal([&] { moe::combine(exec, rows, table, matrix_view(&rows(4, 0), 4, 6)); }),
        "combine: rows and out do not overlap");
  check(refusal([&] {
          moe::combine_backward(exec, out, matrix_view(&both(1, 0), 8, 6), table, weight,
                                matrix_view(&both(0, 0), 8, 6), dweight);
        }),
        "combine_backward: rows and drows are one view or do not overlap");
  table.computed_only = false;
  char const* const computed =
      ": tokens are given if pairs are at experts that are not computed; got at most = 8";
  check(refusal([&] { moe::combine(exec, rows, table, weight, out.view()); }), computed);
  check(refusal([&] { moe::combine(exec, rows, table, out.view()); }), computed);
  check(refusal(
            [&] { moe::combine_backward(exec, out, rows, table, weight, drows.view(), dweight); }),
        computed);
  CHECK_NOTHROW(moe::combine(exec, rows, table, weight, tokens, out.view()));
}
