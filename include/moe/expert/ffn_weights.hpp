// The parameters of feed-forward experts, and their gradients, as views on the caller's memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// Extents of P feed-forward experts.
struct ffn_shape {
  std::int64_t P = 0;  ///< Physical experts held here.
  std::int64_t M = 0;  ///< Model width.
  std::int64_t H = 0;  ///< Hidden width of one expert.

  friend constexpr bool operator==(ffn_shape const&, ffn_shape const&) = default;
};

/// y = act(x gate + gate_bias, x up + up_bias) down + down_bias; without gate act(x up + up_bias).
/// The same struct holds gradients. Row-major with leading dimensions; nothing is owned.
template <class V>
struct ffn_weights {
  stacked_view<V> up;        ///< [P,M,H]
  stacked_view<V> gate;      ///< [P,M,H]; absent unless the activation is gated
  stacked_view<V> down;      ///< [P,H,M]
  matrix_view<V> up_bias;    ///< [P,H] or absent
  matrix_view<V> gate_bias;  ///< [P,H] or absent
  matrix_view<V> down_bias;  ///< [P,M] or absent

  constexpr ffn_shape shape() const noexcept { return {up.count(), up.rows(), up.cols()}; }

  template <class U>
    requires std::is_same_v<U, V const> && (!std::is_const_v<V>)
  constexpr operator ffn_weights<U>() const noexcept {
    return {up, gate, down, up_bias, gate_bias, down_bias};
  }

  /// Expert p alone, as a set of one.
  constexpr ffn_weights expert(std::int64_t p) const noexcept {
    auto const matrix = [&](stacked_view<V> const& all) {
      return all.absent() ? all
                          : stacked_view<V>(all[p].data(), 1, all.rows(), all.cols(), all.ld(),
                                            all.stride());
    };
    auto const bias = [&](matrix_view<V> const& all) {
      return all.absent() ? all : matrix_view<V>(all.row(p), 1, all.cols(), all.ld());
    };
    return {matrix(up),    matrix(gate),    matrix(down),
            bias(up_bias), bias(gate_bias), bias(down_bias)};
  }
};

/// Elements that P experts need, and views of them carved from one array: up, gate, down, then the biases.
/// @param gated, bias  Which parts there are.
constexpr std::int64_t ffn_elements(ffn_shape const& shape, bool gated, bool bias) noexcept {
  std::int64_t const inputs = gated ? 2 : 1;
  return shape.P * ((inputs + 1) * shape.M * shape.H + (bias ? inputs * shape.H + shape.M : 0));
}
template <class V>
constexpr ffn_weights<V> carve_ffn(V* data, ffn_shape const& shape, bool gated,
                                   bool bias) noexcept {
  auto const [P, M, H] = shape;
  auto const next = [&](std::int64_t count) {
    V* const part = data;
    data += count;
    return part;
  };
  ffn_weights<V> w;
  w.up = {next(P * M * H), P, M, H};
  if (gated) w.gate = {next(P * M * H), P, M, H};
  w.down = {next(P * H * M), P, H, M};
  if (bias) {
    w.up_bias = {next(P * H), P, H};
    if (gated) w.gate_bias = {next(P * H), P, H};
    w.down_bias = {next(P * M), P, M};
  }
  return w;
}

namespace detail {

template <class V>
void expect_weights(ffn_weights<V> const& w, bool gated, call_site site) {
  std::int64_t const P = w.shape().P, M = w.shape().M, H = w.shape().H;
  auto const matrix = [&](stacked_view<V> const& m, std::int64_t rows, std::int64_t cols,
                          char const* rule) {
    expects(m.count() == P && m.rows() == rows && m.cols() == cols && m.ld() >= cols, rule, site,
            {{"count", m.count()},
             {"rows", m.rows()},
             {"cols", m.cols()},
             {"ld", m.ld()},
             {"P", P},
             {"M", M},
             {"H", H}});
  };
  auto const bias = [&](matrix_view<V> const& b, std::int64_t cols, char const* rule) {
    expects(b.absent() || (b.rows() == P && b.cols() == cols && b.ld() >= cols), rule, site,
            {{"rows", b.rows()}, {"cols", b.cols()}, {"P", P}, {"M", M}, {"H", H}});
  };
  matrix(w.up, M, H, "ffn: up is [P,M,H]");
  matrix(w.down, H, M, "ffn: down is [P,H,M]");
  if (gated)
    matrix(w.gate, M, H, "ffn: gate is [P,M,H] for a gated activation");
  else
    expects(w.gate.absent() && w.gate_bias.absent(), "ffn: no gate unless the activation is gated",
            site);
  bias(w.up_bias, H, "ffn: up_bias is [P,H] or absent");
  bias(w.gate_bias, H, "ffn: gate_bias is [P,H] or absent");
  bias(w.down_bias, M, "ffn: down_bias is [P,M] or absent");
}

template <class V>
void expect_same_parts(ffn_weights<V const> const& w, ffn_weights<V> const& g, call_site site) {
  expect_weights<V const>(w, !w.gate.absent(), site);
  expect_weights<V>(g, !w.gate.absent(), site);
  expects(w.shape() == g.shape() && w.up_bias.absent() == g.up_bias.absent() &&
              w.gate_bias.absent() == g.gate_bias.absent() &&
              w.down_bias.absent() == g.down_bias.absent(),
          "ffn: gradients have the parts and shape of the weights", site,
          {{"weights.P", w.shape().P},
           {"weights.M", w.shape().M},
           {"weights.H", w.shape().H},
           {"gradients.P", g.shape().P},
           {"gradients.M", g.shape().M},
           {"gradients.H", g.shape().H}});
}

/// Calls f(name, value, gradient) for all elements at once if they lie one after another, else row
/// by row.
template <class V, class F>
void visit_part(char const* name, stacked_view<V> v, stacked_view<V> g, F&& f) {
  if (v.absent()) return;
  if (v.contiguous() && g.contiguous()) {
    std::int64_t const size = v.count() * v.rows() * v.cols();
    return void(f(name, vector_view<V>(v.data(), size), vector_view<V>(g.data(), size)));
  }
  for (std::int64_t e = 0; e < v.count(); ++e)
    for (std::int64_t r = 0; r < v.rows(); ++r)
      f(name, vector_view<V>(v[e].row(r), v.cols()), vector_view<V>(g[e].row(r), v.cols()));
}

}  // namespace detail

/// Calls f(name, value, gradient) for every parameter, as vector_views of contiguous elements: a part
/// in one call where its elements lie one after another, else row by row.
///
/// @throws precondition_error unless both have the same parts and shape.
/// Example: for_each_parameter(w, g, [&](char const*, auto value, auto gradient) {
///            for (std::int64_t i = 0; i < value.size(); ++i) value[i] -= rate * gradient[i]; });
template <class V, class F>
void for_each_parameter(ffn_weights<V> const& values, ffn_weights<V> const& gradients, F&& f,
                        call_site site = call_site::here()) {
  detail::expect_same_parts<V>(values, gradients, site);
  auto const part = [&](char const* name, auto const& value, auto const& gradient) {
    detail::visit_part(name, stacked_view<V>(value), stacked_view<V>(gradient), f);
  };
  part("up", values.up, gradients.up);
  part("gate", values.gate, gradients.gate);
  part("down", values.down, gradients.down);
  part("up_bias", values.up_bias, gradients.up_bias);
  part("gate_bias", values.gate_bias, gradients.gate_bias);
  part("down_bias", values.down_bias, gradients.down_bias);
}

}  // namespace moe::inline MOE_ABI
