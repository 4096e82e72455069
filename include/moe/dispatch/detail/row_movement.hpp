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
void for_ranges(cpu const& exec, std::int64_t n, std::int64_t bytes_each, bool past_cache,
                F const& f) {
  std::int64_t const size =
      std::max<std::int64_t>(1, bytes_per_turn(past_cache) / std::max<std::int64_t>(1, bytes_each));
  exec.each((n + size - 1) / size, [&](std::int64_t i, int) {
    f(i * size, std::min(n, (i + 1) * size));
    if (past_cache) store_fence();
  });
}

template <class S>
std::int64_t row_bytes(matrix_view<S> view) noexcept {
  return view.cols() * static_cast<std::int64_t>(sizeof(S));
}

/// Row r, or null if there is none.
template <class S>
S const* row_or_null(matrix_view<S const> rows, std::int64_t r) noexcept {
  return r < 0 ? nullptr : rows.row(r);
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
  for_ranges(exec, N, row_bytes(rows), false, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r)
      if (table.pair_of[r] < 0) std::fill_n(rows.row(r), rows.cols(), S{});
  });
}

/// rows[r] = tokens[t], times the pair's weight if there are weights, for each pair of a token t
/// that has a row r; padding is zeroed.
///
/// By tokens, not by rows: a token is read once, from memory to its last copy, and a table whose
/// tokens have different numbers of pairs needs no search. In blocks of columns, so that the memory
/// reads and writes all the time: K = 2 and 8 1.2 to 1.3 times as fast as row after row (Zen 3,
/// T = 4096, M = 1024, 1 thread, 2026-11).
template <class S>
void spread_tokens(cpu const& exec, matrix_view<S const> tokens, routing_table const& table,
                   accumulate_t<S> const* weight, matrix_view<S> rows) {
  std::int64_t const M = tokens.cols();
  if (M == 0) return;  // there may be no memory to copy from
  constexpr std::int64_t block = 1024 / static_cast<std::int64_t>(sizeof(S));
  bool const past_cache = is_past_cache(rows, table.counts->rows);
  auto const range = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t c = 0; c < M; c += block)
        for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
          std::int64_t const r = table.row_of[i];
          if (r < 0) continue;
          // Blocks end at the ends of lines.
          std::int64_t const head =
              bytes_to_line(rows.row(r)) / static_cast<std::int64_t>(sizeof(S));
          std::int64_t const begin = c == 0 ? 0 : std::min(M, c + head);
          std::int64_t const size = std::min(M, c + head + block) - begin;
          if (weight != nullptr)
            scale_row(rows.row(r) + begin, tokens.row(t) + begin, weight[i], size, past_cache);
          else
            copy_row(rows.row(r) + begin, tokens.row(t) + begin, size, past_cache);
        }
  };
  for_ranges(exec, table.T, row_bytes(tokens) * (1 + table.K), past_cache, range);
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
    addends<S> terms;
    if (table.first_pair(t + 1) - table.first_pair(t) > addends<S>::most) return one_by_one(t);
    each(t, [&](S const* row, A w) { terms.push(row, w); });
    addends_view<S> const all{terms.count, terms.row, terms.weight};
    if (add) return write<true>(t, all);
    if (terms.count == 2) return write<false>(t, few_addends<S, 2>(terms));
    if (terms.count == 8) return write<false>(t, few_addends<S, 8>(terms));
    write<false>(t, all);
  }

 private:
  /// Calls f(row, weight) for each addend of token t.
  template <class F>
  void each(std::int64_t t, F const& f) const {
    for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
      std::int32_t const r = table.row_of[i];
      A const w = weight != nullptr ? weight[i] : A(1);
      if (r >= 0)
        f(rows.row(r), w);
      else if (!tokens.absent() && r == no_row(expert_kind::copy))
        f(tokens.row(t), w);
    }
  }

  /// For a token with any number of addends.
  void one_by_one(std::int64_t t) const {
    for (std::int64_t c = 0; c < out.cols(); ++c) {
      A sum = add ? static_cast<A>(out(t, c)) : A(0);
      each(t, [&](S const* row, A w) { sum += w * static_cast<A>(row[c]); });
      out(t, c) = static_cast<S>(sum);
    }
  }

  template <bool Add, class Terms>
  void write(std::int64_t t, Terms const& terms) const {
    past_cache ? sum_row<true, Add>(out.row(t), terms, out.cols())
               : sum_row<false, Add>(out.row(t), terms, out.cols());
  }
};

template <class S>
void sum_rows(cpu const& exec, row_sum<S> const& sum) {
  std::int64_t const bytes_each = row_bytes(sum.out) * (1 + sum.table.K);
  for_ranges(exec, sum.table.T, bytes_each, sum.past_cache,
             [&](std::int64_t first, std::int64_t last) {
               for (std::int64_t t = first; t < last; ++t) sum(t);
             });
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
