// Balancing without a loss: a bias for each expert, by which experts are selected but not weighed, is moved
// between steps until all have the same load.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

// The state of a controller is the bias [E] itself: the caller's, zeros at first, part of a checkpoint, and
// not a parameter: no gradient flows into it. Counts are the pairs that chose each expert, before any
// dropping (`routing_table::wanted`), of all ranks:
//
//     moe::all_reduce(comm, moe::vector_view(counts), scratch, moe::within(5s));
//     moe::sign_controller{}.update(counts, bias);

namespace detail {

template <class Count>
std::int64_t checked_total(char const* rule, vector_view<Count const> counts,
                           vector_view<float> bias, call_site site) {
  expects(counts.size() == bias.size() && !counts.empty(), rule, site,
          {{"counts", counts.size()}, {"bias", bias.size()}});
  std::int64_t total = 0;
  for (Count const count : counts) total += static_cast<std::int64_t>(count);
  return total;
}

}  // namespace detail

/// bias[e] += rate * sign(mean count - count[e]).
/// Source: Wang et al., "Auxiliary-loss-free load balancing", 2024; DeepSeek-V3, 2024.
/// Example: rate 0.001, counts 5, 1, 3: bias changes by -0.001, 0.001, 0.
struct sign_controller {
  float rate = 1e-3f;

  /// @param counts  [E] integers. @param bias  [E] in and out.
  /// @throws precondition_error unless both are [E], E >= 1.
  template <std::integral Count>
  void update(vector_view<Count const> counts, vector_view<float> bias,
              call_site site = call_site::here()) const {
    std::int64_t const total = detail::checked_total(
        "sign_controller: counts and bias are [E], E >= 1", counts, bias, site);
    for (std::int64_t e = 0; e < bias.size(); ++e) {
      std::int64_t const excess = static_cast<std::int64_t>(counts[e]) * bias.size() - total;
      bias[e] += rate * static_cast<float>((excess < 0) - (excess > 0));
    }
  }
};

/// bias[e] += rate * (wanted share - share of the choices that e has), for experts e < N that are computed;
/// the others, which cost nothing, keep theirs and take what is left.
///
/// The wanted share is share / N: of the K choices of a token, K_e = share * K are to be at computed
/// experts.
/// Source: LongCat-Flash, 2025. It lowers the rate in the course of training; rate is a guess here.
/// Example: rate 1, N = 2 of 3 experts, K = 3, K_e = 2, counts 6, 2, 4: the wanted share is 2/3 / 2 = 1/3,
/// and the bias changes by 1/3 - 6/12 = -1/6, 1/3 - 2/12 = 1/6, 0.
struct proportional_controller {
  float rate = 0.1f;
  int computed = 0;    ///< N: experts 0 .. N - 1 are computed; 0 = all.
  double share = 1.0;  ///< K_e / K.

  /// @param counts  [E] integers. @param bias  [E] in and out.
  /// @throws precondition_error unless both are [E], E >= 1, 0 <= computed <= E and 0 < share <= 1.
  template <std::integral Count>
  void update(vector_view<Count const> counts, vector_view<float> bias,
              call_site site = call_site::here()) const {
    std::int64_t const total = detail::checked_total(
        "proportional_controller: counts and bias are [E], E >= 1", counts, bias, site);
    expects(computed >= 0 && computed <= bias.size() && share > 0 && share <= 1,
            "proportional_controller: 0 <= computed <= E, 0 < share <= 1", site,
            {{"computed", computed}, {"E", bias.size()}, {"share", share}});
    if (total == 0) return;
    std::int64_t const N = computed == 0 ? bias.size() : computed;
    for (std::int64_t e = 0; e < N; ++e) {
      double const has = static_cast<double>(counts[e]) / static_cast<double>(total);
      bias[e] +=
          static_cast<float>(static_cast<double>(rate) * (share / static_cast<double>(N) - has));
    }
  }
};

/// Quantile balancing: reads scores, not counts, and balances the batch that it reads in a few rounds.
///
/// Most of what tokens like, sum of x s over assignments x in [0, 1] with k experts for each token and
/// C = T k / E tokens for each expert, is a linear program. Its dual has a price u for each token and a bias
/// for each expert; a round sets u to the k-th quantile of a token's s + bias, then bias so that C tokens
/// of each expert's column lie above their u. (Between the last that is in and the first that is out: in
/// the middle.)
/// Source: Kimi K3, as far as its description says: the alternation is theirs, the middle and `rate` are ours.
/// Example: k = 1, s = (3 0; 2 1), no bias: u = 1.5, 1.5; column 0 less u is 1.5, 0.5, and C = 1 wants one
/// above 0: its bias is -1; column 1 less u is -1.5, -0.5: its bias is 1. Now token 1 goes to expert 1.
struct quantile_controller {
  int k = 1;       ///< Experts of a token.
  int rounds = 1;  ///< Of one update.
  float rate =
      1;  ///< bias moves by this part of the way: less than 1 against the noise of batches.

  /// Bytes of scratch for update.
  template <std::floating_point V = float>
  static std::size_t scratch_bytes(cpu const& exec, std::int64_t T, std::int64_t E) noexcept {
    return memory_size().add<V>(T).template add<V>(exec.threads() * std::max(T, E)).bytes();
  }

  /// @param scores   [T,E] in, of all ranks' tokens (all_gather_rows); -inf = no candidate, as `route` gives
  ///                 them for invalid tokens.
  /// @param tokens   Masked tokens take no part.
  /// @param scratch  scratch_bytes<V>(exec, T, E).
  /// @param bias     [E] in and out. That of an expert which C tokens or more have to take stays as it is.
  /// @throws precondition_error unless scores is [T,E], bias is [E], 1 <= k <= E, rounds >= 1,
  ///         0 < rate <= 1; or if scratch is too small.
  /// @note  The same for any number of threads. Allocates nothing.
  /// @cost  O(T E) on average for each round.
  template <std::floating_point V>
  void update(cpu const& exec, matrix_view<V const> scores, batch const& tokens, memory scratch,
              vector_view<float> bias, call_site site = call_site::here()) const {
    std::int64_t const T = scores.rows(), E = scores.cols();
    expects(
        scores.ld() >= E && bias.size() == E && k >= 1 && k <= E && rounds >= 1 && rate > 0 &&
            rate <= 1,
        "quantile_controller: scores is [T,E], bias [E], 1 <= k <= E, rounds >= 1, 0 < rate <= 1",
        site,
        {{"T", T}, {"E", E}, {"bias", bias.size()}, {"k", k}, {"rounds", rounds}, {"rate", rate}});
    char const* const enough = "quantile_controller: scratch holds scratch_bytes<V>(exec, T, E)";
    V* const price = scratch.take<V>(T, enough, site);
    V* const rooms = scratch.take<V>(exec.threads() * std::max(T, E), enough, site);
    auto const room_of = [&](int member) { return rooms + member * std::max(T, E); };
    for (int round = 0; round < rounds; ++round) {
      exec.split(T, 32, [&](std::int64_t first, std::int64_t last, int member) {
        for (std::int64_t t = first; t < last; ++t) {
          V* const keys = room_of(member);
          std::int64_t n = 0;
          for (std::int64_t e = 0; e < E && tokens.is_live(t); ++e)
            if (is_candidate(scores(t, e))) keys[n++] = scores(t, e) + static_cast<V>(bias[e]);
          price[t] = n == 0 ? -no_score<V> : border(keys, n, k);
        }
      });
      std::int64_t live = 0;
      for (std::int64_t t = 0; t < T; ++t) live += price[t] < -no_score<V>;
      std::int64_t const C = (2 * live * k + E) / (2 * E);  // rounded to the nearest
      exec.each(E, [&](std::int64_t e, int member) {
        V* const keys = room_of(member);
        std::int64_t n = 0;
        for (std::int64_t t = 0; t < T; ++t)
          if (price[t] < -no_score<V> && is_candidate(scores(t, e)))
            keys[n++] = scores(t, e) - price[t];
        if (n == 0 || C == 0) return;
        V const wanted = border(keys, n, C);
        if (wanted > no_score<V> && wanted < -no_score<V>)
          bias[e] += rate * (static_cast<float>(-wanted) - bias[e]);
      });
    }
  }

 private:
  /// Between the c-th greatest of n keys and the next, in the middle; -inf if there are no more than c.
  template <class V>
  static V border(V* keys, std::int64_t n, std::int64_t c) {
    if (n <= c) return no_score<V>;
    std::nth_element(keys, keys + c - 1, keys + n, std::greater<>());
    V const next = *std::max_element(keys + c, keys + n);
    return next + (keys[c - 1] - next) / 2;
  }
};

}  // namespace moe::inline MOE_ABI
