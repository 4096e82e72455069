// The two movements behind dispatch, combine and their backwards: tokens to rows, rows to tokens.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/row_arithmetic.hpp>
#include <moe/dispatch/detail/streaming.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Calls f(first, last) for ranges that cover [0, n), each on one member of the team.
template <class F>
void for_ranges(cpu const& exec, std::int64_t n, std::int64_t bytes_each, F const& f) {
  std::int64_t const size =
      std::max<std::int64_t>(1, bytes_per_turn / std::max<std::int64_t>(1, bytes_each));
  exec.each((n + size - 1) / size, [&](std::int64_t i, int) {
    f(i * size, std::min(n, (i + 1) * size));
    store_fence();
  });
}

template <class S>
std::int64_t row_bytes(matrix_view<S> view) noexcept {
  return view.cols() * static_cast<std::int64_t>(sizeof(S));
}

/// Whether to store `rows` rows of the view past the cache.
template <class S>
bool is_past_cache(matrix_view<S> out, std::int64_t rows) noexcept {
  return rows * row_bytes(out) >= past_cache_bytes;
}

/// Zeroes the padding among the rows that the table uses.
template <class S>
void clear_padding(cpu const& exec, routing_table const& table, matrix_view<S> rows) {
  std::int64_t const N = table.counts->rows;
  if (N == table.counts->kept) return;
  for_ranges(exec, N, row_bytes(rows), [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r)
      if (table.pair_of[r] < 0) std::fill_n(rows.row(r), rows.cols(), S{});
  });
}

/// rows[r] = tokens[t], times the pair's weight if there are weights, for each pair of a token t
/// that has a row r; padding is zeroed.
///
/// By tokens, not by rows: a token is read once, from memory to its last copy, and a table whose
/// tokens have different numbers of pairs needs no search.
template <class S>
void spread_tokens(cpu const& exec, matrix_view<S const> tokens, routing_table const& table,
                   accumulate_t<S> const* weight, matrix_view<S> rows) {
  std::int64_t const M = tokens.cols();
  if (M == 0) return;  // there may be no memory to copy from
  std::int64_t const bytes = row_bytes(tokens);
  bool const past_cache = is_past_cache(rows, table.counts->rows);
  auto const put = [=](S* row, S const* token, std::int64_t i, S const* ahead) {
    if (weight != nullptr) {
      scale_row(row, token, weight[i], M, past_cache);
    } else if (past_cache) {
      copy_past_cache(row, token, bytes, ahead);
    } else {
      std::memcpy(row, token, static_cast<std::size_t>(bytes));
    }
  };
  auto const range = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) {
      // The second and later copies read the cache, so the first one has the next token loaded.
      S const* ahead = t + 1 < last ? tokens.row(t + 1) : nullptr;
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
        std::int64_t const r = table.row_of[i];
        if (r < 0) continue;
        put(rows.row(r), tokens.row(t), i, ahead);
        ahead = nullptr;
      }
    }
  };
  for_ranges(exec, table.T, bytes * (1 + table.K), range);
  clear_padding(exec, table, rows);
}

/// out[t] (=|+=) the sum of weight[i] * rows[row_of[i]] over the pairs i of token t, in order, and
/// of weight[i] * tokens[t] for pairs at copy experts if there are tokens. Rounded once.
template <class S>
struct row_sum {
  using A = accumulate_t<S>;

  matrix_view<S const> rows;
  routing_table const& table;
  A const* weight;              ///< Null = 1.
  matrix_view<S const> tokens;  ///< Absent = none.
  matrix_view<S> out;
  bool add;
  bool past_cache = is_past_cache(out, table.T);

  /// For token t.
  void operator()(std::int64_t t) const {
    if (table.first_pair(t + 1) - table.first_pair(t) <= addends<S>::most)
      write(t, collect(t));
    else
      write(t, pairs_of{*this, t});
  }

 private:
  /// The addends of token t without a bound on their number.
  struct pairs_of {
    row_sum const& sum;
    std::int64_t t;

    template <class First, class Rest>
    void each(First const& begin, Rest const& go_on) const {
      bool begun = false;
      for (std::int64_t i = sum.table.first_pair(t); i < sum.table.first_pair(t + 1); ++i) {
        S const* const row = sum.addend(t, i);
        if (row == nullptr) continue;
        A const w = sum.weight != nullptr ? sum.weight[i] : A(1);
        if (begun)
          go_on(row, w);
        else
          begin(row, w);
        begun = true;
      }
    }
  };

  /// The row of pair i of token t; null if it adds nothing.
  S const* addend(std::int64_t t, std::int64_t i) const {
    std::int32_t const r = table.row_of[i];
    if (r >= 0) return rows.row(r);
    return !tokens.absent() && r == no_row(expert_kind::copy) ? tokens.row(t) : nullptr;
  }

  /// The addends of token t, which has few enough.
  addends<S> collect(std::int64_t t) const {
    addends<S> found;
    auto const push = [&](S const* row, A w) { found.push(row, w); };
    pairs_of{*this, t}.each(push, push);
    return found;
  }

  template <class Addends>
  void write(std::int64_t t, Addends const& terms) const {
    add ? write<true>(t, terms) : write<false>(t, terms);
  }
  template <bool Add, class Addends>
  void write(std::int64_t t, Addends const& terms) const {
    if constexpr (!rounds<S>)
      if (past_cache) return sum_row<true, Add>(out.row(t), terms, out.cols());
    sum_row<false, Add>(out.row(t), terms, out.cols());
  }
};

template <class S>
void sum_rows(cpu const& exec, row_sum<S> const& sum) {
  std::int64_t const bytes_each = row_bytes(sum.out) * (1 + sum.table.K);
  for_ranges(exec, sum.table.T, bytes_each, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t) sum(t);
  });
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
