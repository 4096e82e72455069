// Score policies: what becomes of a token's logits before experts are selected.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>

namespace moe::inline MOE_ABI {

/// s[e] = exp(l[e]) / sum of exp(l) over the candidates: probabilities.
/// Source: Shazeer et al., "Outrageously large neural networks", 2017.
struct softmax {
  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const&) const {
    using V = typename R::value_type;
    V const highest = row.max(0, row.size());
    // Without a candidate, all of this leaves -inf: no branch, which lanes would have to part for.
    row.transform(
        [=](int, V l) { return where(is_candidate(l), moe::exp(l - highest), no_score<V>); });
    V const total = row.sum([](int, V s) { return where(is_candidate(s), s, V(0)); });
    divided_by<V> const by_total(total, true);             // 1 to E, or 0 without a candidate
    row.transform([=](int, V s) { return by_total(s); });  // -inf stays -inf
  }

  /// dl[e] = s[e] (g[e] - sum of s g).
  template <score_row R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const&) const {
    using V = typename R::value_type;
    V const mean =
        grad.sum(scores, [](int, V g, V s) { return where(is_candidate(s), s * g, V(0)); });
    grad.transform(scores,
                   [=](int, V g, V s) { return where(is_candidate(s), s * (g - mean), V(0)); });
  }
};

/// s[e] = 1 / (1 + exp(-l[e])): independent of the other experts.
struct sigmoid {
  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const&) const {
    using V = typename R::value_type;
    row.transform(
        [](int, V l) { return where(is_candidate(l), V(1) / (V(1) + moe::exp(-l)), no_score<V>); });
  }

  /// dl[e] = s[e] (1 - s[e]) g[e].
  template <score_row R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const&) const {
    using V = typename R::value_type;
    grad.transform(scores,
                   [](int, V g, V s) { return where(is_candidate(s), s * (V(1) - s) * g, V(0)); });
  }
};

/// s[e] = l[e].
struct identity {
  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R&, token const&) const {}

  template <score_row R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const&) const {
    using V = typename R::value_type;
    grad.transform(scores, [](int, V g, V s) { return where(is_candidate(s), g, V(0)); });
  }
};

/// s[e] = sqrt(log(1 + exp(l[e]))): independent of the other experts, and without an upper bound.
/// Source: DeepSeek-V4 (scoring_func "sqrtsoftplus").
struct sqrt_softplus {
  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const&) const {
    using V = typename R::value_type;
    // The root apart: a loop with it does not become vector code.
    row.transform([](int, V l) { return where(is_candidate(l), softplus(l), no_score<V>); });
    row.transform([](int, V s) { return is_candidate(s) ? std::sqrt(s) : s; });
  }

  /// dl[e] = (1 - exp(-s[e]^2)) / (2 s[e]) g[e]; 0 where the score has underflowed to 0.
  template <score_row R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const&) const {
    using V = typename R::value_type;
    grad.transform(scores,
                   [](int, V g, V s) { return s > 0 ? g * -std::expm1(-s * s) / (2 * s) : V(0); });
  }
};

static_assert(score_policy<softmax, array_row<float>> && score_policy<softmax, array_row<double>>);
static_assert(score_policy<sigmoid, array_row<float>> && score_policy<sigmoid, array_row<double>>);
static_assert(score_policy<identity, array_row<float>> &&
              score_policy<identity, array_row<double>>);
static_assert(score_policy<sqrt_softplus, array_row<float>> &&
              score_policy<sqrt_softplus, array_row<double>>);

}  // namespace moe::inline MOE_ABI
