// The bodies of the kernels of the router z-loss.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_kernels.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// The log of the sum of exp(l [E]), in all lanes of a warp; -inf for a token that takes no part.
template <thread_block B, class T>
MOE_HOST_DEVICE double log_sum_exp_of_warp(B& b, T const* l, std::int64_t E) {
  int const lane = b.thread() % warp_size;
  double highest = no_score<double>;
  bool valid = true;
  for (std::int64_t e = lane; e < E; e += warp_size) {
    auto const x = static_cast<double>(l[e]);
    valid = valid && !is_invalid_logit(x);
    if (x > highest) highest = x;
  }
  if (b.ballot(all_lanes, !valid) != 0) return no_score<double>;
  highest = highest_of_warp(b, highest);
  if (!is_candidate(highest)) return no_score<double>;
  double part = 0;
  for (std::int64_t e = lane; e < E; e += warp_size)
    part += ::exp(static_cast<double>(l[e]) - highest);
  return highest + ::log(sum_of_warp(b, part));
}

}  // namespace detail

/// Adds up, for 32 tokens a block, the squared log-sum-exp and the tokens that take part: a row
/// {squares, tokens} of sums for each block. A warp has a token.
/// Never run on a GPU yet.
template <int Threads>
struct z_sums_kernel {
  static constexpr int threads = Threads;
  static constexpr int warps = Threads / warp_size;
  struct shared {
    double square[warps];
    int taking_part[warps];
  };

  template <thread_block B, class T>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<T> logits, batch tokens,
                                  double* sums) const {
    b.wait_for_previous();
    b.let_next_start();
    auto const range = detail::token_range::of(b, logits.rows());
    int const warp = b.thread() / warp_size;
    double square = 0;
    int taking_part = 0;
    for (int n = warp; n < range.count; n += warps) {
      std::int64_t const t = range.first + n;
      if (!tokens.is_live(t)) continue;
      double const z = detail::log_sum_exp_of_warp(b, logits.row(t), logits.cols());
      if (!is_candidate(z)) continue;
      square += z * z;
      ++taking_part;
    }
    if (b.thread() % warp_size == 0) {
      s.square[warp] = square;
      s.taking_part[warp] = taking_part;
    }
    b.sync();
    if (b.thread() != 0) return;
    double* const own = sums + 2 * std::int64_t{b.block()};
    own[0] = own[1] = 0;
    for (int w = 0; w < warps; ++w) {
      own[0] += s.square[w];
      own[1] += s.taking_part[w];
    }
  }
};

/// Adds 2 dloss / n * z * softmax(logits) to the gradient of each of the n tokens that take part, given
/// the sums of z_sums_kernel.
/// Never run on a GPU yet.
template <int Threads>
struct z_backward_kernel {
  static constexpr int threads = Threads;
  static constexpr int warps = Threads / warp_size;
  struct shared {
    double room[Threads];
  };

  /// @param rows  Of sums [rows,2].
  template <thread_block B, class T, class V>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<T> logits, batch tokens,
                                  double dloss, matrix_view<V> dlogits, std::int64_t rows,
                                  double const* sums) const {
    b.wait_for_previous();
    b.let_next_start();
    double part = 0;
    for (std::int64_t r = b.thread(); r < rows; r += Threads) part += sums[2 * r + 1];
    double const scale = 2 * dloss / detail::sum_of_block(b, s.room, part);
    auto const range = detail::token_range::of(b, logits.rows());
    std::int64_t const E = logits.cols();
    for (int n = b.thread() / warp_size; n < range.count; n += warps) {
      std::int64_t const t = range.first + n;
      if (!tokens.is_live(t)) continue;
      double const z = detail::log_sum_exp_of_warp(b, logits.row(t), E);
      if (!is_candidate(z)) continue;
      for (std::int64_t e = b.thread() % warp_size; e < E; e += warp_size) {
        auto const l = static_cast<double>(logits(t, e));
        dlogits(t, e) += static_cast<V>(scale * z * ::exp(l - z));
      }
    }
  }
};

namespace detail {

/// The loss from {squares, tokens}.
struct finish_z_loss {
  double* loss;

  template <thread_block B, int Threads>
  MOE_HOST_DEVICE void operator()(B& b, double (&)[Threads], double const* sums) const {
    if (b.thread() == 0) *loss = sums[1] == 0 ? 0 : sums[0] / sums[1];
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
