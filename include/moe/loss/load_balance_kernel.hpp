// The bodies of the kernels of the load-balancing loss.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_kernels.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// Adds up, for 32 tokens a block, the score and the choices of each expert, and the tokens that count:
/// a row {score [E], load [E], tokens} of sums for each block. A thread has an expert, so that scores are
/// read by neighbours together and nothing is added by two threads.
/// Never run on a GPU yet.
template <int Threads>
struct load_sums_kernel {
  static constexpr int threads = Threads;
  struct shared {
    std::uint8_t counts[detail::tokens_per_block_sum];
    std::uint8_t chooses[detail::tokens_per_block_sum];
  };

  /// @param scores  [T,E] in, or absent: their sums are 0 then.
  template <thread_block B, class V>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<V const> scores,
                                  basic_routing<V> routed, load_balance_rule rule,
                                  double* sums) const {
    b.wait_for_previous();
    b.let_next_start();
    auto const tokens = detail::token_range::of(b, routed.T);
    bool const scored = rule.masked == load_balance_rule::masked_tokens::scored;
    for (int n = b.thread(); n < tokens.count; n += Threads) {
      std::int64_t const t = tokens.first + n;
      std::int64_t const i = routed.first_pair(t), end = routed.first_pair(t + 1);
      bool const valid = i >= end || routed.expert[i] != invalid_token;
      bool const live = routed.tokens.is_live(t);
      s.counts[n] = valid && (live || scored) ? 1 : 0;
      s.chooses[n] = valid && live ? 1 : 0;
    }
    b.sync();

    bool const one = rule.choices == load_balance_rule::counted::first;
    std::int64_t const E = routed.E;
    double* const own = sums + b.block() * (2 * E + 1);
    for (std::int64_t e = b.thread(); e < E; e += Threads) {
      double score = 0;
      std::int32_t load = 0;
      for (int n = 0; n < tokens.count; ++n) {
        std::int64_t const t = tokens.first + n;
        if (s.counts[n] != 0 && !scores.absent())
          score += static_cast<double>(detail::score_or_zero(scores(t, e)));
        if (s.chooses[n] == 0) continue;
        std::int64_t const i0 = routed.first_pair(t), i1 = routed.first_pair(t + 1);
        for (std::int64_t i = i0; i < (one && i0 < i1 ? i0 + 1 : i1); ++i)
          load += routed.expert[i] == e ? 1 : 0;
      }
      own[e] = score;
      own[E + e] = load;
    }
    if (b.thread() == 0) {
      int counted = 0;
      for (int n = 0; n < tokens.count; ++n) counted += s.counts[n];
      own[2 * E] = counted;
    }
  }
};

namespace detail {

/// The loss from {score [E], load [E], tokens}.
struct finish_load_balance {
  int E;
  double scale;
  double* loss;

  template <thread_block B, int Threads>
  MOE_HOST_DEVICE void operator()(B& b, double (&room)[Threads], double const* sums) const {
    double part = 0;
    for (int e = b.thread(); e < E; e += Threads) part += sums[e] * sums[E + e];
    double const total = sum_of_block(b, room, part), tokens = sums[2 * E];
    if (b.thread() == 0) *loss = tokens == 0 ? 0 : scale * total / (tokens * tokens);
  }
};

/// Its gradient with respect to the scores, the same for each token that counts.
template <class V>
struct finish_load_balance_backward {
  int E;
  double scale;
  V* dscores;  ///< [E]

  template <thread_block B, int Threads>
  MOE_HOST_DEVICE void operator()(B& b, double (&)[Threads], double const* sums) const {
    double const tokens = sums[2 * E];
    for (int e = b.thread(); e < E; e += Threads)
      dscores[e] = tokens == 0 ? V(0) : static_cast<V>(scale * sums[E + e] / (tokens * tokens));
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
