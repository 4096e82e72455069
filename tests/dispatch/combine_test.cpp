// Tests of moe/dispatch/combine.hpp.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/dispatch.hpp>

#include "movement.hpp"

using namespace moe_test;

namespace {

/// What combine says, in double. No weights are ones.
template <class S>
double sum_of(slow_table const& s, matrix<S> const& rows, accumulate_t<S> const* weight,
              matrix<S> const& tokens, std::int64_t t, std::int64_t col) {
  double sum = 0;
  for (std::int64_t i = s.table.first_pair(t); i < s.table.first_pair(t + 1); ++i) {
    auto const p = static_cast<std::size_t>(i);
    double const w = weight != nullptr ? static_cast<double>(weight[i]) : 1;
    if (s.has_row(p)) sum += w * value(rows(s.row_of[p], col));
    if (s.is_copy(p)) sum += w * value(tokens(t, col));
  }
  return sum;
}

/// drows of combine_backward, bit by bit.
template <class S>
bool drows_are_right(slow_table const& s, std::vector<accumulate_t<S>> const& weight,
                     matrix<S> const& dout, matrix<S> const& drows, std::int64_t M) {
  for (std::int64_t r = 0; r < s.N(); ++r)
    for (std::int64_t c = 0; c < M; ++c) {
      S expected = make<S>(0);
      if (s.pair(r) >= 0)
        expected = static_cast<S>(weight[static_cast<std::size_t>(s.pair(r))] *
                                  static_cast<accumulate_t<S>>(dout(s.token(r), c)));
      if (!(drows(r, c) == expected)) return false;
    }
  return true;
}

}  // namespace

TEST_CASE("dispatch/combine: two rows of one token, and a token whose pairs were dropped") {
  hand_made_table const table(2, 2, {1, 0, moe::dropped_row, moe::dropped_row}, {1, 0},
                              {.rows = 2, .kept = 2, .dropped = 2});
  std::vector<float> const rows{1, 2, 10, 20}, weight{0.75f, 0.25f, 5, 5};
  std::vector<float> out(4, 9);
  moe::combine(cpu{}, {rows, 2, 2}, table, weight, matrix_view(out, 2, 2));
  CHECK(out == std::vector<float>{7.75f, 15.5f, 0, 0});
  moe::combine(cpu{}, {rows, 2, 2}, table, matrix_view(out, 2, 2));
  CHECK(out == std::vector<float>{11, 22, 0, 0});
  out = {1, 2, 3, 4};
  moe::combine(cpu{}, {rows, 2, 2}, table, weight, matrix_view(out, 2, 2), update::add);
  CHECK(out == std::vector<float>{8.75f, 17.5f, 3, 4});

  std::vector<float> const dout{1, 2, 3, 4};
  std::vector<float> drows(6, 9), dweight(4, 9);
  moe::combine_backward(cpu{}, {dout, 2, 2}, {rows, 2, 2}, table, weight, matrix_view(drows, 3, 2),
                        dweight);
  CHECK(drows == std::vector<float>{0.25f, 0.5f, 0.75f, 1.5f, 9, 9});
  CHECK(dweight == std::vector<float>{50, 5, 0, 0});
}

TEST_CASE("dispatch/combine: copy experts give the token, others without rows give nothing") {
  using moe::no_row;
  hand_made_table const table(2, 2,
                              {no_row(expert_kind::copy), no_row(expert_kind::zero),
                               no_row(expert_kind::constant), no_row(expert_kind::shared)},
                              {}, {.uncomputed = 4});
  std::vector<float> const tokens{1, 2, 3, 4}, weight{0.5f, 7, 7, 7};
  std::vector<float> rows, out(4, 9);
  moe::combine(cpu{}, {rows, 0, 2}, table, weight, {tokens, 2, 2}, matrix_view(out, 2, 2));
  CHECK(out == std::vector<float>{0.5f, 1, 0, 0});
  std::vector<float> const dout{1, 10, 100, 1000};
  std::vector<float> dweight(4, 9), dtokens(4, 9);
  moe::combine_backward(cpu{}, {dout, 2, 2}, {rows, 0, 2}, table, weight, {tokens, 2, 2},
                        matrix_view(rows, 0, 2), dweight, matrix_view(dtokens, 2, 2));
  CHECK(dweight == std::vector<float>{21, 0, 0, 0});
  CHECK(dtokens == std::vector<float>{0.5f, 5, 0, 0});
}

TEST_CASE_TEMPLATE("dispatch/combine: weighted sums, as in double", S, float, double, bf16, half) {
  for_cases([](table_case const& c, std::int64_t M) {
    slow_table const s(c);
    auto const rows = matrix<S>(s.N(), M, 1, 1).fill(2);
    auto const tokens = matrix<S>(c.T, M, 3, 0).fill(3);
    auto const weight = random_vector<accumulate_t<S>>(s.pairs(), 4);
    for (bool const weighted : {true, false})
      for (update const mode : {update::assign, update::add}) {
        auto out = matrix<S>(c.T, M, 2, 1).fill(5);
        matrix<S> const before = out;
        if (c.kinds && !weighted) continue;
        if (c.kinds)
          moe::combine(cpu{}, rows, s.table, weight, tokens, out.view(), mode);
        else if (weighted)
          moe::combine(cpu{}, rows, s.table, weight, out.view(), mode);
        else
          moe::combine(cpu{}, rows, s.table, out.view(), mode);
        bool right = true;
        for (std::int64_t t = 0; t < c.T; ++t)
          for (std::int64_t col = 0; col < M; ++col) {
            double const old = mode == update::add ? value(before(t, col)) : 0;
            double const sum =
                old + sum_of(s, rows, weighted ? weight.data() : nullptr, tokens, t, col);
            right = right && near<S>(value(out(t, col)), sum);
          }
        CHECK(right);
        CHECK(out.gaps_untouched());
      }
  });
}

TEST_CASE_TEMPLATE("dispatch/combine: 16-bit rows are summed in float and rounded once", S, bf16,
                   half) {
  slow_table const s({.T = 40, .K = 7, .E = 9, .dropped = 0.2});
  std::int64_t const M = 75;
  auto const rows = matrix<S>(s.N(), M).fill(2);
  auto const start = matrix<S>(40, M).fill(5);
  // Weights of 8 bits: the products are exact, so contraction to fused operations changes nothing.
  auto weight = random_vector<float>(s.pairs(), 3);
  for (float& w : weight) w = static_cast<float>(static_cast<bf16>(w));
  for (update const mode : {update::assign, update::add}) {
    matrix<S> out = start;
    moe::combine(cpu{}, rows, s.table, weight, out.view(), mode);
    bool same = true;
    for (std::int64_t t = 0; t < 40; ++t)
      for (std::int64_t c = 0; c < M; ++c) {
        float sum = mode == update::add ? static_cast<float>(start(t, c)) : 0.0f;
        for (std::int64_t i = t * 7; i < t * 7 + 7; ++i) {
          auto const p = static_cast<std::size_t>(i);
          if (s.has_row(p)) sum += weight[p] * static_cast<float>(rows(s.row_of[p], c));
        }
        same = same && out(t, c) == static_cast<S>(sum);
      }
    CHECK(same);
  }
}

TEST_CASE_TEMPLATE("dispatch/combine: every float is rounded as its scalar type says", S, bf16,
                   half) {
  // Weight w times a row of ones: w itself is rounded, in the vector part and in the tail.
  std::int64_t const T = 1 << 16, M = 33;
  slow_table const s({.T = T, .K = 1, .E = 1});
  matrix<S> ones(T, M), out(T, M), rows(T, M);
  for (std::int64_t r = 0; r < T; ++r)
    for (std::int64_t c = 0; c < M; ++c) ones(r, c) = make<S>(1);
  for (std::uint32_t const low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
    CAPTURE(low);
    std::vector<float> weight;
    for (std::uint32_t high = 0; high < (1u << 16); ++high)
      weight.push_back(__builtin_bit_cast(float, high << 16 | low));
    moe::combine(cpu{}, ones, s.table, weight, out.view());
    moe::dispatch(cpu{}, ones, s.table, weight, rows.view());
    std::int64_t wrong = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      float const product = weight[static_cast<std::size_t>(t)] * 1.0f;
      S const expected = static_cast<S>(product);
      for (std::int64_t c = 0; c < M; ++c) {
        wrong += out(t, c).bits != expected.bits;
        wrong += rows(t, c).bits != expected.bits;  // one expert: row t is token t
      }
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE_TEMPLATE("dispatch/combine: the same past the cache, for any alignment of rows", S, float,
                   double, bf16) {
  std::int64_t const T = sizeof(S) == 2 ? 6300 : 3200, M = 1021;
  slow_table const s({.T = T, .K = 2, .E = 5, .align = 64, .dropped = 0.1});
  auto const rows = matrix<S>(s.N(), M, 0, 1).fill(4);
  auto const weight = random_vector<accumulate_t<S>>(s.pairs(), 5);
  for (std::int64_t const skew : {0, 1, 3}) {
    CAPTURE(skew);
    matrix<S> out(T, M, skew, skew);
    REQUIRE(T * M * static_cast<std::int64_t>(sizeof(S)) > moe::detail::past_cache_bytes);
    moe::combine(cpu{}, rows, s.table, weight, out.view());
    bool right = true;
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t c = 0; c < M; ++c)
        right = right && near<S>(value(out(t, c)), sum_of(s, rows, weight.data(), out, t, c));
    CHECK(right);
    CHECK(out.gaps_untouched());

    matrix<S> drows(s.N(), M, skew, skew);
    std::vector<accumulate_t<S>> dweight(weight.size());
    moe::combine_backward(cpu{}, out, rows, s.table, weight, drows.view(), dweight);
    CHECK(drows_are_right<S>(s, weight, out, drows, M));
    CHECK(drows.gaps_untouched());
  }
}

TEST_CASE_TEMPLATE("dispatch/combine_backward: scaled gradients and dot products, as in double", S,
                   float, double, bf16, half) {
  for_cases([](table_case const& c, std::int64_t M) {
    slow_table const s(c);
    auto const rows = matrix<S>(s.N(), M, 1, 1).fill(2);
    auto const tokens = matrix<S>(c.T, M, 3, 0).fill(3);
    auto const dout = matrix<S>(c.T, M, 2, 1).fill(4);
    auto const weight = random_vector<accumulate_t<S>>(s.pairs(), 5);
    matrix<S> drows(s.N(), M, 1, 2), dtokens(c.T, M, 2, 2);
    std::vector<accumulate_t<S>> dweight(weight.size(), 7);
    if (c.kinds)
      moe::combine_backward(cpu{}, dout, rows, s.table, weight, tokens, drows.view(), dweight,
                            dtokens.view());
    else
      moe::combine_backward(cpu{}, dout, rows, s.table, weight, drows.view(), dweight);
    CHECK(drows_are_right<S>(s, weight, dout, drows, M));
    CHECK(drows.gaps_untouched());
    bool right = true;
    for (std::size_t i = 0; i < weight.size(); ++i) {
      std::int64_t const t = s.token_of[i];
      double dot = 0;
      for (std::int64_t col = 0; col < M; ++col) {
        if (s.has_row(i)) dot += value(rows(s.row_of[i], col)) * value(dout(t, col));
        if (s.is_copy(i)) dot += value(tokens(t, col)) * value(dout(t, col));
      }
      right = right && near<accumulate_t<S>>(static_cast<double>(dweight[i]), dot);
    }
    CHECK(right);
    for (std::int64_t t = 0; c.kinds && t < c.T; ++t) {
      double copied = 0;
      for (std::size_t i = 0; i < weight.size(); ++i)
        if (s.token_of[i] == t && s.is_copy(i)) copied += static_cast<double>(weight[i]);
      for (std::int64_t col = 0; col < M; ++col)
        right = right && near<S>(value(dtokens(t, col)), copied * value(dout(t, col)));
    }
    CHECK(right);
    CHECK(dtokens.gaps_untouched());
  });
}

TEST_CASE("dispatch/combine_backward: drows may be rows itself") {
  slow_table const s({.T = 30, .K = 3, .E = 4, .align = 8, .dropped = 0.2});
  std::int64_t const M = 41;
  auto rows = matrix<float>(s.N(), M, 1).fill(2);
  auto const dout = matrix<float>(30, M).fill(3);
  auto const weight = random_vector<float>(s.pairs(), 4);
  matrix<float> drows(s.N(), M, 1);
  std::vector<float> dweight(weight.size()), in_place(weight.size());
  moe::combine_backward(cpu{}, dout, rows, s.table, weight, drows.view(), dweight);
  moe::combine_backward(cpu{}, dout, rows, s.table, weight, rows.view(), in_place);
  CHECK(rows.same_bits(drows));
  CHECK(dweight == in_place);
}

TEST_CASE("dispatch/combine_backward: gradients agree with central differences") {
  slow_table const s({.T = 6, .K = 4, .E = 7, .align = 3, .dropped = 0.2, .kinds = true});
  REQUIRE(s.counts.kept > 2);
  REQUIRE(s.counts.uncomputed > 2);
  std::int64_t const M = 3;
  auto tokens = matrix<double>(6, M).fill(2);
  auto rows = matrix<double>(s.N(), M).fill(3);
  auto weight = random_vector<double>(s.pairs(), 4);
  auto const y = matrix<double>(6, M).fill(5);
  matrix<double> out(6, M), dout(6, M), drows(s.N(), M), dtokens(6, M);
  auto const loss = [&] {
    moe::combine(cpu{}, rows, s.table, weight, tokens, out.view());
    double sum = 0;
    for (std::int64_t t = 0; t < 6; ++t)
      for (std::int64_t c = 0; c < M; ++c) sum += y(t, c) * std::sin(out(t, c));
    return sum;
  };
  loss();
  for (std::int64_t t = 0; t < 6; ++t)
    for (std::int64_t c = 0; c < M; ++c) dout(t, c) = y(t, c) * std::cos(out(t, c));
  std::vector<double> dweight(weight.size());
  moe::combine_backward(cpu{}, dout, rows, s.table, weight, tokens, drows.view(), dweight,
                        dtokens.view());
  for (std::int64_t c = 0; c < M; ++c) {
    for (std::int64_t r = 0; r < s.N(); ++r)
      CHECK(std::abs(drows(r, c) - central_difference(rows(r, c), loss)) < 1e-8);
    for (std::int64_t t = 0; t < 6; ++t)
      CHECK(std::abs(dtokens(t, c) - central_difference(tokens(t, c), loss)) < 1e-8);
  }
  for (std::size_t i = 0; i < weight.size(); ++i)
    CHECK(std::abs(dweight[i] - central_difference(weight[i], loss)) < 1e-8);
}

TEST_CASE("dispatch/combine: undoes dispatch when the weights of a token sum to one") {
  slow_table const s({.T = 50, .K = 4, .E = 6, .align = 8});
  std::int64_t const M = 35;
  auto const tokens = matrix<double>(50, M).fill(2);
  matrix<double> rows(s.N(), M), out(50, M);
  std::vector<double> const weight(200, 0.25);
  moe::dispatch(cpu{}, tokens, s.table, rows.view());
  moe::combine(cpu{}, rows, s.table, weight, out.view());
  CHECK(out.same_bits(tokens));
  // Weights before the experts instead of after them.
  matrix<double> again(50, M);
  moe::dispatch(cpu{}, tokens, s.table, weight, rows.view());
  moe::combine(cpu{}, rows, s.table, again.view());
  CHECK(again.same_bits(tokens));
}

TEST_CASE_TEMPLATE("dispatch/combine: bitwise equal for any number of threads", S, float, bf16) {
  slow_table const s({.T = 700, .K = 5, .E = 10, .align = 16, .dropped = 0.1, .kinds = true});
  std::int64_t const M = 515;
  auto const tokens = matrix<S>(700, M).fill(2);
  auto const rows = matrix<S>(s.N(), M).fill(3);
  auto const dout = matrix<S>(700, M).fill(4);
  auto const weight = random_vector<float>(s.pairs(), 5);
  struct results {
    matrix<S> out, drows, dtokens;
    std::vector<float> dweight;
  };
  auto const run = [&](cpu const& exec) {
    results r{{700, M}, {s.N(), M}, {700, M}, std::vector<float>(weight.size())};
    moe::combine(exec, rows, s.table, weight, tokens, r.out.view());
    moe::combine_backward(exec, dout, rows, s.table, weight, tokens, r.drows.view(), r.dweight,
                          r.dtokens.view());
    return r;
  };
  results const one = run(cpu{});
  for (int const threads : {1, 2, 3, 7}) {
    CAPTURE(threads);
    moe::thread_team team(threads);
    results const many = run(team);
    CHECK(one.out.same_bits(many.out));
    CHECK(one.drows.same_bits(many.drows));
    CHECK(one.dtokens.same_bits(many.dtokens));
    CHECK(one.dweight == many.dweight);
  }
}

TEST_CASE("dispatch/combine: bad input is refused with the rule and the values") {
  slow_table const s({.T = 4, .K = 2, .E = 3}), kinds({.T = 4, .K = 2, .E = 5, .kinds = true});
  REQUIRE(kinds.counts.uncomputed > 0);
  matrix<float> rows(8, 6), out(4, 6), tokens(4, 6), drows(8, 6), dtokens(4, 6);
  std::vector<float> weight(8), dweight(8), few(7);
  cpu const exec;
  auto const check = [](std::string const& message, char const* rule) {
    says(message, rule);
    says(message, "combine_test.cpp");
  };
  check(refusal([&] { moe::combine(exec, matrix<float>(7, 6), s.table, weight, out.view()); }),
        "combine: rows has N rows or more of M columns, ld >= M; "
        "got rows = 7, cols = 6, ld = 6, N = 8, M = 6");
  check(refusal([&] { moe::combine(exec, rows, s.table, few, out.view()); }),
        "combine: weight has one value for each pair; got size = 7, pairs = 8");
  check(refusal([&] { moe::combine(exec, rows, s.table, weight, matrix<float>(3, 6).view()); }),
        "combine: out is [T,M] with ld >= M; got rows = 3");
  check(refusal([&] { moe::combine(exec, rows, s.table, weight, matrix_view(&rows(4, 0), 4, 6)); }),
        "combine: rows and out do not overlap");
  check(refusal([&] { moe::combine(exec, rows, s.table, matrix_view(&rows(4, 0), 4, 6)); }),
        "combine: rows and out do not overlap");
  check(refusal([&] { moe::combine(exec, rows, s.table, weight, out, out.view()); }),
        "combine: tokens and out do not overlap");
  check(
      refusal([&] { moe::combine(exec, rows, s.table, weight, matrix<float>(4, 5), out.view()); }),
      "combine: tokens is [T,M] with ld >= M; got rows = 4, cols = 5");

  char const* const computed =
      ": tokens are given if pairs are at experts that are not computed; got uncomputed = ";
  check(refusal([&] { moe::combine(exec, rows, kinds.table, weight, out.view()); }), computed);
  check(refusal([&] { moe::combine(exec, rows, kinds.table, out.view()); }), computed);
  check(refusal([&] {
          moe::combine_backward(exec, out, rows, kinds.table, weight, drows.view(), dweight);
        }),
        computed);

  check(
      refusal([&] { moe::combine_backward(exec, out, rows, s.table, weight, drows.view(), few); }),
      "combine_backward: dweight has one value");
  check(refusal([&] {
          moe::combine_backward(exec, matrix<float>(3, 6), rows, s.table, weight, drows.view(),
                                dweight);
        }),
        "combine_backward: dout is [T,M]");
  check(refusal([&] {
          moe::combine_backward(exec, out, rows, s.table, weight, matrix<float>(7, 6).view(),
                                dweight);
        }),
        "combine_backward: drows has N rows");
  matrix<float> both(9, 6);
  check(refusal([&] {
          moe::combine_backward(exec, out, matrix_view(&both(1, 0), 8, 6), s.table, weight,
                                matrix_view(&both(0, 0), 8, 6), dweight);
        }),
        "combine_backward: rows and drows are one view or do not overlap");
  check(refusal([&] {
          moe::combine_backward(exec, matrix_view(&drows(2, 0), 4, 6), rows, s.table, weight,
                                drows.view(), dweight);
        }),
        "combine_backward: dout and drows do not overlap");
  check(refusal([&] {
          moe::combine_backward(exec, out, rows, s.table, weight, drows.view(),
                                moe::vector_view(weight.data(), 8));
        }),
        "combine_backward: weight and dweight do not overlap");
  auto const backward = [&](auto t, auto d, auto dt) {
    return refusal(
        [&] { moe::combine_backward(exec, out, rows, s.table, weight, t, d, dweight, dt); });
  };
  check(backward(tokens.view(), drows.view(), tokens.view()),
        "combine_backward: tokens and dtokens do not overlap");
  check(backward(tokens.view(), drows.view(), matrix_view(&drows(2, 0), 4, 6)),
        "combine_backward: drows and dtokens do not overlap");
  check(backward(tokens.view(), drows.view(), out.view()),
        "combine_backward: dout and dtokens do not overlap");
  check(backward(tokens.view(), drows.view(), matrix_view(&rows(2, 0), 4, 6)),
        "combine_backward: rows and dtokens do not overlap");
  check(backward(matrix_view(&drows(2, 0), 4, 6), drows.view(), dtokens.view()),
        "combine_backward: tokens and drows do not overlap");
}
