// Tests of moe/dispatch/dispatch.hpp.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/dispatch/dispatch.hpp>

#include "movement.hpp"

using namespace moe_test;

namespace {

/// Rows are their tokens, times their weights if there are any, bit by bit; padding is zero.
template <class S>
bool rows_are_right(slow_table const& s, matrix<S> const& tokens, accumulate_t<S> const* weight,
                    matrix<S> const& rows, std::int64_t M) {
  using A = accumulate_t<S>;
  for (std::int64_t r = 0; r < s.N(); ++r)
    for (std::int64_t c = 0; c < M; ++c) {
      S expected = make<S>(0);
      if (s.pair(r) >= 0) {
        A const w = weight != nullptr ? weight[s.pair(r)] : A(1);
        expected = static_cast<S>(w * static_cast<A>(tokens(s.token(r), c)));
      }
      if (!(rows(r, c) == expected)) return false;
    }
  return true;
}

}  // namespace

TEST_CASE("dispatch/dispatch: two tokens swap places as their experts do") {
  hand_made_table const table(2, 1, {1, 0}, {1, 0, -1, -1}, {.rows = 3, .kept = 2});
  std::vector<float> const tokens{1, 2, 3, 4};
  std::vector<float> rows(8, 9);
  moe::dispatch(cpu{}, {tokens, 2, 2}, table, matrix_view(rows, 4, 2));
  CHECK(rows == std::vector<float>{3, 4, 1, 2, 0, 0, 9, 9});  // padding 0, beyond N untouched

  std::vector<float> const weight{0.5f, 2};
  moe::dispatch(cpu{}, {tokens, 2, 2}, table, weight, matrix_view(rows, 4, 2));
  CHECK(rows == std::vector<float>{6, 8, 0.5f, 1, 0, 0, 9, 9});

  std::vector<float> const drows{1, 10, 100, 1000, 5, 5};
  std::vector<float> dtokens(4, 9), dweight(2, 9);
  moe::dispatch_backward(cpu{}, {drows, 3, 2}, {tokens, 2, 2}, table, weight,
                         matrix_view(dtokens, 2, 2), dweight);
  CHECK(dtokens == std::vector<float>{50, 500, 2, 20});
  CHECK(dweight == std::vector<float>{2100, 43});
}

TEST_CASE_TEMPLATE(
    "dispatch/dispatch: rows are their tokens, padding is zero, nothing else changes", S, float,
    double, bf16, half) {
  for_cases([](table_case const& c, std::int64_t M) {
    slow_table const s(c);
    auto const tokens = matrix<S>(c.T, M, 5, 1).fill(2);
    matrix<S> rows(s.N(), M, 3, 1);
    moe::dispatch(cpu{}, tokens, s.table, rows.view());
    CHECK(rows_are_right<S>(s, tokens, nullptr, rows, M));
    CHECK(rows.gaps_untouched());

    auto const weight = random_vector<accumulate_t<S>>(s.pairs(), 3);
    moe::dispatch(cpu{}, tokens, s.table, weight, rows.view());
    CHECK(rows_are_right<S>(s, tokens, weight.data(), rows, M));
    CHECK(rows.gaps_untouched());
  });
}

TEST_CASE_TEMPLATE("dispatch/dispatch: the same past the cache, for any alignment of rows", S,
                   float, bf16) {
  slow_table const s({.T = 1900, .K = 4, .E = 7, .align = 64, .dropped = 0.1});
  for (std::int64_t const skew : {0, 1, 3}) {
    std::int64_t const M = 1021;
    auto const tokens = matrix<S>(1900, M, 0, 1).fill(4);
    matrix<S> rows(s.N(), M, skew, skew);
    REQUIRE(s.N() * M * static_cast<std::int64_t>(sizeof(S)) > moe::detail::past_cache_bytes);
    moe::dispatch(cpu{}, tokens, s.table, rows.view());
    CHECK(rows_are_right<S>(s, tokens, nullptr, rows, M));
    auto const weight = random_vector<accumulate_t<S>>(s.pairs(), 5);
    moe::dispatch(cpu{}, tokens, s.table, weight, rows.view());
    CHECK(rows_are_right<S>(s, tokens, weight.data(), rows, M));
    CHECK(rows.gaps_untouched());
  }
}

TEST_CASE_TEMPLATE("dispatch/dispatch_backward: sums and dot products of rows, as in double", S,
                   float, double, bf16, half) {
  for_cases([](table_case const& c, std::int64_t M) {
    slow_table const s(c);
    auto const tokens = matrix<S>(c.T, M, 1, 0).fill(2);
    auto const drows = matrix<S>(s.N(), M, 2, 1).fill(3);
    auto const weight = random_vector<accumulate_t<S>>(s.pairs(), 4);
    for (bool const weighted : {false, true})
      for (update const mode : {update::assign, update::add}) {
        auto dtokens = matrix<S>(c.T, M, 4, 1).fill(5);
        matrix<S> const before = dtokens;
        std::vector<accumulate_t<S>> dweight(weight.size(), 7);
        if (weighted)
          moe::dispatch_backward(cpu{}, drows, tokens, s.table, weight, dtokens.view(), dweight,
                                 mode);
        else
          moe::dispatch_backward(cpu{}, drows, s.table, dtokens.view(), mode);
        bool right = true;
        for (std::int64_t t = 0; t < c.T; ++t)
          for (std::int64_t col = 0; col < M; ++col) {
            double sum = mode == update::add ? value(before(t, col)) : 0;
            for (std::int64_t i = s.table.first_pair(t); i < s.table.first_pair(t + 1); ++i) {
              auto const p = static_cast<std::size_t>(i);
              double const w = weighted ? static_cast<double>(weight[p]) : 1;
              if (s.has_row(p)) sum += w * value(drows(s.row_of[p], col));
            }
            right = right && near<S>(value(dtokens(t, col)), sum);
          }
        CHECK(right);
        CHECK(dtokens.gaps_untouched());
        if (!weighted) continue;
        for (std::size_t i = 0; i < s.row_of.size(); ++i) {
          double dot = 0;
          for (std::int64_t col = 0; s.has_row(i) && col < M; ++col)
            dot += value(drows(s.row_of[i], col)) * value(tokens(s.token_of[i], col));
          right = right && near<accumulate_t<S>>(static_cast<double>(dweight[i]), dot);
        }
        CHECK(right);
      }
  });
}

TEST_CASE("dispatch/dispatch_backward: it is the adjoint of dispatch") {
  std::int64_t const M = 19;
  for (table_case const& c : computed_cases)
    for (bool const weighted : {false, true}) {
      slow_table const s(c);
      auto const x = matrix<double>(c.T, M).fill(2);
      auto const y = matrix<double>(s.N(), M).fill(3);
      auto const weight = random_vector<double>(s.pairs(), 4);
      matrix<double> rows(s.N(), M), dtokens(c.T, M);
      std::vector<double> dweight(weight.size());
      if (weighted) {
        moe::dispatch(cpu{}, x, s.table, weight, rows.view());
        moe::dispatch_backward(cpu{}, y, x, s.table, weight, dtokens.view(), dweight);
      } else {
        moe::dispatch(cpu{}, x, s.table, rows.view());
        moe::dispatch_backward(cpu{}, y, s.table, dtokens.view());
      }
      double there = 0, back = 0, by_weight = 0;
      for (std::int64_t col = 0; col < M; ++col) {
        for (std::int64_t r = 0; r < s.N(); ++r) there += rows(r, col) * y(r, col);
        for (std::int64_t t = 0; t < c.T; ++t) back += x(t, col) * dtokens(t, col);
      }
      CHECK(there == doctest::Approx(back).epsilon(1e-12));
      for (std::size_t i = 0; i < weight.size(); ++i) by_weight += weight[i] * dweight[i];
      if (weighted) CHECK(there == doctest::Approx(by_weight).epsilon(1e-12));
    }
}

TEST_CASE("dispatch/dispatch_backward: gradients agree with central differences") {
  slow_table const s({.T = 5, .K = 3, .E = 7, .align = 2, .dropped = 0.2});
  REQUIRE(s.counts.kept > 2);
  std::int64_t const M = 3;
  auto tokens = matrix<double>(5, M).fill(2);
  auto weight = random_vector<double>(s.pairs(), 3);
  auto const y = matrix<double>(s.N(), M).fill(4);
  matrix<double> rows(s.N(), M), drows(s.N(), M), dtokens(5, M);
  auto const loss = [&] {  // not linear, so that its gradient depends on where it is taken
    moe::dispatch(cpu{}, tokens, s.table, weight, rows.view());
    double sum = 0;
    for (std::int64_t r = 0; r < s.N(); ++r)
      for (std::int64_t c = 0; c < M; ++c) sum += y(r, c) * std::sin(rows(r, c));
    return sum;
  };
  loss();
  for (std::int64_t r = 0; r < s.N(); ++r)
    for (std::int64_t c = 0; c < M; ++c) drows(r, c) = y(r, c) * std::cos(rows(r, c));
  std::vector<double> dweight(weight.size());
  moe::dispatch_backward(cpu{}, drows, tokens, s.table, weight, dtokens.view(), dweight);
  for (std::int64_t t = 0; t < 5; ++t)
    for (std::int64_t c = 0; c < M; ++c)
      CHECK(std::abs(dtokens(t, c) - central_difference(tokens(t, c), loss)) < 1e-8);
  for (std::size_t i = 0; i < weight.size(); ++i)
    CHECK(std::abs(dweight[i] - central_difference(weight[i], loss)) < 1e-8);
}

TEST_CASE_TEMPLATE("dispatch/dispatch: bitwise equal for any number of threads", S, float, bf16) {
  slow_table const s({.T = 700, .K = 4, .E = 9, .align = 16, .dropped = 0.1});
  std::int64_t const M = 515;
  auto const tokens = matrix<S>(700, M).fill(2);
  auto const drows = matrix<S>(s.N(), M).fill(3);
  auto const weight = random_vector<float>(s.pairs(), 4);
  struct results {
    matrix<S> rows, weighted, dtokens, dweighted;
    std::vector<float> dweight;
  };
  auto const run = [&](cpu const& exec) {
    results r{{s.N(), M}, {s.N(), M}, {700, M}, {700, M}, std::vector<float>(weight.size())};
    moe::dispatch(exec, tokens, s.table, r.rows.view());
    moe::dispatch(exec, tokens, s.table, weight, r.weighted.view());
    moe::dispatch_backward(exec, drows, s.table, r.dtokens.view());
    moe::dispatch_backward(exec, drows, tokens, s.table, weight, r.dweighted.view(), r.dweight);
    return r;
  };
  results const one = run(cpu{});
  for (int const threads : {1, 2, 3, 7}) {
    CAPTURE(threads);
    moe::thread_team team(threads);
    results const many = run(team);
    CHECK(one.rows.same_bits(many.rows));
    CHECK(one.weighted.same_bits(many.weighted));
    CHECK(one.dtokens.same_bits(many.dtokens));
    CHECK(one.dweighted.same_bits(many.dweighted));
    CHECK(one.dweight == many.dweight);
  }
}

TEST_CASE("dispatch/dispatch: views without elements may be null") {
  slow_table const s({.T = 4, .K = 2, .E = 3, .align = 4});
  matrix_view<float> const tokens(nullptr, 4, 0), rows(nullptr, s.N(), 0);
  std::vector<float> const weight(8, 1);
  std::vector<float> dweight(8, 9);
  CHECK_NOTHROW(moe::dispatch(cpu{}, tokens, s.table, rows));
  CHECK_NOTHROW(moe::dispatch(cpu{}, tokens, s.table, weight, rows));
  moe::dispatch_backward(cpu{}, rows, tokens, s.table, weight, tokens, dweight);
  CHECK(dweight == std::vector<float>(8, 0));
}

TEST_CASE("dispatch/dispatch: bad input is refused with the rule and the values") {
  slow_table s({.T = 4, .K = 2, .E = 3});
  matrix<float> tokens(4, 6), rows(8, 6), dtokens(4, 6);
  std::vector<float> weight(8), few(7);
  cpu const exec;
  auto const check = [](std::string const& message, char const* rule) {
    says(message, rule);
    says(message, "dispatch_test.cpp");
  };
  check(refusal([&] { moe::dispatch(exec, matrix<float>(3, 6), s.table, rows.view()); }),
        "dispatch: tokens is [T,M] with ld >= M; got rows = 3, cols = 6, ld = 6, T = 4, M = 6");
  check(refusal([&] { moe::dispatch(exec, matrix<float>(4, 5), s.table, rows.view()); }),
        "dispatch: tokens is [T,M] with ld >= M; got rows = 4, cols = 5");
  check(refusal([&] {
          moe::dispatch(exec, matrix_view(&tokens(0, 0), 4, 6, 5), s.table, rows.view());
        }),
        "dispatch: tokens is [T,M] with ld >= M; got rows = 4, cols = 6, ld = 5");
  check(refusal([&] { moe::dispatch(exec, tokens, s.table, matrix<float>(7, 6).view()); }),
        "dispatch: rows has N rows or more of M columns, ld >= M; got rows = 7");
  check(refusal([&] { moe::dispatch(exec, tokens, s.table, matrix_view(&rows(0, 0), 8, 6, 5)); }),
        "dispatch: rows has N rows or more of M columns, ld >= M; got rows = 8, cols = 6, ld = 5");
  check(refusal([&] { moe::dispatch(exec, matrix_view(&rows(4, 0), 4, 6), s.table, rows.view()); }),
        "dispatch: tokens and rows do not overlap");
  check(refusal([&] { moe::dispatch(exec, tokens, s.table, few, rows.view()); }),
        "dispatch: weight has one value for each pair; got size = 7, pairs = 8");
  check(refusal([&] {
          moe::dispatch(exec, matrix_view(&rows(4, 0), 4, 6), s.table, weight, rows.view());
        }),
        "dispatch: tokens and rows do not overlap");
  check(refusal([&] { moe::dispatch_backward(exec, matrix<float>(7, 6), s.table, tokens.view()); }),
        "dispatch_backward: drows has N rows");
  check(refusal([&] { moe::dispatch_backward(exec, rows, s.table, matrix<float>(5, 6).view()); }),
        "dispatch_backward: dtokens is [T,M]");
  check(
      refusal([&] { moe::dispatch_backward(exec, rows, s.table, matrix_view(&rows(0, 0), 4, 6)); }),
      "dispatch_backward: drows and dtokens do not overlap");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, s.table, weight, tokens.view(), weight);
        }),
        "dispatch_backward: tokens and dtokens do not overlap");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, s.table, weight,
                                 matrix_view(&rows(0, 0), 4, 6), weight);
        }),
        "dispatch_backward: drows and dtokens do not overlap");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, s.table, few, dtokens.view(), weight);
        }),
        "dispatch_backward: weight has one value");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, s.table, weight, dtokens.view(), few);
        }),
        "dispatch_backward: dweight has one value");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, s.table, weight, dtokens.view(), weight);
        }),
        "dispatch_backward: weight and dweight do not overlap");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, s.table, weight, dtokens.view(),
                                 moe::vector_view(&dtokens(3, 0), 8));
        }),
        "dispatch_backward: dtokens and dweight do not overlap");
  matrix_view<float> const negative(&rows(0, 0), 8, -1, 6);
  check(refusal(
            [&] { moe::dispatch(exec, matrix_view(&tokens(0, 0), 4, -1, 6), s.table, negative); }),
        "dispatch: M >= 0; got M = -1");
  s.table.counts = nullptr;
  check(refusal([&] { moe::dispatch(exec, tokens, s.table, rows.view()); }),
        "dispatch: table was filled by build_table");
}
