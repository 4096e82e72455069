// The bodies of the kernels of the importance-and-load loss.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_kernels.hpp>
#include <moe/loss/importance.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Whether a token takes part: it is live, and its threshold is a number.
template <class V>
MOE_HOST_DEVICE bool has_threshold(batch const& tokens, vector_view<V const> threshold,
                                   std::int64_t t) {
  return tokens.is_live(t) && threshold[t] == threshold[t];
}

}  // namespace detail

/// Adds up, for 32 tokens a block, importance and load of each expert: a row {importance [E], load [E]} of
/// sums for each block. A thread has an expert.
/// Never run on a GPU yet.
template <int Threads>
struct importance_sums_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  /// @param width  Of the noise: gate_noise / E.
  template <thread_block B, class V>
  MOE_HOST_DEVICE void operator()(B& b, shared&, matrix_view<V const> scores,
                                  vector_view<V const> threshold, double width, batch tokens,
                                  double* sums) const {
    b.wait_for_previous();
    b.let_next_start();
    auto const range = detail::token_range::of(b, scores.rows());
    std::int64_t const E = scores.cols();
    double* const own = sums + b.block() * 2 * E;
    double const to_unit = 1 / (width * ::sqrt(2.0));
    for (std::int64_t e = b.thread(); e < E; e += Threads) {
      double importance = 0, load = 0;
      for (std::int64_t t = range.first; t < range.first + range.count; ++t) {
        V const s = scores(t, e);
        if (!detail::has_threshold(tokens, threshold, t) || !is_candidate(s)) continue;
        importance += static_cast<double>(s);
        load +=
            0.5 * ::erfc((static_cast<double>(threshold[t]) - static_cast<double>(s)) * to_unit);
      }
      own[e] = importance;
      own[E + e] = load;
    }
  }
};

/// The gradient of each token's scores and threshold, from the derivatives with respect to the sums. A warp
/// has a token.
/// Never run on a GPU yet.
template <int Threads>
struct importance_backward_kernel {
  static constexpr int threads = Threads;
  static constexpr int warps = Threads / warp_size;
  struct shared {};

  /// @param derivative  {d / d importance [E], d / d load [E]}
  template <thread_block B, class V>
  MOE_HOST_DEVICE void operator()(B& b, shared&, matrix_view<V const> scores,
                                  vector_view<V const> threshold, double width, batch tokens,
                                  matrix_view<V> dscores, vector_view<V> dthreshold,
                                  double const* derivative) const {
    b.wait_for_previous();
    b.let_next_start();
    auto const range = detail::token_range::of(b, scores.rows());
    std::int64_t const E = scores.cols();
    double const density = 1 / (width * ::sqrt(2 * 3.14159265358979323846));
    for (int n = b.thread() / warp_size; n < range.count; n += warps) {
      std::int64_t const t = range.first + n;
      bool const takes_part = detail::has_threshold(tokens, threshold, t);
      double const bar = static_cast<double>(threshold[t]);
      double dbar = 0;
      for (std::int64_t e = b.thread() % warp_size; e < E; e += warp_size) {
        V const s = scores(t, e);
        if (!takes_part || !is_candidate(s)) {
          dscores(t, e) = V(0);
          continue;
        }
        double const z = (static_cast<double>(s) - bar) / width;
        double const through_load = derivative[E + e] * density * ::exp(-0.5 * z * z);
        dscores(t, e) = static_cast<V>(derivative[e] + through_load);
        dbar -= through_load;
      }
      dbar = detail::sum_of_warp(b, dbar);
      if (b.thread() % warp_size == 0) dthreshold[t] = static_cast<V>(dbar);
    }
  }
};

namespace detail {

template <thread_block B, int Threads>
MOE_HOST_DEVICE variation variation_of_block(B& b, double (&room)[Threads], double const* x,
                                             int E) {
  variation v;
  v.E = E;
  double part = 0;
  for (int e = b.thread(); e < E; e += Threads) part += x[e];
  v.mean = sum_of_block(b, room, part) / E;
  part = 0;
  for (int e = b.thread(); e < E; e += Threads) part += (x[e] - v.mean) * (x[e] - v.mean);
  double const squares = sum_of_block(b, room, part);
  v.variance = E > 1 ? squares / (E - 1) : 0;
  return v;
}

/// The loss from {importance [E], load [E]}.
struct finish_importance {
  int E;
  double* loss;

  template <thread_block B, int Threads>
  MOE_HOST_DEVICE void operator()(B& b, double (&room)[Threads], double const* sums) const {
    double const importance = variation_of_block(b, room, sums, E).value();
    double const load = variation_of_block(b, room, sums + E, E).value();
    if (b.thread() == 0) *loss = 0.5 * (importance + load);
  }
};

/// Each sum becomes the gradient with respect to it.
struct finish_importance_backward {
  int E;
  double dloss;

  template <thread_block B, int Threads>
  MOE_HOST_DEVICE void operator()(B& b, double (&room)[Threads], double* sums) const {
    for (int part = 0; part < 2; ++part) {
      double* const x = sums + part * E;
      variation const v = variation_of_block(b, room, x, E);
      for (int e = b.thread(); e < E; e += Threads) x[e] = 0.5 * dloss * v.derivative(x[e]);
    }
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
