// All forms of dispatch and combine on one problem, by any executor: what kernels are compared by.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/dispatch/combine.cuh>
#include <moe/dispatch/dispatch.cuh>

#include "dispatch/movement.hpp"

namespace moe_test {

/// Where the elements of matrices are: gaps behind rows, elements before the first.
struct placing {
  std::int64_t gap = 0, skew = 0;
};

/// Numbers of 8 bits, random or multiples of 1/16. Products of two are exact in float, so that it does
/// not matter whether a sum fuses them; sums of random ones depend on their order, those of the
/// others are exact, too.
enum class numbers { random, exact };

template <class S>
void to_numbers(numbers kind, S& x) {
  double const v = value(x);
  x = kind == numbers::exact ? make<S>(static_cast<double>(static_cast<int>(v * 16)) / 16)
                             : make<S>(value(static_cast<bf16>(static_cast<float>(v))));
}

/// A table and everything that is moved by it. The host knows only max_rows >= N.
template <class S>
struct movement {
  table_case c;
  slow_table s;
  std::int64_t M, N;
  placing at;
  matrix<S> tokens, rows;
  std::vector<float> weight;

  movement(table_case const& how, std::int64_t columns, placing where, numbers kind = {},
           std::int64_t more_rows = 3)
      : c(how),
        s(how),
        M(columns),
        N(s.N() + more_rows),
        at(where),
        tokens(how.T, columns, where.gap, where.skew),
        rows(N, columns, where.gap, where.skew),
        weight(random_vector<float>(s.pairs(), 5)) {
    s.pair_of.resize(static_cast<std::size_t>(N), -1);
    s.table.pair_of = s.pair_of.data();
    s.table.max_rows = N;
    s.table.computed_only = !c.kinds;
    tokens.fill(2);
    rows.fill(3);
    for (matrix<S>* m : {&tokens, &rows})
      for (std::int64_t r = 0; r < (m == &rows ? N : c.T); ++r)
        for (std::int64_t col = 0; col < M; ++col) to_numbers(kind, (*m)(r, col));
    for (float& w : weight) to_numbers(kind, w);
  }
  movement(movement const&) = delete;

  matrix<S> new_rows() const { return {N, M, at.gap, at.skew}; }
  matrix<S> new_tokens() const { return {c.T, M, at.gap, at.skew}; }
};

/// Outputs of different forms, in the order of their making.
template <class S>
struct outputs {
  std::vector<matrix<S>> matrices;
  std::vector<std::vector<float>> vectors;
};

template <class S>
void check_equal(outputs<S> const& found, outputs<S> const& expected) {
  REQUIRE(found.matrices.size() == expected.matrices.size());
  for (std::size_t i = 0; i < found.matrices.size(); ++i) {
    CAPTURE(i);
    bool const same = found.matrices[i].same_bits(expected.matrices[i]);
    CHECK(same);
  }
  CHECK(found.vectors == expected.vectors);
}

/// Where the functions find their arguments: where the test has them.
struct in_place {
  template <class S>
  moe::matrix_view<S const> in(matrix<S> const& m) {
    return m;
  }
  moe::vector_view<float const> in(std::vector<float> const& v) { return v; }
  template <class S>
  moe::matrix_view<S> out(matrix<S>& m) {
    return m.view();
  }
  moe::vector_view<float> out(std::vector<float>& v) { return v; }
  moe::routing_table table(slow_table const& s) { return s.table; }
  /// Outputs come back.
  void fetch() {}
};

/// dispatch and dispatch_backward; drows are `rows`.
template <class S, class X, class Home = in_place>
outputs<S> all_dispatches(X const& exec, movement<S> const& m, Home home = {}) {
  outputs<S> all;
  auto const table = home.table(m.s);
  auto const tokens = home.in(m.tokens), given_rows = home.in(m.rows);
  auto const weight = home.in(m.weight);
  auto const keep = [&](matrix<S> start, auto const& f) {
    f(home.out(start));
    home.fetch();
    all.matrices.push_back(start);
  };
  keep(m.new_rows(), [&](auto rows) { moe::dispatch(exec, tokens, table, rows); });
  keep(m.new_rows(), [&](auto rows) { moe::dispatch(exec, tokens, table, weight, rows); });
  for (update const mode : {update::assign, update::add}) {
    keep(m.new_tokens(),
         [&](auto dtokens) { moe::dispatch_backward(exec, given_rows, table, dtokens, mode); });
    std::vector<float> dweight(m.weight.size(), 7);
    keep(m.new_tokens(), [&](auto dtokens) {
      moe::dispatch_backward(exec, given_rows, tokens, table, weight, dtokens, home.out(dweight),
                             mode);
    });
    all.vectors.push_back(dweight);
  }
  return all;
}

/// combine and combine_backward; dout are `tokens`.
template <class S, class X, class Home = in_place>
outputs<S> all_combines(X const& exec, movement<S> const& m, Home home = {}) {
  outputs<S> all;
  auto const table = home.table(m.s);
  auto const tokens = home.in(m.tokens), given_rows = home.in(m.rows);
  auto const weight = home.in(m.weight);
  auto const keep = [&](matrix<S> start, auto const& f) {
    f(home.out(start));
    home.fetch();
    all.matrices.push_back(start);
  };
  for (update const mode : {update::assign, update::add}) {
    keep(m.new_tokens(),
         [&](auto out) { moe::combine(exec, given_rows, table, weight, tokens, out, mode); });
    if (m.c.kinds) continue;
    keep(m.new_tokens(),
         [&](auto out) { moe::combine(exec, given_rows, table, weight, out, mode); });
    keep(m.new_tokens(), [&](auto out) { moe::combine(exec, given_rows, table, out, mode); });
  }
  for (bool const over_rows : {false, true}) {
    std::vector<float> dweight(m.weight.size(), 7);
    auto dtokens = m.new_tokens();
    keep(over_rows ? m.rows : m.new_rows(), [&](auto drows) {
      moe::combine_backward(exec, tokens, over_rows ? drows : given_rows, table, weight, tokens,
                            drows, home.out(dweight), home.out(dtokens));
    });
    all.matrices.push_back(dtokens);
    all.vectors.push_back(dweight);
  }
  if (!m.c.kinds) {
    std::vector<float> dweight(m.weight.size(), 7);
    keep(m.new_rows(), [&](auto drows) {
      moe::combine_backward(exec, tokens, given_rows, table, weight, drows, home.out(dweight));
    });
    all.vectors.push_back(dweight);
  }
  return all;
}

}  // namespace moe_test
