// builtin_gemm: the three products on every instruction set against loops in double, edges,
// determinism, bad input.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/grouped_gemm.hpp>

#include "case.hpp"
#include "sets.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"
#if __has_include(<cblas.h>) && defined(MOE_TEST_CBLAS)
#include <moe/expert/cblas_gemm.hpp>
#endif

namespace {

using moe::update;

/// Rows of P experts from S sources with gaps between, all values random, NaN in the gaps.
template <class V>
struct problem {
  std::int64_t K, N, rows = 0;
  int P, S;
  std::vector<std::int32_t> begin, used;
  std::vector<V> a, b, bias, dc;

  problem(std::vector<int> const& m, int sources, std::int64_t in, std::int64_t out,
          std::int64_t gap, std::mt19937& random)
      : K(in), N(out), P(static_cast<int>(m.size()) / sources), S(sources) {
    for (int u : m) {
      begin.push_back(static_cast<std::int32_t>(rows));
      used.push_back(u);
      rows += u + gap;
    }
    a = moe_test::random_values<V>(rows * K, random);
    b = moe_test::random_values<V>(P * K * N, random);
    bias = moe_test::random_values<V>(P * N, random);
    dc = moe_test::random_values<V>(rows * N, random);
    for (std::int64_t r = 0; r < rows; ++r) {
      if (expert_of(r) >= 0) continue;
      std::fill_n(a.begin() + r * K, K, std::numeric_limits<V>::quiet_NaN());
      std::fill_n(dc.begin() + r * N, N, std::numeric_limits<V>::quiet_NaN());
    }
  }
  moe::row_segments segments() const { return {P, begin.data(), used.data(), S}; }
  int expert_of(std::int64_t r) const {
    for (std::size_t q = 0; q < used.size(); ++q)
      if (r >= begin[q] && r < begin[q] + used[q]) return static_cast<int>(q) / S;
    return -1;
  }
  moe::matrix_view<V const> A() const { return {a.data(), rows, K}; }
  moe::matrix_view<V const> DC() const { return {dc.data(), rows, N}; }
  moe::stacked_view<V const> B() const { return {b.data(), P, K, N}; }
  moe::matrix_view<V const> bias_view() const { return {bias.data(), P, N}; }
};

template <class V>
constexpr double tolerance = std::numeric_limits<V>::epsilon();  // of each product, at most 1

template <class Gemm, class V>
void check_products(moe::cpu const& exec, problem<V> const& c, bool with_bias, update how) {
  moe::buffer const scratch(Gemm::template scratch_bytes<V>(exec, c.P));
  V const old = 0.5;
  auto const segments = c.segments();
  double const start = how == update::add ? 0.5 : 0.0;

  std::vector<V> out(static_cast<std::size_t>(c.rows * c.N), old);
  moe::matrix_view<V> const C(out.data(), c.rows, c.N);
  Gemm::template forward<V>(exec, c.A(), c.B(),
                            with_bias ? c.bias_view() : moe::matrix_view<V const>(), segments, C,
                            scratch);
  std::vector<V> din(static_cast<std::size_t>(c.rows * c.K), old);
  moe::matrix_view<V> const DA(din.data(), c.rows, c.K);
  Gemm::template input_gradient<V>(exec, c.DC(), c.B(), segments, how, DA, scratch);
  std::vector<V> db(c.b.size(), old);
  moe::stacked_view<V> const DB(db.data(), c.P, c.K, c.N);
  Gemm::template weight_gradient<V>(exec, c.A(), c.DC(), segments, how, DB, scratch);

  double worst = 0;
  std::vector<double> want(c.b.size(), start);
  for (std::int64_t r = 0; r < c.rows; ++r) {
    int const p = c.expert_of(r);
    if (p < 0) {
      for (std::int64_t j = 0; j < c.N; ++j) CHECK(C(r, j) == old);
      for (std::int64_t k = 0; k < c.K; ++k) CHECK(DA(r, k) == old);
      continue;
    }
    auto const W = c.B()[p];
    for (std::int64_t j = 0; j < c.N; ++j) {
      double sum = with_bias ? c.bias_view()(p, j) : 0;
      for (std::int64_t k = 0; k < c.K; ++k) sum += double(c.A()(r, k)) * W(k, j);
      worst = moe_test::worse(worst, std::fabs(sum - C(r, j)) / (double(c.K) + 4));
    }
    for (std::int64_t k = 0; k < c.K; ++k) {
      double sum = start;
      for (std::int64_t j = 0; j < c.N; ++j) {
        sum += double(c.DC()(r, j)) * W(k, j);
        want[static_cast<std::size_t>((p * c.K + k) * c.N + j)] +=
            double(c.A()(r, k)) * c.DC()(r, j);
      }
      worst = moe_test::worse(worst, std::fabs(sum - DA(r, k)) / (double(c.N) + 4));
    }
  }
  for (std::size_t i = 0; i < want.size(); ++i)
    worst = moe_test::worse(worst, std::fabs(want[i] - db[i]) / (double(c.rows) + 4));
  CHECK(worst < tolerance<V>);
}

}  // namespace

TEST_CASE_TEMPLATE("expert/grouped_gemm: the three products equal loops in double", V, float,
                   double) {
  std::mt19937 random(5);
  struct {
    std::vector<int> m;
    int sources;
    std::int64_t K, N;
  } const cases[] = {
      {{1, 0, 2, 3}, 1, 5, 7},
      {{7, 6, 13, 12}, 1, 33, 70},
      {{25, 49, 0, 10}, 2, 17, 130},
      {{1, 2, 3, 4, 5, 6, 7, 8, 9}, 3, 64, 64},
      {{500, 0, 1}, 1, 40, 24},
      {{60, 9, 8}, 1, 300, 290},
      {{0, 0}, 1, 9, 9},
      {{5, 40}, 1, 1, 1},
      {{3, 20}, 1, 140, 600},
      {{20, 14}, 1, 600, 20},
  };
  for (auto const& c : cases)
    for (std::int64_t gap : {0, 3})
      for (update how : {update::assign, update::add}) {
        CAPTURE(c.K);
        CAPTURE(c.N);
        CAPTURE(gap);
        problem<V> const made(c.m, c.sources, c.K, c.N, gap, random);
        moe_test::for_each_set([&]<class Set>(Set) {
          CAPTURE(Set::name);
          check_products<moe::gemm_on<Set>>(moe::cpu{}, made, gap == 0, how);
        });
#if defined(MOE_TEST_CBLAS)
        check_products<moe::cblas_gemm>(moe::cpu{}, made, gap == 0, how);
#endif
      }
}

TEST_CASE("expert/grouped_gemm: leading dimensions and strides") {
  // B is a block of a wider matrix, C one of a wider buffer.
  std::mt19937 random(6);
  problem<double> const c({4, 11}, 1, 10, 20, 0, random);
  auto const wide = moe_test::random_values<double>(2 * 15 * 31, random);
  moe::stacked_view<double const> const b(wide.data() + 3, 2, 10, 20, 31, 15 * 31);
  std::vector<double> out(15 * 50, 9.0);
  moe::buffer const scratch(moe::builtin_gemm::scratch_bytes<double>(moe::cpu{}, 2));
  moe::builtin_gemm::forward<double>(moe::cpu{}, c.A(), b, {}, c.segments(),
                                     {out.data(), 15, 20, 50}, scratch);
  for (std::int64_t r = 0; r < 15; ++r)
    for (std::int64_t j = 0; j < 50; ++j) {
      double want = 0;
      for (std::int64_t k = 0; k < 10; ++k) want += c.A()(r, k) * b[r < 4 ? 0 : 1](k, j % 31);
      if (j >= 20) want = 9.0;
      CHECK(out[static_cast<std::size_t>(r * 50 + j)] == doctest::Approx(want).epsilon(1e-14));
    }
}

TEST_CASE("expert/grouped_gemm: bitwise equal for any number of threads") {
  std::mt19937 random(7);
  problem<float> const c({1, 5, 0, 600, 30, 11}, 1, 150, 530, 2, random);
  auto const run = [&]<class Set>(Set, moe::cpu const& exec) {
    using products = moe::gemm_on<Set>;
    moe::buffer const scratch(products::template scratch_bytes<float>(exec, c.P));
    std::vector<float> all(static_cast<std::size_t>(c.rows * (c.N + c.K) + c.P * c.K * c.N), 0.25f);
    moe::matrix_view<float> const C(all.data(), c.rows, c.N);
    moe::matrix_view<float> const DA(C.data() + c.rows * c.N, c.rows, c.K);
    moe::stacked_view<float> const DB(DA.data() + c.rows * c.K, c.P, c.K, c.N);
    products::template forward<float>(exec, c.A(), c.B(), c.bias_view(), c.segments(), C, scratch);
    products::template input_gradient<float>(exec, c.DC(), c.B(), c.segments(), update::add, DA,
                                             scratch);
    products::template weight_gradient<float>(exec, c.A(), c.DC(), c.segments(), update::add, DB,
                                              scratch);
    return all;
  };
  moe_test::for_each_set([&](auto set) {
    CAPTURE(set.name);
    auto const want = run(set, moe::cpu{});
    for (int threads : {2, 3, 7}) {
      moe::thread_team team(threads);
      CHECK(run(set, team) == want);
    }
  });
}

TEST_CASE_TEMPLATE("expert/grouped_gemm: a row's result does not depend on the other rows", V,
                   float, double) {
  std::mt19937 random(8);
  std::int64_t const K = 203, N = 77;
  problem<V> const c({70}, 1, K, N, 0, random);
  std::vector<V> all(70 * 77), some(70 * 77);
  moe_test::for_each_set([&]<class Set>(Set) {
    using products = moe::gemm_on<Set>;
    CAPTURE(Set::name);
    moe::buffer const scratch(products::template scratch_bytes<V>(moe::cpu{}, 1));
    products::template forward<V>(moe::cpu{}, c.A(), c.B(), c.bias_view(), c.segments(),
                                  {all.data(), 70, N}, scratch);
    for (int m : {1, 2, 3, 4, 6, 7, 12, 13, 25, 50}) {
      CAPTURE(m);
      std::int32_t const begin = 19, used = m;
      products::template forward<V>(moe::cpu{}, c.A(), c.B(), c.bias_view(), {1, &begin, &used},
                                    {some.data(), 70, N}, scratch);
      CHECK(std::equal(some.begin() + begin * N, some.begin() + (begin + m) * N,
                       all.begin() + begin * N));
    }
  });
}

TEST_CASE("expert/grouped_gemm: bad input is refused with the values") {
  std::mt19937 random(9);
  problem<float> const c({2, 3}, 1, 4, 6, 0, random);
  moe::cpu const exec;
  moe::buffer const scratch(moe::builtin_gemm::scratch_bytes<float>(exec, 2));
  std::vector<float> out(5 * 6);
  moe::matrix_view<float> const C(out.data(), 5, 6);
  using moe_test::refuse;
  using G = moe::builtin_gemm;
  refuse(
      [&] { G::forward<float>(exec, c.A(), {c.b.data(), 1, 4, 6}, {}, c.segments(), C, scratch); },
      "one matrix for each expert of the segments; got matrices = 1, experts = 2");
  refuse(
      [&] { G::forward<float>(exec, c.A(), {c.b.data(), 2, 6, 4}, {}, c.segments(), C, scratch); },
      "rows and weights agree in width; got weights.rows = 6");
  refuse(
      [&] {
        G::forward<float>(exec, c.A(), c.B(), {c.bias.data(), 2, 4}, c.segments(), C, scratch);
      },
      "bias is [P,out]; got bias.rows = 2, bias.cols = 4");
  refuse(
      [&] { G::forward<float>(exec, c.A(), c.B(), {}, c.segments(), {out.data(), 4, 6}, scratch); },
      "as many rows in as out; got rows = 5, other rows = 4");
  refuse(
      [&] {
        moe::memory const small(scratch.data(), scratch.size() / 2);
        G::forward<float>(exec, c.A(), c.B(), {}, c.segments(), C, small);
      },
      "scratch >= scratch_bytes; got bytes needed");
  refuse(
      [&] { G::input_gradient<float>(exec, c.A(), c.B(), c.segments(), update::add, C, scratch); },
      "rows and weights agree in width");
  refuse(
      [&] {
        G::weight_gradient<float>(exec, c.A(), c.DC(), c.segments(), update::add,
                                  {out.data(), 2, 6, 4}, scratch);
      },
      "rows and weights agree in width");
}
