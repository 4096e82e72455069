// A router that compares directions: logits are cosines of projected tokens and experts, times a scale.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/detail/ffn_passes.hpp>
#include <moe/expert/grouped_gemm.hpp>
#include <moe/expert/segments.hpp>
#include <moe/layer/router.hpp>

namespace moe::inline MOE_ABI {

/// The parameters of a cosine router, or their gradients, as views on the caller's memory.
template <class V>
struct cosine_router_weights {
  matrix_view<V> projection;  ///< [M,D]
  vector_view<V> bias;        ///< [D], or empty
  matrix_view<V> experts;     ///< [D,E]: a direction for each expert
  vector_view<V> log_scale;   ///< [1]: log of 1 / temperature

  template <class U>
    requires std::is_same_v<U, V const> && (!std::is_const_v<V>)
  constexpr operator cosine_router_weights<U>() const noexcept {
    return {projection, bias, experts, log_scale};
  }
};

/// What cosine routers differ in.
struct cosine_router_rule {
  /// log_scale counts as this where it is larger: the temperature is at least 1 / 100 in Tutel.
  double max_log_scale = 4.605170185988091;
  bool unit_experts = true;  ///< False: the directions of experts keep their lengths.
};

/// Bytes of scratch for cosine_logits and its backward, of T tokens.
template <std::floating_point V>
std::size_t cosine_logits_scratch(cpu const& exec, std::int64_t T,
                                  cosine_router_weights<std::type_identity_t<V> const> const& w) {
  memory_size size;
  std::int64_t const M = w.projection.rows(), D = w.experts.rows(), E = w.experts.cols();
  size.add<V>(T * M);                              // of valid tokens alone
  for (int i = 0; i < 2; ++i) size.add<V>(T * D);  // directions of tokens, their gradient
  for (int i = 0; i < 2; ++i) size.add<V>(D * E);
  for (int i = 0; i < 2; ++i) size.add<V>(T);
  size.add<V>(E);
  return size.bytes() + builtin_gemm::scratch_bytes<V>(exec, 1);
}

namespace detail {

inline constexpr char const* cosine_rule = "cosine_logits: scratch >= cosine_logits_scratch";

template <class V>
void expect_cosine(matrix_view<V const> tokens, cosine_router_weights<V const> const& w,
                   matrix_view<V const> logits, call_site site) {
  std::int64_t const T = tokens.rows(), D = w.experts.rows(), E = w.experts.cols();
  expects(w.projection.rows() == tokens.cols() && w.projection.cols() == D &&
              (w.bias.empty() || w.bias.size() == D) && w.log_scale.size() == 1 &&
              logits.rows() == T && logits.cols() == E,
          "cosine_logits: tokens are [T,M], projection [M,D], bias [D] or empty, experts [D,E], "
          "log_scale [1], logits [T,E]",
          site,
          {{"tokens.cols", tokens.cols()},
           {"projection.rows", w.projection.rows()},
           {"projection.cols", w.projection.cols()},
           {"bias", w.bias.size()},
           {"D", D},
           {"E", E},
           {"log_scale", w.log_scale.size()},
           {"T", T},
           {"logits.rows", logits.rows()},
           {"logits.cols", logits.cols()}});
}

/// Lengths below this count as this, and as constants.
inline constexpr double least_length = 1e-12;

/// x / max(||x||, 1e-12) in place, of n elements `step` apart; returns the length.
template <class V>
V make_unit(V* x, std::int64_t n, std::int64_t step) noexcept {
  V square = 0;
  for (std::int64_t i = 0; i < n; ++i) square += x[i * step] * x[i * step];
  V const length = std::sqrt(square), by = std::max(length, V(least_length));
  for (std::int64_t i = 0; i < n; ++i) x[i * step] /= by;
  return length;
}

/// From the gradient of a unit vector u to that of the vector: (g - u (u g)) / length, in place.
/// Returns u g.
template <class V>
V make_unit_backward(V const* u, V length, V* g, std::int64_t n, std::int64_t step) noexcept {
  V along = 0;
  for (std::int64_t i = 0; i < n; ++i) along += u[i * step] * g[i * step];
  bool const constant = length < V(least_length);
  V const by = constant ? V(least_length) : length, off = constant ? V(0) : along;
  for (std::int64_t i = 0; i < n; ++i) g[i * step] = (g[i * step] - u[i * step] * off) / by;
  return along;
}

/// The directions of tokens and experts, and the scale.
template <class V>
struct cosine_parts {
  matrix_view<V> token;   // [T,D]
  matrix_view<V> expert;  // [D,E]
  V* token_length;        // [T]
  V* expert_length;       // [E]
  V scale;

  cosine_parts(cpu const& exec, matrix_view<V const> tokens,
               cosine_router_weights<V const> const& w, cosine_router_rule const& rule,
               memory& scratch, call_site site) {
    std::int64_t const T = tokens.rows(), D = w.experts.rows(), E = w.experts.cols();
    token = {scratch.take<V>(T * D, cosine_rule, site), T, D};
    expert = {scratch.take<V>(D * E, cosine_rule, site), D, E};
    token_length = scratch.take<V>(T, cosine_rule, site);
    expert_length = scratch.take<V>(E, cosine_rule, site);
    scale = std::exp(std::min(w.log_scale[0], V(rule.max_log_scale)));
    builtin_gemm::forward<V>(
        exec, tokens, stacked_view(w.projection),
        w.bias.empty() ? matrix_view<V const>() : matrix_view<V const>(w.bias.data(), 1, D),
        all_rows(T, site), token, scratch, site);
    exec.split(T, 16, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t)
        token_length[t] = make_unit(token.row(t), D, std::int64_t{1});
    });
    for (std::int64_t d = 0; d < D; ++d) std::copy_n(w.experts.row(d), E, expert.row(d));
    for (std::int64_t e = 0; e < E && rule.unit_experts; ++e)
      expert_length[e] = make_unit(expert.data() + e, D, E);
  }
};

}  // namespace detail

/// logits(t, e) = s * cos(tokens[t] projection + bias, experts[e]), s = exp(min(log_scale, max_log_scale)).
///
/// They stand in the place of compute_logits: any gate follows.
///
/// @param tokens   [T,M]   @param logits  [T,E] out.
/// @param scratch  cosine_logits_scratch<V>(exec, T, weights).
/// @throws precondition_error if shapes disagree or scratch is too small.
/// @note  Allocates nothing. Bitwise the same for any number of threads.
/// Source: Chi et al., "On the representation collapse of sparse mixture of experts", 2022 (X-MoE), without
///         a bound on the scale; Tutel's cosine_top, with one; both begin with a temperature of 1 / 2 or so.
template <std::floating_point V>
void cosine_logits(cpu const& exec, matrix_view<std::type_identity_t<V> const> tokens,
                   cosine_router_weights<std::type_identity_t<V> const> const& weights,
                   cosine_router_rule const& rule, matrix_view<V> logits, memory scratch,
                   call_site site = call_site::here()) {
  detail::expect_cosine<V>(tokens, weights, logits, site);
  detail::cosine_parts<V> const parts(exec, tokens, weights, rule, scratch, site);
  builtin_gemm::forward<V>(exec, parts.token, stacked_view<V const>(parts.expert), {},
                           all_rows(tokens.rows(), site), logits, scratch, site);
  exec.split(tokens.rows(), 64, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t e = 0; e < logits.cols(); ++e) logits(t, e) *= parts.scale;
  });
}

/// The gradient of cosine_logits.
///
/// @param logits     [T,E]: what forward gave. Tokens with NaN or +inf among them add nothing.
/// @param dlogits    [T,E]; 0 for those tokens.
/// @param dtokens    [T,M] in and out: the gradient is added.
/// @param gradients  Of the weights' shapes: assigned, or added to. 0 for a log_scale beyond its bound.
template <std::floating_point V>
void cosine_logits_backward(cpu const& exec, matrix_view<std::type_identity_t<V> const> tokens,
                            cosine_router_weights<std::type_identity_t<V> const> const& weights,
                            cosine_router_rule const& rule,
                            matrix_view<std::type_identity_t<V> const> logits,
                            matrix_view<std::type_identity_t<V> const> dlogits,
                            matrix_view<V> dtokens, cosine_router_weights<V> const& gradients,
                            update how, memory scratch, call_site site = call_site::here()) {
  std::int64_t const T = tokens.rows(), D = weights.experts.rows(), E = weights.experts.cols();
  detail::expect_cosine<V>(tokens, weights, logits, site);
  detail::expect_cosine<V>(dtokens, gradients, dlogits, site);
  expects(dtokens.rows() == T && gradients.experts.rows() == D && gradients.experts.cols() == E &&
              gradients.bias.size() == weights.bias.size(),
          "cosine_logits_backward: dtokens and gradients have the shapes of tokens and weights",
          site, {{"dtokens.rows", dtokens.rows()}, {"T", T}, {"bias", gradients.bias.size()}});
  all_rows const all(T, site);
  auto const valid = detail::valid_rows<V>(exec, tokens, logits, scratch, site);
  detail::cosine_parts<V> const parts(exec, valid, weights, rule, scratch, site);

  matrix_view<V> const dtoken(scratch.take<V>(T * D, detail::cosine_rule, site), T, D);
  V* const along = scratch.take<V>(T, detail::cosine_rule, site);
  builtin_gemm::input_gradient<V>(exec, dlogits, stacked_view<V const>(parts.expert), all,
                                  update::assign, dtoken, scratch, site);
  exec.split(T, 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      for (std::int64_t d = 0; d < D; ++d) dtoken(t, d) *= parts.scale;
      along[t] = detail::make_unit_backward(parts.token.row(t), parts.token_length[t],
                                            dtoken.row(t), D, std::int64_t{1});
    }
  });
  builtin_gemm::weight_gradient<V>(exec, valid, dtoken, all, how,
                                   stacked_view(gradients.projection), scratch, site);
  if (!gradients.bias.empty())
    detail::sum_rows_of_experts<V>(exec, all, dtoken, nullptr, how,
                                   matrix_view<V>(gradients.bias.data(), 1, D));
  builtin_gemm::input_gradient<V>(exec, dtoken, stacked_view(weights.projection), all, update::add,
                                  dtokens, scratch, site);

  matrix_view<V> const dexpert(scratch.take<V>(D * E, detail::cosine_rule, site), D, E);
  builtin_gemm::weight_gradient<V>(exec, parts.token, dlogits, all, update::assign,
                                   stacked_view(dexpert), scratch, site);
  for (std::int64_t e = 0; e < E; ++e) {
    for (std::int64_t d = 0; d < D; ++d) dexpert(d, e) *= parts.scale;
    if (rule.unit_experts)
      detail::make_unit_backward(parts.expert.data() + e, parts.expert_length[e],
                                 dexpert.data() + e, D, E);
    for (std::int64_t d = 0; d < D; ++d)
      gradients.experts(d, e) =
          dexpert(d, e) + (how == update::add ? gradients.experts(d, e) : V(0));
  }
  // Of a token u c scale, summed over experts, is what dtoken has along u.
  double total = 0;
  for (std::int64_t t = 0; t < T; ++t) total += static_cast<double>(along[t]);
  if (!(weights.log_scale[0] < V(rule.max_log_scale))) total = 0;
  gradients.log_scale[0] =
      static_cast<V>(total) + (how == update::add ? gradients.log_scale[0] : V(0));
}

}  // namespace moe::inline MOE_ABI
