// The bodies of the kernels that make losses of the sums of a gate.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/loss/detail/sum_kernels.hpp>

namespace moe::inline MOE_ABI {

/// The load-balancing loss of the sums of a gate and its gradient, in one block.
///
/// Warps share the columns of 32 experts, and where there are more warps, the chunks of a column:
/// partial sums are in double and added in their order.
template <int Threads>
struct gate_balance_kernel {
  static constexpr int threads = Threads;
  static constexpr int warps = Threads / warp_size;

  struct shared {
    double score[warps][warp_size];
    std::int64_t load[warps][warp_size];
    double loss[warps];
    std::int64_t left_out[warps];
  };

  /// @param sums     pairs and score; first unless all_choices.
  /// @param T        Tokens, those that do not count among them.
  /// @param scale    E / choices counted of each token.
  /// @param dloss    Gradient of the objective with respect to the loss.
  /// @param loss     One number out, or null.
  /// @param dscores  [E] out, or null.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, gate_sums sums, std::int64_t T, int E,
                                  bool all_choices, double scale, double dloss, double* loss,
                                  float* dscores) const {
    int const warp = b.thread() / warp_size, lane = b.thread() % warp_size;
    b.wait_for_previous();
    b.let_next_start();
    std::int64_t const row = E + 4;  // of sums.pairs
    std::int64_t out = 0;            // tokens that do not count
    for (std::int64_t c = b.thread(); c < sums.chunks; c += Threads) {
      std::int32_t const* const pairs = sums.pairs + c * row;
      out += pairs[E + 3] + (sums.scores_masked ? 0 : pairs[E + 2]);
    }
    out = detail::sum_of_warp(b, out);
    if (lane == 0) s.left_out[warp] = out;
    b.sync();
    std::int64_t tokens = T;
    for (int w = 0; w < warps; ++w) tokens -= s.left_out[w];
    double const square = static_cast<double>(tokens) * static_cast<double>(tokens);

    std::int32_t const* const choices = all_choices ? sums.pairs : sums.first;
    std::int64_t const choices_row = all_choices ? row : E;
    int const columns = (E + warp_size - 1) / warp_size;
    int const at_once = columns < warps ? columns : warps;
    int const parts = warps / at_once;  // warps of a column; warps left over have none
    int const part = warp / at_once;
    double total = 0;
    for (int begin = 0; begin < columns; begin += at_once) {
      int const e = (begin + warp % at_once) * warp_size + lane;
      double score = 0;
      std::int64_t load = 0;
      if (e < E && part < parts) {
        for (std::int64_t c = part; c < sums.chunks; c += parts) {
          score += static_cast<double>(sums.score[c * E + e]);
          load += choices[c * choices_row + e];
        }
      }
      s.score[warp][lane] = score;
      s.load[warp][lane] = load;
      b.sync();  // where warps share columns there is one round
      if (part == 0 && e < E) {
        for (int p = 1; p < parts; ++p) {
          score += s.score[p * at_once + warp][lane];
          load += s.load[p * at_once + warp][lane];
        }
        total += score * static_cast<double>(load);
        if (dscores != nullptr)
          dscores[e] = tokens == 0
                           ? 0.0f
                           : static_cast<float>(scale * dloss * static_cast<double>(load) / square);
      }
    }
    total = detail::sum_of_warp(b, total);
    if (lane == 0) s.loss[warp] = total;
    b.sync();
    if (b.thread() != 0 || loss == nullptr) return;
    double sum = 0;
    for (int w = 0; w < warps; ++w) sum += s.loss[w];
    *loss = tokens == 0 ? 0 : scale * sum / square;
  }
};

/// The z-loss of the sums of a gate, in one block of one warp.
struct gate_z_kernel {
  static constexpr int threads = warp_size;

  struct shared {};

  /// @param sums  z.
  /// @param loss  One number out.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, gate_sums sums, double* loss) const {
    b.wait_for_previous();
    b.let_next_start();
    double squares = 0, tokens = 0;
    for (std::int64_t c = b.thread(); c < sums.chunks; c += threads) {
      squares += sums.z[2 * c];
      tokens += sums.z[2 * c + 1];
    }
    squares = detail::sum_of_warp(b, squares);
    tokens = detail::sum_of_warp(b, tokens);
    if (b.thread() == 0) *loss = tokens == 0 ? 0 : squares / tokens;
  }
};

}  // namespace moe::inline MOE_ABI
