// The router z-loss: keeps logits small, so that low precision rounds them less.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_tokens.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Whether a token has a candidate and no logit that is NaN or +inf.
template <class V>
bool has_logits(V const* l, std::int64_t E) noexcept {
  bool any = false, valid = true;
  for (std::int64_t e = 0; e < E; ++e) {
    auto const x = static_cast<double>(l[e]);
    valid = valid && !is_invalid_logit(x);
    any = any || is_candidate(x);
  }
  return any && valid;
}

template <class V>
double log_sum_exp(V const* l, std::int64_t E) noexcept {
  double highest = no_score<double>;
  for (std::int64_t e = 0; e < E; ++e) highest = std::max(highest, static_cast<double>(l[e]));
  double total = 0;
  for (std::int64_t e = 0; e < E; ++e) total += std::exp(static_cast<double>(l[e]) - highest);
  return highest + std::log(total);
}

template <class T>
void check_z_loss(matrix_view<T> logits, call_site site) {
  expects(logits.ld() >= logits.cols() && (logits.span() == 0 || !logits.absent()),
          "z_loss: logits are [T,E], ld >= E", site, {{"ld", logits.ld()}, {"E", logits.cols()}});
}

template <class T, class V>
void check_z_loss_backward(matrix_view<T> logits, matrix_view<V> dlogits, call_site site) {
  expects(dlogits.rows() == logits.rows() && dlogits.cols() == logits.cols() &&
              logits.ld() >= logits.cols() && dlogits.ld() >= dlogits.cols(),
          "z_loss_backward: logits and dlogits are [T,E]", site,
          {{"rows of logits", logits.rows()},
           {"cols of logits", logits.cols()},
           {"rows of dlogits", dlogits.rows()},
           {"cols of dlogits", dlogits.cols()}});
}

inline void check_z_sums(vector_view<double const> sums, call_site site) {
  expects(sums.size() == 2, "z_loss: sums is [2]", site, {{"size", sums.size()}});
}

}  // namespace detail

/// Bytes of scratch for z_loss and z_loss_backward.
constexpr std::size_t z_loss_scratch(std::int64_t T) noexcept {
  memory_size size;
  return detail::add_sum_tokens(size, T, 2).bytes();
}

/// How many sums over tokens the z-loss is made of: of the squares, and of the tokens that take part.
inline constexpr std::int64_t z_loss_sums = 2;

/// The first step of z_loss: its sums, which may be added up over batches or ranks before the second.
///
/// @param logits, tokens, scratch  As z_loss takes them.
/// @param sums  [z_loss_sums] out.
/// @throws precondition_error as z_loss, or if sums has another size.
template <class T>
void sum_z_loss(cpu const& exec, matrix_view<T> logits, batch const& tokens, memory scratch,
                vector_view<double> sums, call_site site = call_site::here()) {
  detail::check_z_loss(logits, site);
  detail::check_z_sums(sums, site);
  double const* const found = detail::sum_tokens(
      exec, logits.rows(), z_loss_sums, scratch, "z_loss: scratch >= z_loss_scratch(T)", site,
      [&](std::int64_t first, std::int64_t last, double* sum) {
        for (std::int64_t t = first; t < last; ++t) {
          if (!tokens.is_live(t) || !detail::has_logits(logits.row(t), logits.cols())) continue;
          double const z = detail::log_sum_exp(logits.row(t), logits.cols());
          sum[0] += z * z;
          sum[1] += 1;
        }
      });
  std::copy_n(found, z_loss_sums, sums.begin());
}

/// The second step: the mean over the tokens that were summed; 0 if none takes part.
/// @throws precondition_error unless sums is [z_loss_sums].
inline double z_loss(vector_view<double const> sums, call_site site = call_site::here()) {
  detail::check_z_sums(sums, site);
  return sums[1] == 0 ? 0 : sums[0] / sums[1];
}

/// The mean over tokens of (log of the sum of exp(logits))^2.
///
/// @param logits   [T,E] in, of anything that converts to double; -inf does not count.
/// @param tokens   Its mask: tokens with live = 0 take no part, nor do those without a candidate and
///                 those with an invalid logit; the mean is over the others.
/// @param scratch  z_loss_scratch(T) bytes.
/// @return The loss, unscaled (a coefficient of 0.001 is usual); 0 if no token takes part.
/// @throws precondition_error if logits has overlapping rows or scratch is short.
/// @note  In double; does not depend on the number of threads. Allocates nothing.
/// @cost  T*E exponentials.
/// Example: logits {{0, 0}} give (log 2)^2 = 0.4805.
/// Source: Zoph et al., "ST-MoE", 2022, equation 5.
template <class T>
double z_loss(cpu const& exec, matrix_view<T> logits, batch const& tokens, memory scratch,
              call_site site = call_site::here()) {
  double sums[z_loss_sums];
  sum_z_loss(exec, logits, tokens, scratch, {sums, z_loss_sums}, site);
  return z_loss({sums, z_loss_sums}, site);
}

/// The gradient of the z-loss of all tokens that were summed, for those of `logits`.
///
/// @param sums     [z_loss_sums].
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dlogits  [T,E] in, out: the gradient is added.
/// @throws precondition_error if the shapes disagree.
/// @note  Deterministic for any number of threads. Allocates nothing.
/// @cost  2 T*E exponentials.
template <class T, class V = std::remove_const_t<T>>
void z_loss_backward(cpu const& exec, matrix_view<T> logits, batch const& tokens,
                     vector_view<double const> sums, double dloss,
                     std::type_identity_t<matrix_view<V>> dlogits,
                     call_site site = call_site::here()) {
  detail::check_z_loss_backward(logits, dlogits, site);
  detail::check_z_sums(sums, site);
  std::int64_t const E = logits.cols();
  double const scale = 2 * dloss / sums[1];
  exec.split(logits.rows(), 64, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      auto const* const l = logits.row(t);
      if (!tokens.is_live(t) || !detail::has_logits(l, E)) continue;
      double const z = detail::log_sum_exp(l, E);
      for (std::int64_t e = 0; e < E; ++e)
        dlogits(t, e) += static_cast<V>(scale * z * std::exp(static_cast<double>(l[e]) - z));
    }
  });
}

/// The gradient of z_loss.
///
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dlogits  [T,E] in, out: the gradient is added.
/// @throws precondition_error if the shapes disagree or scratch is short.
/// @note  Deterministic for any number of threads. Allocates nothing.
/// @cost  2 T*E exponentials.
template <class T, class V = std::remove_const_t<T>>
void z_loss_backward(cpu const& exec, matrix_view<T> logits, batch const& tokens, double dloss,
                     memory scratch, std::type_identity_t<matrix_view<V>> dlogits,
                     call_site site = call_site::here()) {
  detail::check_z_loss_backward(logits, dlogits, site);
  std::int64_t const E = logits.cols();
  double const* const tokens_counted = detail::sum_tokens(
      exec, logits.rows(), 1, scratch, "z_loss_backward: scratch >= z_loss_scratch(T)", site,
      [&](std::int64_t first, std::int64_t last, double* sum) {
        for (std::int64_t t = first; t < last; ++t)
          sum[0] += tokens.is_live(t) && detail::has_logits(logits.row(t), E) ? 1 : 0;
      });
  double const sums[z_loss_sums] = {0, *tokens_counted};
  z_loss_backward<T, V>(exec, logits, tokens, {sums, z_loss_sums}, dloss, dlogits, site);
}

}  // namespace moe::inline MOE_ABI
