// The loss of a predictor of choices: so that a token alone can tell what was chosen with sight of all.
// SPDX-License-Identifier: MIT
#pragma once

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
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_tokens.hpp>
#include <moe/loss/z_loss.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

template <class T, class V>
void check_choice_prediction(matrix_view<T> logits, basic_routing<V> const& chosen,
                             call_site site) {
  expects(logits.rows() == chosen.T && logits.cols() == chosen.E && logits.ld() >= logits.cols() &&
              (logits.span() == 0 || !logits.absent()),
          "choice_prediction: logits are [T,E] of the routing, ld >= E", site,
          {{"rows", logits.rows()},
           {"cols", logits.cols()},
           {"ld", logits.ld()},
           {"T", chosen.T},
           {"E", chosen.E}});
}

/// Calls f(e, l, taken) for each expert that token t may have, by its logits.
template <class T, class V, class F>
void each_prediction(matrix_view<T> logits, basic_routing<V> const& chosen, std::int64_t t,
                     F const& f) {
  if (!chosen.tokens.is_live(t) || !has_logits(logits.row(t), logits.cols())) return;
  std::int64_t const first = chosen.first_pair(t), last = chosen.first_pair(t + 1);
  for (std::int64_t e = 0; e < logits.cols(); ++e) {
    auto const l = static_cast<double>(logits(t, e));
    if (!is_candidate(l)) continue;
    bool taken = false;
    for (std::int64_t i = first; i < last; ++i) taken = taken || chosen.expert[i] == e;
    f(e, l, taken);
  }
}

template <class T, class V>
double const* sum_choice_prediction(cpu const& exec, matrix_view<T> logits,
                                    basic_routing<V> const& chosen, memory& scratch,
                                    call_site site) {
  check_choice_prediction(logits, chosen, site);
  return sum_tokens(
      exec, logits.rows(), 2, scratch, "choice_prediction: scratch >= choice_prediction_scratch(T)",
      site, [&](std::int64_t first, std::int64_t last, double* sum) {
        for (std::int64_t t = first; t < last; ++t)
          each_prediction(logits, chosen, t, [&](std::int64_t, double l, bool taken) {
            double const wrong = taken ? -l : l;
            sum[0] += std::log1p(std::exp(-std::abs(wrong))) + (wrong > 0 ? wrong : 0);
            sum[1] += 1;
          });
      });
}

}  // namespace detail

/// Bytes of scratch for choice_prediction and its backward.
constexpr std::size_t choice_prediction_scratch(std::int64_t T) noexcept {
  memory_size size;
  return detail::add_sum_tokens(size, T, 2).bytes();
}

/// The mean binary cross-entropy between sigmoid(logits) and whether the token was chosen: what makes a
/// threshold of 0 on these logits (`above`) choose as experts did who saw the whole batch. With the
/// router's own logits it pulls these apart at 0; with those of a predictor it leaves the router alone.
///
/// @param logits   [T,E] in, of the router or of a predictor; -inf does not count.
/// @param chosen   A routing of expert_choice or mixture_of_depths, or any other. Masked tokens take no
///                 part, nor do those with an invalid logit.
/// @param scratch  choice_prediction_scratch(T) bytes.
/// @return The loss, unscaled; 0 if no token takes part.
/// @throws precondition_error if shapes disagree or scratch is short.
/// @note  In double; does not depend on the number of threads. Allocates nothing.
/// @cost  O(T E K), T*E exponentials and logarithms.
/// Example: one logit 0, chosen or not, gives log 2.
/// Source: Raposo et al., "Mixture-of-depths", 2024, section 3.5.
template <class T, class V>
double choice_prediction(cpu const& exec, matrix_view<T> logits, basic_routing<V> const& chosen,
                         memory scratch, call_site site = call_site::here()) {
  double const* const sum = detail::sum_choice_prediction(exec, logits, chosen, scratch, site);
  return sum[1] == 0 ? 0 : sum[0] / sum[1];
}

/// The gradient of choice_prediction.
///
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dlogits  [T,E] in, out: the gradient is added.
/// @throws precondition_error if the shapes disagree or scratch is short.
/// @note  Does not depend on the number of threads. Allocates nothing.
template <class T, class V, class D = std::remove_const_t<T>>
void choice_prediction_backward(cpu const& exec, matrix_view<T> logits,
                                basic_routing<V> const& chosen, double dloss, memory scratch,
                                std::type_identity_t<matrix_view<D>> dlogits,
                                call_site site = call_site::here()) {
  double const* const sum = detail::sum_choice_prediction(exec, logits, chosen, scratch, site);
  expects(dlogits.rows() == logits.rows() && dlogits.cols() == logits.cols() &&
              dlogits.ld() >= dlogits.cols(),
          "choice_prediction_backward: dlogits is [T,E]", site,
          {{"rows", dlogits.rows()}, {"cols", dlogits.cols()}});
  double const scale = dloss / sum[1];
  exec.split(logits.rows(), 64, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      detail::each_prediction(logits, chosen, t, [&](std::int64_t e, double l, bool taken) {
        dlogits(t, e) += static_cast<D>(scale * (1 / (1 + std::exp(-l)) - (taken ? 1 : 0)));
      });
  });
}

}  // namespace moe::inline MOE_ABI
