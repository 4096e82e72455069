// The importance-and-load loss: scores and noisy loads should vary little over experts.
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
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_tokens.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Variance over squared mean of x [E], and its derivative with respect to each x[e].
struct variation {
  double mean = 0, variance = 0;
  int E = 1;

  static constexpr double floor = 1e-10;

  static variation of(double const* x, int E) noexcept {
    variation v;
    v.E = E;
    for (int e = 0; e < E; ++e) v.mean += x[e];
    v.mean /= E;
    for (int e = 0; e < E; ++e) v.variance += (x[e] - v.mean) * (x[e] - v.mean);
    v.variance = E > 1 ? v.variance / (E - 1) : 0;
    return v;
  }
  MOE_HOST_DEVICE double value() const noexcept { return variance / (mean * mean + floor); }
  MOE_HOST_DEVICE double derivative(double x) const noexcept {
    if (E == 1) return 0;
    double const d = mean * mean + floor;
    return 2 * (x - mean) / ((E - 1) * d) - variance * 2 * mean / (E * d * d);
  }
};

/// {importance [E], load [E]}, one after the other.
template <class V>
double* sum_importance(cpu const& exec, matrix_view<V const> scores, vector_view<V const> threshold,
                       double width, batch const& tokens, memory scratch, call_site site) {
  std::int64_t const E = scores.cols();
  return sum_tokens(exec, scores.rows(), 2 * E, scratch,
                    "importance_and_load: scratch >= importance_and_load_scratch(T, E)", site,
                    [&](std::int64_t first, std::int64_t last, double* sum) {
                      double const to_unit = 1 / (width * std::sqrt(2.0));
                      for (std::int64_t t = first; t < last; ++t) {
                        double const bar = static_cast<double>(threshold[t]);
                        if (!tokens.is_live(t) || std::isnan(bar)) continue;
                        V const* const s = scores.row(t);
                        for (std::int64_t e = 0; e < E; ++e) {
                          if (!is_candidate(s[e])) continue;
                          sum[e] += static_cast<double>(s[e]);
                          sum[E + e] +=
                              0.5 * std::erfc((bar - static_cast<double>(s[e])) * to_unit);
                        }
                      }
                    });
}

template <class V>
void check_importance_input(char const* shapes, char const* noise, matrix_view<V const> scores,
                            vector_view<V const> threshold, double gate_noise, call_site site) {
  expects(scores.cols() >= 1 && scores.cols() <= scores.ld() && threshold.size() == scores.rows(),
          shapes, site,
          {{"rows", scores.rows()},
           {"cols", scores.cols()},
           {"ld", scores.ld()},
           {"size of threshold", threshold.size()}});
  expects(gate_noise > 0, noise, site, {{"gate_noise", gate_noise}});
}

template <class V>
void check_importance(matrix_view<V const> scores, vector_view<V const> threshold,
                      double gate_noise, call_site site) {
  check_importance_input("importance_and_load: scores is [T,E], E >= 1, threshold is [T]",
                         "importance_and_load: gate_noise > 0", scores, threshold, gate_noise,
                         site);
}

template <class V>
void check_importance_backward(matrix_view<V const> scores, vector_view<V const> threshold,
                               double gate_noise, matrix_view<V> dscores, vector_view<V> dthreshold,
                               call_site site) {
  check_importance_input("importance_and_load_backward: scores is [T,E], E >= 1, threshold is [T]",
                         "importance_and_load_backward: gate_noise > 0", scores, threshold,
                         gate_noise, site);
  expects(dscores.rows() == scores.rows() && dscores.cols() == scores.cols() &&
              dscores.ld() >= dscores.cols() && dthreshold.size() == threshold.size(),
          "importance_and_load_backward: dscores is [T,E], dthreshold is [T]", site,
          {{"rows", dscores.rows()},
           {"cols", dscores.cols()},
           {"ld", dscores.ld()},
           {"size of dthreshold", dthreshold.size()}});
}

inline void check_importance_sums(vector_view<double const> sums, std::int64_t E, call_site site) {
  expects(sums.size() == 2 * E && E >= 1, "importance_and_load: sums is [2E], E >= 1", site,
          {{"size", sums.size()}, {"E", E}});
}

}  // namespace detail

/// Bytes of scratch for importance_and_load and its backward.
constexpr std::size_t importance_and_load_scratch(std::int64_t T, int E) noexcept {
  memory_size size;
  size.add<double>(2 * std::int64_t{E});
  return detail::add_sum_tokens(size, T, 2 * std::int64_t{E}).bytes();
}

/// How many sums over tokens the loss is made of: importance and load of each expert.
constexpr std::int64_t importance_and_load_sums(int E) noexcept {
  return 2 * std::int64_t{E};
}

/// The first step of importance_and_load: its sums, which may be added up over batches or ranks before
/// the second.
///
/// @param scores, threshold, gate_noise, tokens, scratch  As importance_and_load takes them.
/// @param sums  [importance_and_load_sums(E)] out.
/// @throws precondition_error as importance_and_load, or if sums has another size.
template <class T, class V = std::remove_const_t<T>>
void sum_importance_and_load(cpu const& exec, matrix_view<T> scores,
                             std::type_identity_t<vector_view<V const>> threshold,
                             double gate_noise, batch const& tokens, memory scratch,
                             vector_view<double> sums, call_site site = call_site::here()) {
  detail::check_importance<V>(scores, threshold, gate_noise, site);
  detail::check_importance_sums(sums, scores.cols(), site);
  double const width = gate_noise / static_cast<double>(scores.cols());
  std::copy_n(detail::sum_importance<V>(exec, scores, threshold, width, tokens, scratch, site),
              sums.size(), sums.begin());
}

/// The second step: the loss of the tokens that were summed.
/// @param sums  [2E], E >= 1.
inline double importance_and_load(vector_view<double const> sums,
                                  call_site site = call_site::here()) {
  std::int64_t const E = sums.size() / 2;
  detail::check_importance_sums(sums, E, site);
  auto const variation_of = [E](double const* x) {
    return detail::variation::of(x, static_cast<int>(E)).value();
  };
  return 0.5 * (variation_of(sums.data()) + variation_of(sums.data() + E));
}

/// Half the sum of the squared coefficients of variation of importance and load.
///
/// importance[e] = sum over tokens of s(t, e); load[e] = sum of Phi((s(t, e) - threshold[t]) /
/// (gate_noise / E)), the chance that e would be chosen under other noise; variation(x) =
/// var(x) / (mean(x)^2 + 1e-10) with the unbiased variance. Tutel's form: s is a probability and the
/// threshold a logit, so the difference mixes units. It is kept, since models were trained with it.
/// With a noisy score as the threshold it is Shazeer's load without the exclusion of one's own noise.
///
/// @param scores      [T,E] in. The clean softmax, before noise; -inf does not count.
/// @param threshold   [T] in. The noisy logit of the last expert chosen; NaN: the token takes no part.
/// @param gate_noise  > 0: the noise on the logits had standard deviation gate_noise / E.
/// @param tokens      Its mask: tokens with live = 0 take no part.
/// @param scratch     importance_and_load_scratch(T, E) bytes.
/// @return The loss, unscaled; 0 if E = 1 or no token takes part.
/// @throws precondition_error if the shapes disagree, gate_noise <= 0, or scratch is short.
/// @note  Sums are in double and do not depend on the number of threads. Allocates nothing.
/// @cost  T*E error functions.
/// Source: Shazeer et al., "Outrageously large neural networks", 2017, section 4 and appendix A.
template <class T, class V = std::remove_const_t<T>>
double importance_and_load(cpu const& exec, matrix_view<T> scores,
                           std::type_identity_t<vector_view<V const>> threshold, double gate_noise,
                           batch const& tokens, memory scratch,
                           call_site site = call_site::here()) {
  detail::check_importance<V>(scores, threshold, gate_noise, site);
  std::int64_t const E = scores.cols();
  double const* const sums = detail::sum_importance<V>(
      exec, scores, threshold, gate_noise / static_cast<double>(E), tokens, scratch, site);
  return importance_and_load({sums, 2 * E}, site);
}

/// The gradient of the loss of all tokens that were summed, for those of `scores`.
///
/// @param sums        [importance_and_load_sums(E)].
/// @param dloss       Gradient of the objective with respect to the loss: its coefficient.
/// @param scratch     importance_and_load_scratch(T, E) bytes.
/// @param dscores     [T,E] out: with respect to the clean scores; 0 where a token takes no part.
/// @param dthreshold  [T] out: with respect to the threshold, that is, to the noisy logit it is.
/// @throws precondition_error if the shapes disagree, gate_noise <= 0, or scratch is short.
/// @note  Deterministic for any number of threads. Allocates nothing.
/// @cost  T*E exponentials.
template <class T, class V = std::remove_const_t<T>>
void importance_and_load_backward(cpu const& exec, matrix_view<T> scores,
                                  std::type_identity_t<vector_view<V const>> threshold,
                                  double gate_noise, batch const& tokens,
                                  vector_view<double const> sums, double dloss, memory scratch,
                                  std::type_identity_t<matrix_view<V>> dscores,
                                  std::type_identity_t<vector_view<V>> dthreshold,
                                  call_site site = call_site::here()) {
  detail::check_importance_backward<V>(scores, threshold, gate_noise, dscores, dthreshold, site);
  int const E = static_cast<int>(scores.cols());
  double const width = gate_noise / E;
  detail::check_importance_sums(sums, E, site);
  double* const dsums = scratch.take<double>(
      2 * E, "importance_and_load_backward: scratch >= importance_and_load_scratch(T, E)", site);
  auto const importance = detail::variation::of(sums.data(), E);
  auto const load = detail::variation::of(sums.data() + E, E);
  for (int e = 0; e < E; ++e) {
    dsums[e] = 0.5 * dloss * importance.derivative(sums[e]);
    dsums[E + e] = 0.5 * dloss * load.derivative(sums[E + e]);
  }
  double const density = 1 / (width * std::sqrt(2 * 3.14159265358979323846));
  exec.split(scores.rows(), 64, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      double const bar = static_cast<double>(threshold[t]);
      bool const takes_part = tokens.is_live(t) && !std::isnan(bar);
      V const* const s = scores.row(t);
      V* const ds = dscores.row(t);
      double dbar = 0;
      for (int e = 0; e < E; ++e) {
        if (!takes_part || !is_candidate(s[e])) {
          ds[e] = V(0);
          continue;
        }
        double const z = (static_cast<double>(s[e]) - bar) / width;
        double const through_load = dsums[E + e] * density * std::exp(-0.5 * z * z);
        ds[e] = static_cast<V>(dsums[e] + through_load);
        dbar -= through_load;
      }
      dthreshold[t] = static_cast<V>(dbar);
    }
  });
}

/// The gradient of importance_and_load.
///
/// @param dloss       Gradient of the objective with respect to the loss: its coefficient.
/// @param dscores     [T,E] out: with respect to the clean scores; 0 where a token takes no part.
/// @param dthreshold  [T] out: with respect to the threshold, that is, to the noisy logit it is.
/// @throws precondition_error if the shapes disagree, gate_noise <= 0, or scratch is short.
/// @note  Deterministic for any number of threads. Allocates nothing.
/// @cost  T*E error functions and T*E exponentials.
template <class T, class V = std::remove_const_t<T>>
void importance_and_load_backward(cpu const& exec, matrix_view<T> scores,
                                  std::type_identity_t<vector_view<V const>> threshold,
                                  double gate_noise, batch const& tokens, double dloss,
                                  memory scratch, std::type_identity_t<matrix_view<V>> dscores,
                                  std::type_identity_t<vector_view<V>> dthreshold,
                                  call_site site = call_site::here()) {
  detail::check_importance_backward<V>(scores, threshold, gate_noise, dscores, dthreshold, site);
  std::int64_t const E = scores.cols();
  char const* const enough =
      "importance_and_load_backward: scratch >= importance_and_load_scratch(T, E)";
  vector_view<double> const sums(scratch.take<double>(2 * E, enough, site), 2 * E);
  sum_importance_and_load<T, V>(exec, scores, threshold, gate_noise, tokens, scratch, sums, site);
  importance_and_load_backward<T, V>(exec, scores, threshold, gate_noise, tokens, sums, dloss,
                                     scratch, dscores, dthreshold, site);
}

}  // namespace moe::inline MOE_ABI
