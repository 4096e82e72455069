// Constant and shared experts: worked examples, the definition, gradients by differences.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/kinds.hpp>

#include "case.hpp"
#include "support/refusal.hpp"

namespace {

using moe::update;
using moe_test::random_values;

moe::expert_kind const kinds[] = {moe::expert_kind::computed, moe::expert_kind::constant,
                                  moe::expert_kind::constant, moe::expert_kind::shared,
                                  moe::expert_kind::zero};

moe::expert_map map_of_kinds() {
  moe::expert_map map;
  map.kind = kinds;
  return map;
}

struct constant_case {
  std::int64_t T = 23, M = 6;
  std::mt19937 random{21};
  moe_test::table_of routed{T, 3, 5, {}, random, false, 1, map_of_kinds()};
  std::vector<double> x = random_values<double>(T * M, random);
  std::vector<double> dout = random_values<double>(T * M, random);
  std::vector<double> weight{routed.routing.weight, routed.routing.weight + T * 3};
  std::vector<double> select = random_values<double>(2 * 2 * M, random);
  std::vector<double> value = random_values<double>(2 * M, random);

  moe::constant_experts<double> experts() {
    return {1, {select.data(), 2, 2, M}, {value.data(), 2, M}};
  }
  moe::vector_view<std::int32_t const> expert() const { return {routed.routing.expert, T * 3}; }
  moe::matrix_view<double const> view(std::vector<double> const& v) const {
    return {v.data(), T, M};
  }

  std::vector<double> run(moe::cpu const& exec = {}) {
    std::vector<double> out(x.size(), 0.25);
    moe::add_constant_experts(exec, experts(), view(x), expert(), routed.table, weight,
                              moe::matrix_view<double>(out, T, M));
    return out;
  }
  double loss() {
    auto const out = run();
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * dout[i];
    return sum;
  }
  void check(std::vector<double>& values, std::vector<double> const& gradient) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      double const old = values[i], h = 1e-5;
      values[i] = old + h;
      double const above = loss();
      values[i] = old - h;
      double const below = loss();
      values[i] = old;
      CHECK(std::fabs(gradient[i] - (above - below) / (2 * h)) < 1e-8);
    }
  }
};

}  // namespace

TEST_CASE("expert/kinds: a constant expert mixes the token with its vector") {
  constant_case c;
  auto const out = c.run();
  double changed = 0;
  for (std::int64_t t = 0; t < c.T; ++t)
    for (std::int64_t j = 0; j < c.M; ++j) {
      double want = 0.25;
      for (std::int64_t i = t * 3; i < t * 3 + 3; ++i) {
        int const e = c.routed.routing.expert[i];
        if (e != 1 && e != 2) continue;
        double z[2] = {};
        for (int r = 0; r < 2; ++r)
          for (std::int64_t k = 0; k < c.M; ++k)
            z[r] += c.experts().select[e - 1](r, k) * c.view(c.x)(t, k);
        double const a = std::exp(z[0]) / (std::exp(z[0]) + std::exp(z[1]));
        want += c.weight[static_cast<std::size_t>(i)] *
                (a * c.view(c.x)(t, j) + (1 - a) * c.experts().value(e - 1, j));
        ++changed;
      }
      CHECK(out[static_cast<std::size_t>(t * c.M + j)] == doctest::Approx(want).epsilon(1e-12));
    }
  CHECK(changed > 20);
}

TEST_CASE("expert/kinds: gradients of constant experts; any number of threads") {
  constant_case c;
  auto const backward = [&](moe::cpu const& exec, update how) {
    std::vector<double> all(c.x.size() + c.weight.size() + c.select.size() + c.value.size(), 0.0);
    double* const dx = all.data();
    double* const dweight = dx + c.x.size();
    double* const dselect = dweight + c.weight.size();
    double* const dvalue = dselect + c.select.size();
    if (how == update::assign) std::fill(dselect, dvalue + c.value.size(), 7.0);  // replaced
    moe::add_constant_experts_backward(
        exec, c.experts(), c.view(c.dout), c.view(c.x), c.expert(), c.routed.table, c.weight,
        moe::matrix_view<double>(dx, c.T, c.M),
        moe::vector_view<double>(dweight, static_cast<std::int64_t>(c.weight.size())),
        moe::constant_experts<double>{1, {dselect, 2, 2, c.M}, {dvalue, 2, c.M}}, how);
    return all;
  };
  auto const all = backward({}, update::assign);
  auto first = all.begin();
  auto const next = [&](std::size_t n) {
    std::vector<double> part(first, first + static_cast<std::ptrdiff_t>(n));
    first += static_cast<std::ptrdiff_t>(n);
    return part;
  };
  c.check(c.x, next(c.x.size()));
  c.check(c.weight, next(c.weight.size()));
  c.check(c.select, next(c.select.size()));
  c.check(c.value, next(c.value.size()));
  CHECK(backward({}, update::add) == all);
  moe::thread_team team(3);
  CHECK(backward(team, update::assign) == all);
}

TEST_CASE("expert/kinds: a shared expert sees every token, its coefficient is base plus weights") {
  constant_case c;
  std::vector<double> base(static_cast<std::size_t>(c.T), 1.0), coefficient(base.size());
  moe::shared_coefficients({}, c.routed.table, c.weight, base,
                           moe::vector_view<double>(coefficient));
  std::vector<double> dcoefficient = random_values<double>(c.T, c.random);
  std::vector<double> dweight(c.weight.size(), 9.0);
  moe::shared_coefficients_backward({}, c.routed.table, dcoefficient,
                                    moe::vector_view<double>(dweight));
  std::vector<double> out(c.x.size(), 0.5);
  moe::add_shared_rows({}, c.view(c.x), coefficient, moe::matrix_view<double>(out, c.T, c.M));
  int chosen = 0;
  for (std::size_t t = 0; t < base.size(); ++t) {
    double want = 1;
    for (std::size_t i = t * 3; i < t * 3 + 3; ++i)
      if (c.routed.routing.expert[i] == 3) {
        want += c.weight[i];
        CHECK(dweight[i] == dcoefficient[t]);
        ++chosen;
      } else {
        CHECK(dweight[i] == 9.0);
      }
    CHECK(coefficient[t] == want);
    CHECK(out[t * 6 + 2] == 0.5 + want * c.x[t * 6 + 2]);
  }
  CHECK(chosen > 3);
}

TEST_CASE("expert/kinds: all rows are one segment") {
  moe::all_rows const all(12);
  moe::row_segments const segments = all;
  CHECK(segments.experts == 1);
  CHECK(segments.rows(0) == 12);
  CHECK_THROWS_AS(moe::all_rows(-1), moe::precondition_error);
}

TEST_CASE("expert/kinds: bad shapes are refused, none is read or written beyond its end") {
  using moe_test::refusal;
  using moe_test::says;
  constant_case c;
  std::vector<double> out(c.x.size()), dweight(c.weight.size());
  moe::matrix_view<double> const whole(out, c.T, c.M), less(out.data(), c.T - 1, c.M);
  auto const forward = [&](moe::constant_experts<double> const& experts,
                           moe::matrix_view<double const> x, moe::matrix_view<double> to) {
    return refusal([&] {
      moe::add_constant_experts(moe::cpu{}, experts, x, c.expert(), c.routed.table, c.weight, to);
    });
  };
  auto narrow = c.experts();
  narrow.select = {c.select.data(), 2, 2, c.M - 1};
  says(forward(narrow, c.view(c.x), whole), "constant_experts: select is [n,2,M], value [n,M]");
  says(forward(c.experts(), less, whole), "add_constant_experts: tokens and out are [T,M]");
  says(forward(c.experts(), c.view(c.x), less), "out.rows = 22, T = 23");
  says(forward(c.experts(), c.view(c.x), whole), "nothing was thrown");

  auto const backward = [&](moe::constant_experts<double> const& gradients,
                            moe::matrix_view<double> dx, moe::vector_view<double> dw) {
    return refusal([&] {
      moe::add_constant_experts_backward(moe::cpu{}, c.experts(), c.view(c.dout), c.view(c.x),
                                         c.expert(), c.routed.table, c.weight, dx, dw, gradients,
                                         update::add);
    });
  };
  says(backward(narrow, whole, dweight), "constant_experts: select is [n,2,M], value [n,M]");
  auto one = c.experts();
  one.select = {c.select.data(), 1, 2, c.M};
  one.value = {c.value.data(), 1, c.M};
  says(backward(one, whole, dweight),
       "as many gradients as experts; got gradients = 1, experts = 2");
  says(backward(c.experts(), less, dweight), "dtokens.rows = 22");
  says(backward(c.experts(), whole, {dweight.data(), 5}), "dweight = 5");
}
