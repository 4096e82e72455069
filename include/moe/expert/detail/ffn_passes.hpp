// Elementwise passes over the rows of experts: activation, its gradient, sums of rows.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/segments.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI::detail {

/// Distance of the rows of an intermediate result of n columns: lines, and no multiple of a page, so that
/// rows that are read together do not compete for one place of the cache.
constexpr std::int64_t spread(std::int64_t n) noexcept {
  return (n + 15) / 16 * 16 + 16;
}

template <class V>
matrix_view<V> take_rows(memory& from, std::int64_t rows, std::int64_t cols, char const* rule,
                         call_site site) {
  return {from.take<V>(rows * spread(cols), rule, site), rows, cols, spread(cols)};
}

/// The arguments of the activation, [N,H] each; gate only if it is gated.
template <class V>
struct hidden_rows {
  matrix_view<V> up, gate;

  V const* gate_row(std::int64_t r) const noexcept { return gate.absent() ? nullptr : gate.row(r); }
};

/// Calls f(token, pair) for each pair; the pairs of one token in turn.
template <class F>
void each_pair(cpu const& exec, routing_table const& table, F const& f) {
  exec.split(table.T, 64, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) f(t, i);
  });
}

/// Calls f(expert, row) for each row of the segments. Rows are cut where they lie, so that one expert
/// with all rows keeps no thread waiting.
template <class F>
void each_row(cpu const& exec, row_segments const& segments, F const& f) {
  int const count = segments.experts * segments.sources;
  std::int64_t rows = 0;
  for (int q = 0; q < count; ++q) rows += segments.used[q];
  exec.split(rows, 8, [&](std::int64_t first, std::int64_t last, int) {
    std::int64_t before = 0;
    for (int q = 0; q < count && before < last; before += segments.used[q++]) {
      std::int64_t const r0 = std::max<std::int64_t>(first - before, 0);
      std::int64_t const r1 = std::min<std::int64_t>(last - before, segments.used[q]);
      for (std::int64_t r = r0; r < r1; ++r) f(q / segments.sources, segments.begin[q] + r);
    }
  });
}

/// h = act(gate, up), n elements. (clang believes `__restrict` of parameters alone.)
template <class V, class Activation>
void activate_row(Activation const& act, std::int64_t n, V const* __restrict gate,
                  V const* __restrict up, V* __restrict h) {
  for (std::int64_t j = 0; j < n; ++j)
    if constexpr (Activation::gated)
      h[j] = act(gate[j], up[j]);
    else
      h[j] = act(up[j]);
}

/// du, dgate = w du times the derivatives; h *= w.
template <class V, class Activation>
void activate_row_backward(Activation const& act, std::int64_t n, V w, V const* __restrict gate,
                           V const* __restrict up, V* __restrict du, V* __restrict dgate,
                           V* __restrict h) {
  for (std::int64_t j = 0; j < n; ++j) {
    V const dh = w * du[j];
    if constexpr (Activation::gated) {
      auto const d = act.derivative(gate[j], up[j]);
      dgate[j] = dh * d.gate;
      du[j] = dh * d.up;
    } else {
      du[j] = dh * act.derivative(up[j]);
    }
    h[j] *= w;
  }
}

/// h[r] = act(gate[r], up[r]).
template <class V, class Activation>
void activate(cpu const& exec, Activation const& act, row_segments const& segments,
              hidden_rows<V> const& hidden, matrix_view<V> h) {
  each_row(exec, segments, [&](int, std::int64_t r) {
    activate_row<V>(act, h.cols(), hidden.gate_row(r), hidden.up.row(r), h.row(r));
  });
}

/// Sums products in sixteen interleaved parts: vector code, and an order that n alone fixes.
template <class V>
class product_sum {
 public:
  void add(V const* a, V const* b, std::int64_t n) noexcept {
    std::int64_t j = 0;
    for (; j + parts <= n; j += parts)
      for (int l = 0; l < parts; ++l) part_[l] += a[j + l] * b[j + l];
    for (int l = 0; l < parts && j + l < n; ++l) part_[l] += a[j + l] * b[j + l];
  }
  V value() noexcept {
    for (int width = parts / 2; width > 0; width /= 2)
      for (int l = 0; l < width; ++l) part_[l] += part_[l + width];
    return part_[0];
  }

 private:
  static constexpr int parts = 16;
  V part_[parts] = {};
};

/// From dhidden = d/d(activated), before the router weight w[r] (null: 1), for each row r:
/// drow_weight[r] = dot(dhidden, activated) + dot(dout, down_bias) = dot(dout, out), if asked for;
/// weighted[r] = w activated; dhidden[r], dgate[r] = w dhidden times the derivatives.
template <class V, class Activation>
void activate_backward(cpu const& exec, Activation const& act, row_segments const& segments,
                       hidden_rows<V> const& hidden, matrix_view<V const> dout,
                       matrix_view<V const> down_bias, V const* row_weight, matrix_view<V> dhidden,
                       matrix_view<V> dgate, matrix_view<V> weighted, V* drow_weight) {
  std::int64_t const H = dhidden.cols();
  each_row(exec, segments, [&](int p, std::int64_t r) {
    V const *const gate = hidden.gate_row(r), *const up = hidden.up.row(r);
    V *const h = weighted.row(r), *const dh = dhidden.row(r);
    activate_row<V>(act, H, gate, up, h);
    if (drow_weight != nullptr) {
      product_sum<V> product;
      product.add(dh, h, H);
      if (!down_bias.absent()) product.add(dout.row(r), down_bias.row(p), dout.cols());
      drow_weight[r] = product.value();
    }
    V const w = row_weight == nullptr ? V(1) : row_weight[r];
    activate_row_backward<V>(act, H, w, gate, up, dh, dgate.absent() ? nullptr : dgate.row(r), h);
  });
}

/// row_weight[row of i] = weight[i].
template <class V>
void spread_weights(cpu const& exec, routing_table const& table, vector_view<V const> weight,
                    vector_view<V> row_weight) {
  each_pair(exec, table, [&](std::int64_t, std::int64_t i) {
    if (table.row_of[i] >= 0) row_weight[table.row_of[i]] = weight[i];
  });
}

/// dweight[i] = drow_weight[row of i]. For a pair at a copy expert it is dot(token, dout), and
/// weight dout is added to dtokens; others add nothing.
template <class V>
void collect_gradients(cpu const& exec, routing_table const& table, matrix_view<V const> tokens,
                       matrix_view<V const> dout, vector_view<V const> weight,
                       vector_view<V const> drow_weight, matrix_view<V> dtokens,
                       vector_view<V> dweight) {
  each_pair(exec, table, [&](std::int64_t t, std::int64_t i) {
    std::int32_t const r = table.row_of[i];
    dweight[i] = r >= 0 ? drow_weight[r] : V(0);
    if (r != no_row(expert_kind::copy)) return;
    product_sum<V> product;
    product.add(tokens.row(t), dout.row(t), dout.cols());
    dweight[i] = product.value();
    for (std::int64_t j = 0; j < dout.cols(); ++j) dtokens(t, j) += weight[i] * dout(t, j);
  });
}

/// sums[p] (+)= the sum over rows r of expert p of scale[r] x[r]; scale null = all 1.
template <class V>
void sum_rows_of_experts(cpu const& exec, row_segments const& segments, matrix_view<V const> x,
                         V const* scale, update how, matrix_view<V> sums) {
  constexpr std::int64_t width = 256;
  std::int64_t const panels = (sums.cols() + width - 1) / width;
  exec.each(segments.experts * panels, [&](std::int64_t task, int) {
    int const p = static_cast<int>(task / panels);
    std::int64_t const j = task % panels * width, n = std::min(width, sums.cols() - j);
    V total[width] = {};
    for (int q = p * segments.sources; q < (p + 1) * segments.sources; ++q)
      for (std::int64_t r = segments.begin[q]; r < segments.begin[q] + segments.used[q]; ++r) {
        V const* const row = x.row(r) + j;
        V const s = scale == nullptr ? V(1) : scale[r];
        for (std::int64_t i = 0; i < n; ++i) total[i] += s * row[i];
      }
    V* const to = sums.row(p) + j;
    for (std::int64_t i = 0; i < n; ++i) to[i] = how == update::add ? to[i] + total[i] : total[i];
  });
}

}  // namespace moe::inline MOE_ABI::detail
