// The gates of DeepSpeed, Tutel, Switch and GShard from their formulas, slowly: plain loops in double
// that share nothing with the library.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace moe_test::reference {

enum class original {
  deepspeed_top1,
  deepspeed_top2,
  deepspeed_topk,
  tutel,
  switch_transformer,
  gshard
};
enum class full { position, given, score, batch_prioritised };

/// Noise is given, row-major [T,E] ([T] for withdraw); empty = none.
struct problem {
  original gate = original::deepspeed_top1;
  int T = 0, E = 1, K = 1;
  std::vector<double> logits;
  std::vector<char> live;         ///< [T]
  std::vector<double> selection;  ///< Added to the logits for selection (DeepSpeed).
  std::vector<double> noise;      ///< Added to the logits before anything else (Tutel).
  std::vector<double> withdraw;   ///< [T]: second choice goes unless 2 w2 > withdraw (GShard).
  std::vector<double> priority;   ///< Of full::given.
  double factor = 1;
  int min_capacity = 0;
  int alignment = 1;
  bool drop = true;       ///< DeepSpeed.
  bool normalise = true;  ///< Tutel.
  full when_full = full::position;
};

struct result {
  long C = 0;
  std::vector<int> wanted;     ///< [E]
  std::vector<int> expert;     ///< [T,K]: before dropping, -1 = none.
  std::vector<int> slot;       ///< [T,K]: -1 = no row.
  std::vector<double> weight;  ///< [T,K]: 0 without a row.
  double loss = 0;
  double margin =
      1e300;  ///< The least difference that decided anything, relative for probabilities.
};

namespace detail {

inline std::size_t at(int row, int col, int cols) {
  return static_cast<std::size_t>(row) * static_cast<std::size_t>(cols) +
         static_cast<std::size_t>(col);
}

inline long capacity(problem const& p, long max_load) {
  auto const up = [](long a, long b) { return (a + b - 1) / b; };
  switch (p.gate) {
    case original::deepspeed_top1:
    case original::deepspeed_top2:
    case original::deepspeed_topk: {
      if (!p.drop) return max_load;
      float const per_expert = static_cast<float>(static_cast<double>(p.T) / p.E);
      float const factor = static_cast<float>(p.factor * p.K);
      return std::max(static_cast<long>(std::ceil(per_expert * factor)),
                      static_cast<long>(p.min_capacity));
    }
    case original::tutel: {
      double const share = static_cast<double>(up(p.T, p.E));
      long C = max_load;
      if (p.factor > 0) C = p.K * static_cast<long>(p.factor * share);
      if (p.factor < 0) C = std::min(max_load, p.K * static_cast<long>(-p.factor * share));
      return up(C, p.alignment) * p.alignment;
    }
    case original::switch_transformer:
      return std::max(std::min(static_cast<long>(p.factor * p.T / p.E), static_cast<long>(p.T)),
                      static_cast<long>(p.min_capacity));
    case original::gshard:
      return static_cast<long>(std::ceil(p.factor * p.T)) * p.K / p.E;
  }
  return 0;
}

}  // namespace detail

inline result run(problem const& p) {
  using detail::at;
  int const T = p.T, E = p.E, K = p.K;
  double const none = -std::numeric_limits<double>::infinity();
  bool const deepspeed = p.gate == original::deepspeed_top1 || p.gate == original::deepspeed_top2 ||
                         p.gate == original::deepspeed_topk;
  bool const normalised_before =
      p.gate == original::gshard || (p.gate == original::tutel && K > 1 && p.normalise);
  bool const normalised_after = deepspeed && p.gate != original::deepspeed_top1;
  result r;
  auto const decide = [&](double won, double lost, double scale) {
    if (won > none && lost > none)
      r.margin = std::min(r.margin, std::abs(won - lost) / std::max(scale, 1e-300));
  };

  // Probabilities; a token with NaN or +inf takes no part.
  std::vector<double> probability(p.logits.size());
  std::vector<char> valid(static_cast<std::size_t>(T), 1);
  for (int t = 0; t < T; ++t) {
    double total = 0;
    for (int e = 0; e < E; ++e) {
      double l = p.logits[at(t, e, E)];
      if (std::isnan(l) || l == -none) valid[static_cast<std::size_t>(t)] = 0;
      if (!p.noise.empty()) l += p.noise[at(t, e, E)];
      total += probability[at(t, e, E)] = std::exp(l);
    }
    for (int e = 0; e < E; ++e)
      probability[at(t, e, E)] = total > 0 ? probability[at(t, e, E)] / total : 0;
  }

  // Choices and weights before dropping.
  r.expert.assign(at(T, 0, K), -1);
  r.weight.assign(at(T, 0, K), 0.0);
  for (int t = 0; t < T; ++t) {
    if (!valid[static_cast<std::size_t>(t)] || !p.live[static_cast<std::size_t>(t)]) continue;
    std::vector<char> taken(static_cast<std::size_t>(E), 0);
    for (int j = 0; j < K; ++j) {
      // DeepSpeed's top-2 adds noise for the second choice alone.
      bool const noisy = !p.selection.empty() && (p.gate == original::deepspeed_top1 || j == 1);
      double best = none, second = none;
      int winner = -1;
      for (int e = 0; e < E; ++e) {
        double const l = p.logits[at(t, e, E)];
        if (taken[static_cast<std::size_t>(e)] || l == none) continue;
        double const key = l + (noisy ? p.selection[at(t, e, E)] : 0) +
                           (p.noise.empty() ? 0 : p.noise[at(t, e, E)]);
        if (key > best) {
          second = best;
          best = key;
          winner = e;
        } else {
          second = std::max(second, key);
        }
      }
      if (winner < 0) break;
      decide(best, second, 1 + std::abs(best));
      taken[static_cast<std::size_t>(winner)] = 1;
      r.expert[at(t, j, K)] = winner;
      r.weight[at(t, j, K)] = probability[at(t, winner, E)];
    }
    if (normalised_before) {
      double total = 0;
      for (int j = 0; j < K; ++j) total += r.weight[at(t, j, K)];
      for (int j = 0; j < K; ++j) r.weight[at(t, j, K)] /= std::max(total, double{FLT_EPSILON});
    }
    if (!p.withdraw.empty() && r.expert[at(t, 1, K)] >= 0) {
      double const chance = 2 * r.weight[at(t, 1, K)],
                   draw = p.withdraw[static_cast<std::size_t>(t)];
      decide(chance, draw, 1);
      if (!(chance > draw)) {
        r.expert[at(t, 1, K)] = -1;
        r.weight[at(t, 1, K)] = 0;
      }
    }
  }

  // The loss, before dropping.
  {
    bool const all = p.gate == original::deepspeed_topk;
    bool const scores_masked = p.gate == original::deepspeed_top1;
    double tokens = 0;
    std::vector<double> me(static_cast<std::size_t>(E), 0.0), ce(me);
    for (int t = 0; t < T; ++t) {
      bool const live = p.live[static_cast<std::size_t>(t)] != 0;
      if ((!valid[static_cast<std::size_t>(t)] && live) || (!live && !scores_masked)) continue;
      tokens += 1;
      for (int e = 0; e < E && valid[static_cast<std::size_t>(t)]; ++e)
        me[static_cast<std::size_t>(e)] += probability[at(t, e, E)];
      for (int j = 0; j < (all ? K : 1); ++j)
        if (r.expert[at(t, j, K)] >= 0) ce[static_cast<std::size_t>(r.expert[at(t, j, K)])] += 1;
    }
    double sum = 0;
    for (std::size_t e = 0; e < me.size(); ++e)
      sum += tokens > 0 ? me[e] / tokens * (ce[e] / tokens) : 0;
    r.loss = sum * E / (all ? K : 1);
  }

  // Ranks inside each expert: DeepSpeed's top-k goes token by token, the others choice by choice.
  r.wanted.assign(static_cast<std::size_t>(E), 0);
  std::vector<std::vector<std::size_t>> queue(static_cast<std::size_t>(E));
  std::vector<int> token_order(static_cast<std::size_t>(T));
  for (int t = 0; t < T; ++t) token_order[static_cast<std::size_t>(t)] = t;
  if (p.when_full == full::batch_prioritised) {
    auto const best = [&](int t) {
      return *std::max_element(probability.begin() + t * E, probability.begin() + (t + 1) * E);
    };
    std::vector<int> routed;
    for (int t = 0; t < T; ++t)
      if (r.expert[at(t, 0, K)] >= 0) routed.push_back(t);
    token_order = routed;
    std::stable_sort(token_order.begin(), token_order.end(),
                     [&](int a, int b) { return best(a) > best(b); });
    for (std::size_t i = 1; i < token_order.size(); ++i)
      decide(best(token_order[i - 1]), best(token_order[i]), best(token_order[i]));
  }
  auto const enqueue = [&](int t, int j) {
    int const e = r.expert[at(t, j, K)];
    if (e < 0) return;
    ++r.wanted[static_cast<std::size_t>(e)];
    queue[static_cast<std::size_t>(e)].push_back(at(t, j, K));
  };
  if (p.gate == original::deepspeed_topk) {
    for (int t = 0; t < T; ++t)
      for (int j = 0; j < K; ++j) enqueue(t, j);
  } else {
    for (int j = 0; j < K; ++j)
      for (int t : token_order) enqueue(t, j);
  }

  // Which of them stay.
  r.C = detail::capacity(p, *std::max_element(r.wanted.begin(), r.wanted.end()));
  r.slot.assign(at(T, 0, K), -1);
  for (int e = 0; e < E; ++e) {
    auto kept = queue[static_cast<std::size_t>(e)];
    auto const C = static_cast<std::size_t>(r.C);
    if (kept.size() > C && (p.when_full == full::given || p.when_full == full::score)) {
      bool const by_score = p.when_full == full::score;
      auto const rank = [&](std::size_t pair) {
        std::size_t const i = pair / static_cast<std::size_t>(K) * static_cast<std::size_t>(E) +
                              static_cast<std::size_t>(e);
        return by_score ? probability[i] : p.priority[i];
      };
      auto sorted = kept;
      std::stable_sort(sorted.begin(), sorted.end(),
                       [&](std::size_t a, std::size_t b) { return rank(a) > rank(b); });
      if (by_score && C > 0) decide(rank(sorted[C - 1]), rank(sorted[C]), rank(sorted[C]));
      sorted.resize(C);
      kept.erase(std::remove_if(kept.begin(), kept.end(),
                                [&](std::size_t pair) {
                                  return std::find(sorted.begin(), sorted.end(), pair) ==
                                         sorted.end();
                                }),
                 kept.end());
    }
    for (std::size_t s = 0; s < std::min(kept.size(), C); ++s)
      r.slot[kept[s]] = static_cast<int>(s);
  }

  // Weights of what stayed.
  for (int t = 0; t < T; ++t) {
    double total = 0;
    for (int j = 0; j < K; ++j) {
      if (r.slot[at(t, j, K)] < 0) r.weight[at(t, j, K)] = 0;
      total += r.weight[at(t, j, K)];
    }
    if (normalised_after)
      for (int j = 0; j < K; ++j) r.weight[at(t, j, K)] /= std::max(total, double{FLT_EPSILON});
  }
  return r;
}

}  // namespace moe_test::reference
