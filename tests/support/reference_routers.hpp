// The routers of published models from their formulas, slowly: plain loops in double that share nothing
// with the library.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <vector>

namespace moe_test::reference {

/// One token's router. Empty vectors: without.
struct router {
  enum class scores { softmax, sigmoid, root_of_softplus, logits };
  enum class weights { scores, softmax_over_chosen, sigmoid_of_chosen };

  scores score = scores::softmax;
  std::vector<double> logit_bias{};      ///< [E]
  std::vector<double> selection_bias{};  ///< [E]
  int groups = 1, kept_groups = 1, best_of_group = 1;
  int k = 1;
  std::vector<int> given{};  ///< The experts, if nothing is selected.
  weights weight = weights::scores;
  int zero_expert = -1;
  bool divide = false;
  double added_to_sum = 0;
  double factor = 1;
};

struct choice {
  std::vector<int> expert;     ///< [k], -1: none
  std::vector<double> weight;  ///< [k]
  double margin = 1e300;       ///< The least difference that decided anything.
};

inline choice route(router const& r, std::vector<double> logits) {
  auto const E = logits.size();
  double const none = -std::numeric_limits<double>::infinity();
  for (std::size_t e = 0; e < r.logit_bias.size(); ++e) logits[e] += r.logit_bias[e];

  std::vector<double> score(E);
  double sum = 0;
  for (std::size_t e = 0; e < E; ++e) sum += std::exp(logits[e]);
  for (std::size_t e = 0; e < E; ++e) switch (r.score) {
      case router::scores::softmax:
        score[e] = std::exp(logits[e]) / sum;
        break;
      case router::scores::sigmoid:
        score[e] = 1 / (1 + std::exp(-logits[e]));
        break;
      case router::scores::root_of_softplus:
        score[e] = std::sqrt(std::log1p(std::exp(logits[e])));
        break;
      case router::scores::logits:
        score[e] = logits[e];
        break;
    }

  choice c;
  std::vector<double> key = score;
  for (std::size_t e = 0; e < r.selection_bias.size(); ++e) key[e] += r.selection_bias[e];
  for (std::size_t e = 0; e < E; ++e)
    if (logits[e] == none) key[e] = none;

  // The groups of highest key stay.
  auto const by_falling = [&](std::vector<double> const& of) {
    std::vector<std::size_t> order(of.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](std::size_t a, std::size_t b) { return of[a] > of[b]; });
    return order;
  };
  auto const decide = [&](double won, double lost) {
    if (won > none && lost > none) c.margin = std::min(c.margin, won - lost);
  };
  auto const size =
      (E + static_cast<std::size_t>(r.groups) - 1) / static_cast<std::size_t>(r.groups);
  std::vector<double> of_group;
  for (std::size_t first = 0; first < E; first += size) {
    std::vector<double> own(key.begin() + static_cast<long>(first),
                            key.begin() + static_cast<long>(std::min(first + size, E)));
    std::sort(own.begin(), own.end());
    double total = 0;
    for (int i = 0; i < r.best_of_group && !own.empty(); ++i, own.pop_back())
      if (i == 0 || own.back() > none) total += own.back();
    of_group.push_back(total);
  }
  auto const groups = by_falling(of_group);
  auto const kept = static_cast<std::size_t>(r.kept_groups);
  if (kept < groups.size()) {
    decide(of_group[groups[kept - 1]], of_group[groups[kept]]);
    for (std::size_t i = kept; i < groups.size(); ++i)
      for (std::size_t e = groups[i] * size; e < std::min((groups[i] + 1) * size, E); ++e)
        key[e] = none;
  }

  c.expert = r.given;
  if (c.expert.empty()) {
    auto const order = by_falling(key);
    for (std::size_t j = 0; j < static_cast<std::size_t>(r.k); ++j) {
      c.expert.push_back(key[order[j]] > none ? static_cast<int>(order[j]) : -1);
      if (j + 1 < E) decide(key[order[j]], key[order[j + 1]]);
    }
  }

  double total = 0, highest = none;
  for (int const e : c.expert)
    if (e >= 0) highest = std::max(highest, logits[static_cast<std::size_t>(e)]);
  for (int const e : c.expert) {
    double w = 0;
    if (e >= 0 && e != r.zero_expert) {
      double const l = logits[static_cast<std::size_t>(e)];
      if (r.weight == router::weights::scores) w = score[static_cast<std::size_t>(e)];
      if (r.weight == router::weights::softmax_over_chosen) w = std::exp(l - highest);
      if (r.weight == router::weights::sigmoid_of_chosen) w = 1 / (1 + std::exp(-l));
    }
    c.weight.push_back(w);
    total += w;
  }
  for (double& w : c.weight) {
    if (r.divide && total + r.added_to_sum > 0) w /= total + r.added_to_sum;
    w *= r.factor;
  }
  return c;
}

}  // namespace moe_test::reference
