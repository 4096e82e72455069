// Tables, values and comparisons for the tests of dispatch and combine.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

#include "support/refusal.hpp"

namespace moe_test {

using moe::accumulate_t;
using moe::bf16;
using moe::cpu;
using moe::expert_kind;
using moe::half;
using moe::matrix_view;
using moe::update;

struct table_case {
  std::int64_t T = 0;
  int K = 1;
  int E = 1;
  int align = 1;          // each expert's rows end at a multiple
  double dropped = 0;     // share of pairs
  bool kinds = false;     // expert e is of kind e mod 5
  bool variable = false;  // tokens have 0 to K pairs
  unsigned seed = 1;
};

/// A table of these arrays and counts.
struct hand_made_table : moe::routing_table {
  hand_made_table(std::int64_t tokens, int choices, std::vector<std::int32_t> rows,
                  std::vector<std::int32_t> pairs, moe::table_counts const& sums)
      : rows_(std::move(rows)), pairs_(std::move(pairs)), sums_(sums) {
    T = tokens;
    K = choices;
    row_of = rows_.data();
    pair_of = pairs_.data();
    counts = &sums_;
  }
  hand_made_table(hand_made_table const&) = delete;

 private:
  std::vector<std::int32_t> rows_, pairs_;
  moe::table_counts sums_;
};

/// A table made in the slowest way.
struct slow_table {
  std::vector<std::int32_t> row_of, token_begin, pair_of, token_of;
  moe::table_counts counts;
  moe::routing_table table;

  explicit slow_table(table_case const& c) {
    std::mt19937 random(c.seed);
    auto const draw = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
    token_begin.push_back(0);
    std::vector<int> expert;
    for (std::int64_t t = 0; t < c.T; ++t) {
      int const pairs = c.variable ? draw(c.K + 1) : c.K;
      int const first = draw(c.E);
      for (int j = 0; j < pairs; ++j) {
        expert.push_back((first + j) % c.E);
        token_of.push_back(static_cast<std::int32_t>(t));
      }
      token_begin.push_back(static_cast<std::int32_t>(expert.size()));
    }
    row_of.assign(expert.size(), moe::dropped_row);
    for (int e = 0; e < c.E; ++e) {
      auto const kind = static_cast<expert_kind>(c.kinds ? e % 5 : 0);
      for (std::size_t i = 0; i < expert.size(); ++i) {
        if (expert[i] != e) continue;
        if (kind != expert_kind::computed) {
          row_of[i] = moe::no_row(kind);
          ++counts.uncomputed;
        } else if (std::uniform_real_distribution<>()(random) < c.dropped) {
          ++counts.dropped;
        } else {
          row_of[i] = static_cast<std::int32_t>(pair_of.size());
          pair_of.push_back(static_cast<std::int32_t>(i));
          ++counts.kept;
        }
      }
      while (pair_of.size() % static_cast<std::size_t>(c.align) != 0) pair_of.push_back(-1);
    }
    counts.rows = static_cast<std::int64_t>(pair_of.size());
    table.T = c.T;
    table.K = c.K;
    table.E = table.P = c.E;
    table.max_rows = counts.rows;
    table.row_of = row_of.data();
    table.pair_of = pair_of.data();
    table.token_begin = c.variable ? token_begin.data() : nullptr;
    table.counts = &counts;
  }
  slow_table(slow_table const&) = delete;

  std::int64_t N() const { return counts.rows; }
  std::int64_t pairs() const { return static_cast<std::int64_t>(row_of.size()); }
  bool has_row(std::size_t i) const { return row_of[i] >= 0; }
  bool is_copy(std::size_t i) const { return row_of[i] == moe::no_row(expert_kind::copy); }
  /// The pair of row r, or -1; and its token.
  std::int64_t pair(std::int64_t r) const { return pair_of[static_cast<std::size_t>(r)]; }
  std::int64_t token(std::int64_t r) const { return token_of[static_cast<std::size_t>(pair(r))]; }
};

template <class S>
double value(S x) {
  return static_cast<double>(x);
}
template <class S>
S make(double x) {
  return static_cast<S>(static_cast<accumulate_t<S>>(x));
}

inline constexpr double sentinel = 77;

/// [rows, cols] with a gap behind each row and `skew` elements before the first, so that rows start
/// at any address.
template <class S>
class matrix {
 public:
  matrix(std::int64_t rows, std::int64_t cols, std::int64_t gap = 0, std::int64_t skew = 0)
      : rows_(rows),
        cols_(cols),
        ld_(cols + gap),
        skew_(skew),
        data_(static_cast<std::size_t>(skew + rows * ld_ + 1), make<S>(sentinel)) {}

  moe::matrix_view<S> view() { return {data_.data() + skew_, rows_, cols_, ld_}; }
  operator moe::matrix_view<S const>() const { return {data_.data() + skew_, rows_, cols_, ld_}; }
  /// The same elements of a copy of storage().
  moe::matrix_view<S> view_at(S* copy) const { return {copy + skew_, rows_, cols_, ld_}; }
  std::vector<S>& storage() { return data_; }
  std::vector<S> const& storage() const { return data_; }
  S& operator()(std::int64_t r, std::int64_t c) { return data_[at(r, c)]; }
  S operator()(std::int64_t r, std::int64_t c) const { return data_[at(r, c)]; }

  matrix& fill(unsigned seed) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<> draw(-1, 1);
    for (std::int64_t r = 0; r < rows_; ++r)
      for (std::int64_t c = 0; c < cols_; ++c) (*this)(r, c) = make<S>(draw(random));
    return *this;
  }
  /// Whether everything outside the elements is as it was made.
  bool gaps_untouched() const {
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(data_.size()); ++i) {
      std::int64_t const p = i - skew_;
      bool const element = p >= 0 && p < rows_ * ld_ && p % ld_ < cols_;
      if (!element && !(data_[static_cast<std::size_t>(i)] == make<S>(sentinel))) return false;
    }
    return true;
  }
  bool same_bits(matrix const& other) const {
    return std::memcmp(data_.data(), other.data_.data(), data_.size() * sizeof(S)) == 0;
  }

 private:
  std::size_t at(std::int64_t r, std::int64_t c) const {
    return static_cast<std::size_t>(skew_ + r * ld_ + c);
  }

  std::int64_t rows_, cols_, ld_, skew_;
  std::vector<S> data_;
};

template <class V>
std::vector<V> random_vector(std::int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<> draw(-1, 1);
  std::vector<V> values(static_cast<std::size_t>(size));
  for (V& v : values) v = static_cast<V>(draw(random));
  return values;
}

/// Half a unit in the last place of S, and for float and double some units for the sums.
template <class S>
constexpr double tolerance = std::is_same_v<S, double>      ? 1e-13
                             : std::is_same_v<S, float>     ? 1e-5
                             : std::is_same_v<S, moe::half> ? 6e-4
                                                            : 5e-3;

template <class S>
bool near(double got, double expected) {
  return std::abs(got - expected) <= tolerance<S> * (1 + std::abs(expected));
}

/// The derivative of loss() by x.
template <class F>
double central_difference(double& x, F const& loss) {
  double const kept = x, h = 1e-5;
  x = kept + h;
  double const above = loss();
  x = kept - h;
  double const below = loss();
  x = kept;
  return (above - below) / (2 * h);
}

/// Odd sizes, one below and above a line and a block, and no columns at all.
inline constexpr std::int64_t widths[] = {0, 1, 3, 15, 16, 17, 33, 64, 255, 257, 700};

inline constexpr table_case computed_cases[] = {
    {.T = 0, .K = 2, .E = 4},
    {.T = 1, .K = 1, .E = 1},
    {.T = 37, .K = 2, .E = 5, .align = 4},
    {.T = 37, .K = 5, .E = 5, .dropped = 0.4},
    {.T = 23, .K = 29, .E = 31, .align = 3, .dropped = 0.1, .variable = true},
    {.T = 7, .K = 8, .E = 9},
    {.T = 9, .K = 2, .E = 3, .dropped = 1},
};
inline constexpr table_case kind_cases[] = {
    {.T = 37, .K = 6, .E = 11, .align = 8, .dropped = 0.2, .kinds = true},
    {.T = 31, .K = 5, .E = 5, .kinds = true},
    {.T = 23, .K = 29, .E = 31, .dropped = 0.5, .kinds = true, .variable = true},
};

/// Calls f(case, M) for all of them.
template <class F>
void for_cases(F const& f) {
  auto const run = [&f](table_case const& c, std::int64_t M) {
    CAPTURE(c.T);
    CAPTURE(c.K);
    CAPTURE(M);
    f(c, M);
  };
  for (std::int64_t const M : widths) {
    for (table_case const& c : computed_cases) run(c, M);
    for (table_case const& c : kind_cases) run(c, M);
  }
}

}  // namespace moe_test
