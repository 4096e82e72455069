// Tokens and results of 16 bits beside products and sums of float: widened on their way in, rounded once.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/checks.hpp>
#include <moe/expert/detail/ffn_passes.hpp>
#include <moe/expert/segments.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI::detail::packed {

/// out[r] = rows[r], rounded, for each row of the segments.
template <class S>
void round_rows(cpu const& exec, row_segments const& segments, matrix_view<float const> rows,
                matrix_view<S> out) {
  each_row(exec, segments, [&](int, std::int64_t r) {
    for (std::int64_t c = 0; c < out.cols(); ++c) out(r, c) = static_cast<S>(rows(r, c));
  });
}

/// `combine` of rows of float, whose sums are rounded to S.
/// @param weight  One value for each pair; empty = all 1.
template <class S>
void combine_rounded(cpu const& exec, matrix_view<float const> rows, routing_table const& table,
                     vector_view<float const> weight, matrix_view<S const> tokens,
                     matrix_view<S> out, call_site site) {
  movement_checks expected(exec, "packed_ffn", table, tokens.cols(), site);
  expected.rows(rows, "rows");
  if (!weight.empty()) expected.pairs(weight, "weight");
  expected.tokens(tokens, "tokens");
  expected.tokens(out, "out");
  constexpr std::int64_t width = 64;
  // n is a constant but for the last columns: else compilers make no vector code of it at -O2.
  auto const columns = [&](std::int64_t t, std::int64_t c, auto n) {
    float sum[width] = {};
    auto const add = [&](float w, auto const* from) {
      for (std::int64_t j = 0; j < n; ++j) sum[j] += w * static_cast<float>(from[j]);
    };
    for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
      std::int32_t const r = table.row_of[i];
      float const w = weight.empty() ? 1.0f : weight[i];
      if (r >= 0)
        add(w, rows.row(r) + c);
      else if (r == no_row(expert_kind::copy))
        add(w, tokens.row(t) + c);
    }
    S* const to = out.row(t) + c;
    for (std::int64_t j = 0; j < n; ++j) to[j] = static_cast<S>(sum[j]);
  };
  exec.split(table.T, 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      std::int64_t c = 0;
      for (; c + width <= out.cols(); c += width)
        columns(t, c, std::integral_constant<std::int64_t, width>{});
      if (c < out.cols()) columns(t, c, out.cols() - c);
    }
  });
}

}  // namespace moe::inline MOE_ABI::detail::packed
