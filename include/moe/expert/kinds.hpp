// Experts without rows: constant ones, and shared ones that see every token. (`combine` adds copies.)
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/detail/ffn_passes.hpp>
#include <moe/expert/segments.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// n constant experts, logical ids [first, first + n): y = a x + b v with (a, b) = softmax(select x).
/// The same struct holds gradients. Source: Jin et al., "MoE++", 2024.
template <class V>
struct constant_experts {
  std::int32_t first = 0;
  stacked_view<V> select;  ///< [n,2,M]
  matrix_view<V> value;    ///< [n,M]: v

  std::int64_t count() const noexcept { return value.rows(); }

  template <class U>
    requires std::is_same_v<U, V const> && (!std::is_const_v<V>)
  constexpr operator constant_experts<U>() const noexcept {
    return {first, select, value};
  }
};

namespace detail {

/// What a constant expert makes of one token.
template <class V>
struct constant_mix {
  V of_token, of_value;

  constant_mix(matrix_view<std::type_identity_t<V> const> select, V const* x) noexcept {
    V const difference =
        dot_of(select.row(1), x, select.cols()) - dot_of(select.row(0), x, select.cols());
    of_token = V(1) / (V(1) + moe::exp(difference));
    of_value = V(1) / (V(1) + moe::exp(-difference));
  }
  static V dot_of(V const* a, V const* b, std::int64_t n) noexcept {
    product_sum<V> product;
    product.add(a, b, n);
    return product.value();
  }
};

/// The index among the constant experts of the pair, or -1.
template <class V>
std::int64_t constant_index(constant_experts<V const> const& experts, routing_table const& table,
                            std::int32_t const* expert, std::int64_t i) noexcept {
  if (table.row_of[i] != no_row(expert_kind::constant)) return -1;
  std::int64_t const e = std::int64_t{expert[i]} - experts.first;
  return e >= 0 && e < experts.count() ? e : -1;
}

template <class V>
void expect_constant(constant_experts<V const> const& experts, routing_table const& table,
                     vector_view<std::int32_t const> expert,
                     vector_view<std::type_identity_t<V> const> weight, std::int64_t M,
                     call_site site) {
  expects(experts.select.count() == experts.count() && experts.select.rows() == 2 &&
              experts.select.cols() == M && experts.value.cols() == M,
          "constant_experts: select is [n,2,M], value [n,M]", site,
          {{"select.count", experts.select.count()},
           {"select.rows", experts.select.rows()},
           {"select.cols", experts.select.cols()},
           {"value.rows", experts.value.rows()},
           {"value.cols", experts.value.cols()},
           {"M", M}});
  expects(expert.size() >= table.pairs() && weight.size() >= table.pairs(),
          "constant_experts: expert and weight have a value for each pair", site,
          {{"expert", expert.size()}, {"weight", weight.size()}, {"pairs", table.pairs()}});
}

}  // namespace detail

/// out[t] += weight[i] * y for each pair i of token t at one of the constant experts.
///
/// @param expert  routing.expert: the id that each pair chose.
/// @param tokens  [T,M]   @param out  [T,M] in and out.
/// @throws precondition_error if shapes disagree.
template <class V>
void add_constant_experts(cpu const& exec,
                          constant_experts<std::type_identity_t<V> const> const& experts,
                          matrix_view<std::type_identity_t<V> const> tokens,
                          vector_view<std::int32_t const> expert, routing_table const& table,
                          vector_view<std::type_identity_t<V> const> weight, matrix_view<V> out,
                          call_site site = call_site::here()) {
  std::int64_t const M = out.cols();
  detail::expect_constant<V>(experts, table, expert, weight, M, site);
  expects(tokens.rows() == table.T && tokens.cols() == M && out.rows() == table.T,
          "add_constant_experts: tokens and out are [T,M]", site,
          {{"tokens.rows", tokens.rows()},
           {"tokens.cols", tokens.cols()},
           {"out.rows", out.rows()},
           {"T", table.T},
           {"M", M}});
  detail::each_pair(exec, table, [&](std::int64_t t, std::int64_t i) {
    std::int64_t const e = detail::constant_index(experts, table, expert.data(), i);
    if (e < 0) return;
    detail::constant_mix<V> const mix(experts.select[e], tokens.row(t));
    V const a = weight[i] * mix.of_token, b = weight[i] * mix.of_value;
    for (std::int64_t j = 0; j < M; ++j) out(t, j) += a * tokens(t, j) + b * experts.value(e, j);
  });
}

/// The gradient of add_constant_experts. dweight is assigned for its pairs alone, dtokens is added to:
/// call it after the backward of the computed experts.
///
/// @param gradients  Of the experts' shape; assigned or added to.
/// @note  Deterministic: an expert's gradient is summed in the order of the pairs by one thread.
/// @cost  O(T K) for each constant expert besides the products.
template <class V>
void add_constant_experts_backward(
    cpu const& exec, constant_experts<std::type_identity_t<V> const> const& experts,
    matrix_view<std::type_identity_t<V> const> dout,
    matrix_view<std::type_identity_t<V> const> tokens, vector_view<std::int32_t const> expert,
    routing_table const& table, vector_view<std::type_identity_t<V> const> weight,
    matrix_view<V> dtokens, vector_view<V> dweight, constant_experts<V> const& gradients,
    update how, call_site site = call_site::here()) {
  using detail::constant_mix;
  std::int64_t const M = dout.cols();
  detail::expect_constant<V>(experts, table, expert, weight, M, site);
  detail::expect_constant<V>(gradients, table, expert, weight, M, site);
  expects(gradients.count() == experts.count(),
          "add_constant_experts_backward: as many gradients as experts", site,
          {{"gradients", gradients.count()}, {"experts", experts.count()}});
  expects(tokens.rows() == table.T && tokens.cols() == M && dout.rows() == table.T &&
              dtokens.rows() == table.T && dtokens.cols() == M && dweight.size() >= table.pairs(),
          "add_constant_experts_backward: tokens, dout and dtokens are [T,M], dweight has a value "
          "for each pair",
          site,
          {{"tokens.rows", tokens.rows()},
           {"tokens.cols", tokens.cols()},
           {"dout.rows", dout.rows()},
           {"dtokens.rows", dtokens.rows()},
           {"dtokens.cols", dtokens.cols()},
           {"dweight", dweight.size()},
           {"T", table.T},
           {"M", M}});
  // d(logit of x) is `steep`, that of v is -steep.
  auto const steepness = [&](std::int64_t e, std::int64_t t, constant_mix<V> const& mix, V w) {
    V const dx = constant_mix<V>::dot_of(dout.row(t), tokens.row(t), M);
    V const dv = constant_mix<V>::dot_of(dout.row(t), experts.value.row(e), M);
    return w * mix.of_token * mix.of_value * (dx - dv);
  };
  detail::each_pair(exec, table, [&](std::int64_t t, std::int64_t i) {
    std::int64_t const e = detail::constant_index(experts, table, expert.data(), i);
    if (e < 0) return;
    constant_mix<V> const mix(experts.select[e], tokens.row(t));
    V const steep = steepness(e, t, mix, weight[i]);
    auto const select = experts.select[e];
    dweight[i] = mix.of_token * constant_mix<V>::dot_of(dout.row(t), tokens.row(t), M) +
                 mix.of_value * constant_mix<V>::dot_of(dout.row(t), experts.value.row(e), M);
    for (std::int64_t j = 0; j < M; ++j)
      dtokens(t, j) +=
          weight[i] * mix.of_token * dout(t, j) + steep * (select(0, j) - select(1, j));
  });
  exec.each(experts.count(), [&](std::int64_t e, int) {
    auto const dselect = gradients.select[e];
    V* const dvalue = gradients.value.row(e);
    if (how == update::assign) {
      for (int r = 0; r < 2; ++r) std::fill_n(dselect.row(r), M, V(0));
      std::fill_n(dvalue, M, V(0));
    }
    for (std::int64_t t = 0; t < table.T; ++t)
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i) {
        if (detail::constant_index(experts, table, expert.data(), i) != e) continue;
        constant_mix<V> const mix(experts.select[e], tokens.row(t));
        V const steep = steepness(e, t, mix, weight[i]), w = weight[i] * mix.of_value;
        for (std::int64_t j = 0; j < M; ++j) {
          dselect(0, j) += steep * tokens(t, j);
          dselect(1, j) -= steep * tokens(t, j);
          dvalue[j] += w * dout(t, j);
        }
      }
  });
}

/// What the shared expert's output of each token is multiplied with: base[t], plus the weights of the pairs
/// that chose a shared expert.
///
/// @param base         [T], or empty = 0. A shared expert that is always on has base 1, or a gate:
///                     sigmoid(tokens w) in Qwen2.
/// @param coefficient  [T] out.
template <class V>
void shared_coefficients(cpu const& exec, routing_table const& table,
                         vector_view<std::type_identity_t<V> const> weight,
                         vector_view<std::type_identity_t<V> const> base,
                         vector_view<V> coefficient, call_site site = call_site::here()) {
  expects((base.empty() || base.size() == table.T) && coefficient.size() == table.T &&
              weight.size() >= table.pairs(),
          "shared_coefficients: base is [T] or empty, coefficient [T], weight has a value for each "
          "pair",
          site,
          {{"base", base.size()},
           {"coefficient", coefficient.size()},
           {"weight", weight.size()},
           {"T", table.T}});
  exec.split(table.T, 256, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      V sum = base.empty() ? V(0) : base[t];
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i)
        if (table.row_of[i] == no_row(expert_kind::shared)) sum += weight[i];
      coefficient[t] = sum;
    }
  });
}

/// The gradient of shared_coefficients: dweight[i] = dcoefficient[t] for the pairs at shared experts; others
/// are not touched. That of base is dcoefficient itself.
template <class V>
void shared_coefficients_backward(cpu const& exec, routing_table const& table,
                                  vector_view<std::type_identity_t<V> const> dcoefficient,
                                  vector_view<V> dweight, call_site site = call_site::here()) {
  expects(dcoefficient.size() == table.T && dweight.size() >= table.pairs(),
          "shared_coefficients_backward: dcoefficient is [T], dweight has a value for each pair",
          site,
          {{"dcoefficient", dcoefficient.size()}, {"dweight", dweight.size()}, {"T", table.T}});
  detail::each_pair(exec, table, [&](std::int64_t t, std::int64_t i) {
    if (table.row_of[i] == no_row(expert_kind::shared)) dweight[i] = dcoefficient[t];
  });
}

/// out[t] += coefficient[t] * y[t]: adds what an expert that sees every token gave. Its y are
/// `ffn::forward_rows` of all tokens as one segment, `all_rows(T)`.
///
/// @param coefficient  [T], or empty = 1.
template <class V>
void add_shared_rows(cpu const& exec, matrix_view<std::type_identity_t<V> const> y,
                     vector_view<std::type_identity_t<V> const> coefficient, matrix_view<V> out,
                     call_site site = call_site::here()) {
  expects(y.rows() == out.rows() && y.cols() == out.cols() &&
              (coefficient.empty() || coefficient.size() == out.rows()),
          "add_shared_rows: y and out are [T,M], coefficient [T] or empty", site,
          {{"y.rows", y.rows()},
           {"y.cols", y.cols()},
           {"out.rows", out.rows()},
           {"out.cols", out.cols()},
           {"coefficient", coefficient.size()}});
  exec.split(out.rows(), 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      V const c = coefficient.empty() ? V(1) : coefficient[t];
      for (std::int64_t j = 0; j < out.cols(); ++j) out(t, j) += c * y(t, j);
    }
  });
}

}  // namespace moe::inline MOE_ABI
