// The elementwise parts of Soft MoE: normalised vectors, softmax over tokens and over slots, and their
// gradients. Private to soft_moe.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI::detail {

/// Added to a norm, so that a vector of zeros stays one.
template <class V>
inline constexpr V norm_eps = V(1e-6);

/// out[t] = x[t] / (|x[t]| + eps).
template <class V>
void normalise_rows(cpu const& exec, matrix_view<V const> x, matrix_view<V> out) {
  exec.split(x.rows(), 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      V square = 0;
      for (std::int64_t m = 0; m < x.cols(); ++m) square += x(t, m) * x(t, m);
      V const divisor = std::sqrt(square) + norm_eps<V>;
      for (std::int64_t m = 0; m < x.cols(); ++m) out(t, m) = x(t, m) / divisor;
    }
  });
}

/// dx[t] += the gradient of normalise_rows. A vector of zeros has 1 / eps times its own.
template <class V>
void normalise_rows_backward(cpu const& exec, matrix_view<V const> x, matrix_view<V const> dout,
                             matrix_view<V> dx) {
  exec.split(x.rows(), 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      V square = 0, dot = 0;
      for (std::int64_t m = 0; m < x.cols(); ++m) {
        square += x(t, m) * x(t, m);
        dot += x(t, m) * dout(t, m);
      }
      V const norm = std::sqrt(square), divisor = norm + norm_eps<V>;
      V const along = norm > 0 ? dot / (norm * divisor) : V(0);
      for (std::int64_t m = 0; m < x.cols(); ++m)
        dx(t, m) += (dout(t, m) - x(t, m) * along) / divisor;
    }
  });
}

/// out[:, l] = scale * phi[:, l] / (|phi[:, l]| + eps).
/// @param norms  [L] out: |phi[:, l]|.
template <class V>
void normalise_columns(matrix_view<V const> phi, V scale, V* norms, matrix_view<V> out) {
  std::int64_t const M = phi.rows(), L = phi.cols();
  std::fill_n(norms, L, V(0));
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t l = 0; l < L; ++l) norms[l] += phi(m, l) * phi(m, l);
  for (std::int64_t l = 0; l < L; ++l) norms[l] = std::sqrt(norms[l]);
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t l = 0; l < L; ++l) out(m, l) = scale * (phi(m, l) / (norms[l] + norm_eps<V>));
}

/// The gradient of normalise_columns, in place of dout.
/// @param dots   [L] room.
/// @return d/dscale.
template <class V>
V normalise_columns_backward(matrix_view<V const> phi, V scale, V const* norms, V* dots,
                             matrix_view<V> dout) {
  std::int64_t const M = phi.rows(), L = phi.cols();
  std::fill_n(dots, L, V(0));
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t l = 0; l < L; ++l) dots[l] += phi(m, l) * dout(m, l);
  V dscale = 0;
  for (std::int64_t l = 0; l < L; ++l) {
    V const divisor = norms[l] + norm_eps<V>;
    dscale += dots[l] / divisor;
    dots[l] = norms[l] > 0 ? dots[l] / (norms[l] * divisor) : V(0);
  }
  for (std::int64_t m = 0; m < M; ++m)
    for (std::int64_t l = 0; l < L; ++l)
      dout(m, l) = scale * (dout(m, l) - phi(m, l) * dots[l]) / (norms[l] + norm_eps<V>);
  return dscale;
}

inline constexpr std::int64_t softmax_columns = 64;  // of a task; a guess

/// Calls f(first row, first column, end of columns) for blocks of columns of each sequence of S rows.
template <class F>
void each_column_block(cpu const& exec, std::int64_t T, std::int64_t S, std::int64_t L,
                       F const& f) {
  std::int64_t const blocks = (L + softmax_columns - 1) / softmax_columns;
  exec.each(T / S * blocks, [&](std::int64_t i, int) {
    std::int64_t const l0 = i % blocks * softmax_columns;
    f(i / blocks * S, l0, std::min(L, l0 + softmax_columns));
  });
}

/// dispatch[:, l] = softmax of logits[:, l] over the live tokens of each sequence; 0 for masked ones.
template <class V>
void softmax_over_tokens(cpu const& exec, matrix_view<V const> logits, std::int64_t S,
                         batch const& ids, matrix_view<V> dispatch) {
  each_column_block(exec, logits.rows(), S, logits.cols(),
                    [&](std::int64_t t0, std::int64_t l0, std::int64_t l1) {
                      V highest[softmax_columns], total[softmax_columns];
                      std::fill_n(highest, l1 - l0, no_score<V>);
                      std::fill_n(total, l1 - l0, V(0));
                      for (std::int64_t t = t0; t < t0 + S; ++t)
                        for (std::int64_t l = l0; l < l1 && ids.is_live(t); ++l)
                          highest[l - l0] = std::max(highest[l - l0], logits(t, l));
                      for (std::int64_t t = t0; t < t0 + S; ++t)
                        for (std::int64_t l = l0; l < l1; ++l) {
                          dispatch(t, l) =
                              ids.is_live(t) ? moe::exp(logits(t, l) - highest[l - l0]) : V(0);
                          total[l - l0] += dispatch(t, l);
                        }
                      for (std::int64_t t = t0; t < t0 + S; ++t)
                        for (std::int64_t l = l0; l < l1 && ids.is_live(t); ++l)
                          dispatch(t, l) /= total[l - l0];
                    });
}

/// dlogits += dispatch (ddispatch - the sum over tokens of dispatch ddispatch).
template <class V>
void softmax_over_tokens_backward(cpu const& exec, matrix_view<V const> dispatch,
                                  matrix_view<V const> ddispatch, std::int64_t S,
                                  matrix_view<V> dlogits) {
  each_column_block(exec, dispatch.rows(), S, dispatch.cols(),
                    [&](std::int64_t t0, std::int64_t l0, std::int64_t l1) {
                      V mean[softmax_columns] = {};
                      for (std::int64_t t = t0; t < t0 + S; ++t)
                        for (std::int64_t l = l0; l < l1; ++l)
                          mean[l - l0] += dispatch(t, l) * ddispatch(t, l);
                      for (std::int64_t t = t0; t < t0 + S; ++t)
                        for (std::int64_t l = l0; l < l1; ++l)
                          dlogits(t, l) += dispatch(t, l) * (ddispatch(t, l) - mean[l - l0]);
                    });
}

/// logits become, row by row, their softmax over slots; 0 for masked tokens.
template <class V>
void softmax_over_slots(cpu const& exec, batch const& ids, matrix_view<V> logits) {
  exec.split(logits.rows(), 16, [&](std::int64_t first, std::int64_t last, int) {
    std::int64_t const L = logits.cols();
    for (std::int64_t t = first; t < last; ++t) {
      V* const c = logits.row(t);
      if (!ids.is_live(t)) {
        std::fill_n(c, L, V(0));
        continue;
      }
      V const highest = *std::max_element(c, c + L);
      V total = 0;
      for (std::int64_t l = 0; l < L; ++l) {
        c[l] = moe::exp(c[l] - highest);
        total += c[l];
      }
      for (std::int64_t l = 0; l < L; ++l) c[l] /= total;
    }
  });
}

/// dlogits = combine (dcombine - the sum over slots of combine dcombine), in place of dcombine.
template <class V>
void softmax_over_slots_backward(cpu const& exec, matrix_view<V const> combine,
                                 matrix_view<V> dcombine) {
  exec.split(combine.rows(), 16, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      V mean = 0;
      for (std::int64_t l = 0; l < combine.cols(); ++l) mean += combine(t, l) * dcombine(t, l);
      for (std::int64_t l = 0; l < combine.cols(); ++l)
        dcombine(t, l) = combine(t, l) * (dcombine(t, l) - mean);
    }
  });
}

}  // namespace moe::inline MOE_ABI::detail
