// The bodies of the kernels that measure what a router does.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/statistics.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// score_statistics before the division; trivial, as shared memory has to be.
struct score_sums {
  std::int64_t tokens, margins;
  double entropy, margin;
};

/// The sum of all lanes' v, in each of them; in an order of its own.
template <thread_block B, class T>
MOE_HOST_DEVICE inline T sum_lanes(B& b, T v) {
  MOE_UNROLL
  for (int bits = warp_size / 2; bits > 0; bits /= 2) v += b.shuffle_xor(all_lanes, v, bits);
  return v;
}

}  // namespace detail

/// As `physical_loads`: a thread for each expert.
template <int Threads>
struct physical_loads_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, routing_table table, std::int32_t* loads) const {
    int const p = b.block() * Threads + b.thread();
    b.wait_for_previous();
    b.let_next_start();
    if (p < table.P) loads[p] = detail::physical_load(table, p);
  }
};

/// As `measure_load`, but for the order of sums. One block.
template <int Threads>
struct measure_load_kernel {
  static constexpr int threads = Threads;
  static constexpr int warps = Threads / warp_size;

  struct shared {
    std::int64_t total[warps], least[warps], greatest[warps], idle[warps];
    double squares[warps], entropy[warps];
  };

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, std::int32_t const* loads, std::int64_t n,
                                  load_statistics* out) const {
    using detail::sum_lanes;
    int const lane = b.thread() % warp_size, warp = b.thread() / warp_size;
    b.wait_for_previous();
    b.let_next_start();

    std::int64_t total = 0, idle = 0, least = n > 0 ? loads[0] : 0, greatest = least;
    for (std::int64_t i = b.thread(); i < n; i += Threads) {
      std::int64_t const load = loads[i];
      total += load;
      idle += load == 0;
      least = load < least ? load : least;
      greatest = load > greatest ? load : greatest;
    }
    total = sum_lanes(b, total);
    idle = sum_lanes(b, idle);
    MOE_UNROLL
    for (int bits = warp_size / 2; bits > 0; bits /= 2) {
      std::int64_t const low = b.shuffle_xor(all_lanes, least, bits);
      std::int64_t const high = b.shuffle_xor(all_lanes, greatest, bits);
      least = low < least ? low : least;
      greatest = high > greatest ? high : greatest;
    }
    if (lane == 0) {
      s.total[warp] = total;
      s.idle[warp] = idle;
      s.least[warp] = least;
      s.greatest[warp] = greatest;
    }
    b.sync();
    load_statistics all{.least = s.least[0], .greatest = s.greatest[0]};
    for (int w = 0; w < warps; ++w) {
      all.total += s.total[w];
      all.idle += s.idle[w];
      all.least = s.least[w] < all.least ? s.least[w] : all.least;
      all.greatest = s.greatest[w] > all.greatest ? s.greatest[w] : all.greatest;
    }
    if (all.total == 0) {
      if (b.thread() == 0) *out = all;
      return;
    }

    auto const sum = static_cast<double>(all.total), count = static_cast<double>(n);
    double const mean = sum / count;
    double squares = 0, entropy = 0;
    for (std::int64_t i = b.thread(); i < n; i += Threads) {
      double const load = loads[i];
      squares += (load - mean) * (load - mean);
      if (load > 0) entropy -= load / sum * std::log(load / sum);
    }
    squares = sum_lanes(b, squares);
    entropy = sum_lanes(b, entropy);
    if (lane == 0) {
      s.squares[warp] = squares;
      s.entropy[warp] = entropy;
    }
    b.sync();
    if (b.thread() != 0) return;
    squares = 0;
    for (int w = 0; w < warps; ++w) {
      squares += s.squares[w];
      all.entropy += s.entropy[w];
    }
    all.imbalance = static_cast<double>(all.greatest) / mean;
    all.variation = std::sqrt(squares / count) / mean;
    *out = all;
  }
};

/// The sums of `measure_scores` for each chunk of tokens: a warp for a token at a time.
template <class V, int Threads>
struct measure_scores_kernel {
  static constexpr int threads = Threads;
  static constexpr int warps = Threads / warp_size;
  /// Of a block. A guess.
  static constexpr std::int64_t tokens = 32;

  struct shared {
    detail::score_sums part[warps];
  };

  /// @param part  [blocks] out; blocks = T / tokens, rounded up.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, basic_routing<V> in, matrix_view<V const> scores,
                                  detail::score_sums* part) const {
    int const warp = b.thread() / warp_size;
    std::int64_t const first = b.block() * tokens;
    std::int64_t const last = first + tokens < in.T ? first + tokens : in.T;
    b.wait_for_previous();
    b.let_next_start();
    detail::score_sums sum{};
    for (std::int64_t t = first + warp; t < last; t += warps) measure(b, in, scores.row(t), t, sum);
    if (b.thread() % warp_size == 0) s.part[warp] = sum;
    b.sync();
    if (b.thread() != 0) return;
    for (int w = 1; w < warps; ++w) detail::add_sums(sum, s.part[w]);
    part[b.block()] = sum;
  }

 private:
  /// add_score_statistics by the lanes of a warp, which all end with the same sums.
  template <class B>
  MOE_HOST_DEVICE static void measure(B& b, basic_routing<V> const& in, V const* score,
                                      std::int64_t t, detail::score_sums& sum) {
    int const lane = b.thread() % warp_size;
    detail::pair_range const pairs = detail::pairs_of(in, t);
    auto const n = static_cast<int>(pairs.last - pairs.first);
    if (!in.tokens.is_live(t) || n == 0 || in.expert[pairs.first] == invalid_token) return;
    std::int32_t chosen[max_choices];
    bool all_chosen = true;
    MOE_UNROLL
    for (int j = 0; j < max_choices; ++j) {
      chosen[j] = j < n ? in.expert[pairs.first + j] : no_candidate;
      if (j < n) all_chosen = all_chosen && chosen[j] >= 0 && chosen[j] < in.E;
    }

    double total = 0, weighted = 0;
    V best = no_score<V>;
    for (int e = lane; e < in.E; e += warp_size) {
      V const v = score[e];
      if (v > 0) {
        auto const x = static_cast<double>(v);
        total += x;
        weighted += x * std::log(x);
      }
      bool is_chosen = false;
      MOE_UNROLL
      for (int j = 0; j < max_choices; ++j) is_chosen = is_chosen || chosen[j] == e;
      if (v > best && !is_chosen) best = v;
    }
    total = detail::sum_lanes(b, total);
    weighted = detail::sum_lanes(b, weighted);
    MOE_UNROLL
    for (int bits = warp_size / 2; bits > 0; bits /= 2) {
      V const other = b.shuffle_xor(all_lanes, best, bits);
      best = other > best ? other : best;
    }
    if (total > 0 && total < -no_score<double>) {
      ++sum.tokens;
      sum.entropy += std::log(total) - weighted / total;
    }
    if (!all_chosen) return;
    V const least = score[in.expert[pairs.last - 1]];
    if (is_candidate(best) && is_candidate(least)) {
      ++sum.margins;
      sum.margin += static_cast<double>(least) - static_cast<double>(best);
    }
  }
};

/// From the sums of chunks to means, in one block: added up in the same order everywhere.
template <int Threads>
struct mean_scores_kernel {
  static constexpr int threads = Threads;

  struct shared {
    detail::score_sums part[Threads];
  };

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, detail::score_sums const* part,
                                  std::int64_t chunks, score_statistics* out) const {
    b.wait_for_previous();
    b.let_next_start();
    detail::score_sums sum{};
    for (std::int64_t c = b.thread(); c < chunks; c += Threads) detail::add_sums(sum, part[c]);
    s.part[b.thread()] = sum;
    for (int n = Threads / 2; n > 0; n /= 2) {
      b.sync();
      if (b.thread() < n) detail::add_sums(s.part[b.thread()], s.part[b.thread() + n]);
    }
    if (b.thread() != 0) return;
    sum = s.part[0];
    *out = detail::mean_of({.tokens = sum.tokens,
                            .entropy = sum.entropy,
                            .margins = sum.margins,
                            .margin = sum.margin});
  }
};

/// As `count_co_activation`: a thread for each pair, by integer atomics, of which any order gives the
/// same sums.
template <class V, int Threads>
struct count_co_activation_kernel {
  static constexpr int threads = Threads;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, basic_routing<V> in,
                                  matrix_view<std::int64_t> counts) const {
    std::int64_t const x = std::int64_t{b.block()} * Threads + b.thread();
    b.wait_for_previous();
    b.let_next_start();
    std::int64_t const t = x / in.K;
    if (t >= in.T) return;
    detail::pair_range const pairs = detail::pairs_of(in, t);
    std::int64_t const i = pairs.first + (x - t * in.K);
    if (i >= pairs.last || !in.tokens.is_live(t) || in.expert[pairs.first] == invalid_token) return;
    auto const is_id = [&](std::int32_t e) { return e >= 0 && e < in.E; };
    std::int32_t const a = in.expert[i];
    if (!is_id(a)) return;
    for (std::int64_t j = pairs.first; j < pairs.last; ++j) {
      std::int32_t const c = in.expert[j];
      if (is_id(c) && (a != c || i == j)) b.atomic_add(&counts(a, c), std::int64_t{1});
    }
  }
};

}  // namespace moe::inline MOE_ABI
