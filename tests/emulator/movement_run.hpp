// All forms of dispatch and combine on one problem, by any executor: what the emulated kernels are compared by.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/dispatch/combine.cuh>
#include <moe/dispatch/dispatch.cuh>

#include "dispatch/movement.hpp"
#include "emulator/emulated_gpu.hpp"

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

/// dispatch and dispatch_backward; drows are `rows`.
template <class S, class X>
outputs<S> all_dispatches(X const& exec, movement<S> const& m) {
  outputs<S> all;
  auto const& table = m.s.table;
  auto const keep = [&](auto const& x) { all.matrices.push_back(x); };
  auto rows = m.new_rows();
  moe::dispatch(exec, m.tokens, table, rows.view());
  keep(rows);
  rows = m.new_rows();
  moe::dispatch(exec, m.tokens, table, m.weight, rows.view());
  keep(rows);
  for (update const mode : {update::assign, update::add}) {
    auto dtokens = m.new_tokens();
    moe::dispatch_backward(exec, m.rows, table, dtokens.view(), mode);
    keep(dtokens);
    dtokens = m.new_tokens();
    std::vector<float> dweight(m.weight.size(), 7);
    moe::dispatch_backward(exec, m.rows, m.tokens, table, m.weight, dtokens.view(), dweight, mode);
    keep(dtokens);
    all.vectors.push_back(dweight);
  }
  return all;
}

/// combine and combine_backward; dout are `tokens`.
template <class S, class X>
outputs<S> all_combines(X const& exec, movement<S> const& m) {
  outputs<S> all;
  auto const& table = m.s.table;
  auto const keep = [&](auto const& x) { all.matrices.push_back(x); };
  for (update const mode : {update::assign, update::add}) {
    auto out = m.new_tokens();
    moe::combine(exec, m.rows, table, m.weight, m.tokens, out.view(), mode);
    keep(out);
    if (m.c.kinds) continue;
    out = m.new_tokens();
    moe::combine(exec, m.rows, table, m.weight, out.view(), mode);
    keep(out);
    out = m.new_tokens();
    moe::combine(exec, m.rows, table, out.view(), mode);
    keep(out);
  }
  auto const with_tokens = [&](matrix<S> const& rows, matrix<S>& drows) {
    auto dtokens = m.new_tokens();
    std::vector<float> dweight(m.weight.size(), 7);
    moe::combine_backward(exec, m.tokens, rows, table, m.weight, m.tokens, drows.view(), dweight,
                          dtokens.view());
    keep(drows);
    keep(dtokens);
    all.vectors.push_back(dweight);
  };
  auto drows = m.new_rows();
  with_tokens(m.rows, drows);
  auto in_place = m.rows;
  with_tokens(in_place, in_place);
  if (!m.c.kinds) {
    drows = m.new_rows();
    std::vector<float> dweight(m.weight.size(), 7);
    moe::combine_backward(exec, m.tokens, m.rows, table, m.weight, drows.view(), dweight);
    keep(drows);
    all.vectors.push_back(dweight);
  }
  return all;
}

/// Tables with and without padding, drops, empty experts, tokens of different numbers of pairs.
inline constexpr table_case emulated_cases[] = {
    {.T = 0, .K = 2, .E = 4},
    {.T = 1, .K = 1, .E = 1},
    {.T = 5, .K = 2, .E = 5, .align = 4},
    {.T = 4, .K = 8, .E = 9, .dropped = 0.4},
    {.T = 3, .K = 16, .E = 17, .align = 3, .dropped = 0.1},
    {.T = 6, .K = 11, .E = 12, .align = 3, .dropped = 0.1, .variable = true},
    {.T = 3, .K = 2, .E = 3, .dropped = 1},
};
inline constexpr table_case emulated_kinds[] = {
    {.T = 4, .K = 6, .E = 11, .align = 8, .dropped = 0.2, .kinds = true},
    {.T = 5, .K = 9, .E = 10, .dropped = 0.5, .kinds = true, .variable = true},
};

/// Columns, and where they are: rows that move in vectors, and such that do not.
struct emulated_shape {
  std::int64_t M;
  placing at;
};
inline constexpr emulated_shape emulated_shapes[] = {
    {8, {}},      {1, {}},       {3, {1, 0}}, {7, {1, 1}},    {33, {}},
    {64, {0, 1}}, {40, {16, 8}}, {8, {1, 0}}, {264, {8, 16}}, {0, {}},
};

/// Calls f(case, shape) for some of all pairs: each case and each shape with several others.
template <class F>
void for_emulated_cases(F const& f) {
  int n = 0;
  auto const run = [&](table_case const& c, emulated_shape const& shape) {
    if ((has_thread_sanitizer || has_address_sanitizer) && n++ % 3 != 0) return;
    CAPTURE(c.T);
    CAPTURE(c.K);
    CAPTURE(shape.M);
    CAPTURE(shape.at.skew);
    f(c, shape);
  };
  for (table_case const& c : emulated_cases)
    for (emulated_shape const& shape : emulated_shapes) run(c, shape);
  for (table_case const& c : emulated_kinds)
    for (emulated_shape const& shape : emulated_shapes) run(c, shape);
}

}  // namespace moe_test
