// Weigh policies: how much each chosen expert counts.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <limits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>

namespace moe::inline MOE_ABI {

// All backward functions use the scores and the chosen ids alone, not chosen.weight: a caller may
// have changed the weights of a routing since (renormalised what was kept).

/// w[j] = s[expert[j]]: the score as it is (Switch, DeepSpeed top-1, OLMoE).
struct as_scored {
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    read_scores(scores, chosen);
  }

  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const&,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    chosen.each([&](int j) {
      if (chosen.expert[j] >= 0) dscores.add(chosen.expert[j], dchosen.weight[j]);
    });
  }
};

/// w[j] = s[j] / max(sum of the chosen s + added, floor), s[j] being the score of expert[j].
/// Source: Mixtral; the floor is that of Tutel and DeepSpeed (FLT_EPSILON). DeepSeek-V3 adds 1e-20 instead:
/// {.floor = 0, .added = 1e-20f}.
struct renormalised {
  float floor = std::numeric_limits<float>::epsilon();
  float added = 0;  ///< So that scores that have all underflowed to 0 are not divided by 0.
  /// With fewer choices than this (gate's k, not what was found) the weight stays the score: 2 for
  /// Tutel, which never normalises a single choice.
  int from_k = 1;

  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    read_scores(scores, chosen);
    if (chosen.k < from_k) return;
    auto total = sum(chosen) + added;
    if (total < floor) total = floor;
    divided_by const by_total(total);
    chosen.each([&](int j) { chosen.weight[j] = by_total(chosen.weight[j]); });
  }

  /// ds[j] = g[j] / D - sum of g s / D^2, the second term only where D is the sum and not the floor.
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    using V = typename R::value_type;
    if (chosen.k < from_k) return as_scored{}.backward(scores, chosen, dchosen, dscores);
    auto scored = chosen;
    read_scores(scores, scored);
    V const total = sum(scored) + added;
    divided_by<V> const by_divisor(total < floor ? V(floor) : total);
    V mean = 0;  // sum of g w
    if (total >= floor)
      chosen.each([&](int j) {
        if (chosen.expert[j] >= 0) mean += dchosen.weight[j] * by_divisor(scored.weight[j]);
      });
    chosen.each([&](int j) {
      if (chosen.expert[j] >= 0)
        dscores.add(chosen.expert[j], by_divisor(dchosen.weight[j] - mean));
    });
  }

 private:
  template <int MaxK, class V>
  MOE_HOST_DEVICE static constexpr V sum(choices<MaxK, V> const& chosen) {
    V total = 0;
    chosen.each([&](int j) { total += chosen.weight[j]; });
    return total;
  }
};

/// w = softmax over the scores of the chosen experts alone; finite scores of any size.
/// Source: gpt-oss, with identity scores. With softmax scores it is not the same as `renormalised`.
struct softmax_of_selected {
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    using V = typename R::value_type;
    read_scores(scores, chosen);
    V highest = no_score<V>;
    chosen.each([&](int j) {
      if (chosen.expert[j] >= 0 && chosen.weight[j] > highest) highest = chosen.weight[j];
    });
    V total = 0;
    chosen.each([&](int j) {
      chosen.weight[j] = chosen.expert[j] < 0 ? V(0) : V(moe::exp(chosen.weight[j] - highest));
      total += chosen.weight[j];
    });
    divided_by const by_total(total);  // weights without an expert: 0, of a total of 0, too
    chosen.each([&](int j) {
      if (chosen.expert[j] >= 0) chosen.weight[j] = by_total(chosen.weight[j]);
    });
  }

  /// ds[j] = w[j] (g[j] - sum of w g).
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    using V = typename R::value_type;
    auto weighed = chosen;
    (*this)(scores, weighed);
    V mean = 0;
    chosen.each([&](int j) {
      if (chosen.expert[j] >= 0) mean += weighed.weight[j] * dchosen.weight[j];
    });
    chosen.each([&](int j) {
      if (chosen.expert[j] >= 0)
        dscores.add(chosen.expert[j], weighed.weight[j] * (dchosen.weight[j] - mean));
    });
  }
};

/// w[j] = 1 / (1 + exp(-s[j])), for scores that are logits.
///
/// With `sigmoid` as the score experts would be selected by it, and of two logits above 17 the lower
/// one could win: both sigmoids are 1 in float.
/// Source: Llama 4.
struct sigmoid_of_selected {
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    using V = typename R::value_type;
    read_scores(scores, chosen);
    chosen.each([&](int j) {
      V const s = V(1) / (V(1) + moe::exp(-chosen.weight[j]));
      chosen.weight[j] = chosen.expert[j] < 0 ? V(0) : s;
    });
  }

  /// ds[j] = w[j] (1 - w[j]) g[j].
  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    using V = typename R::value_type;
    auto weighed = chosen;
    (*this)(scores, weighed);
    chosen.each([&](int j) {
      V const w = weighed.weight[j];
      if (chosen.expert[j] >= 0) dscores.add(chosen.expert[j], w * (V(1) - w) * dchosen.weight[j]);
    });
  }
};

/// w[j] = factor * the weight that Weigh gives (DeepSeek's routed_scaling_factor).
template <class Weigh>
struct scaled {
  float factor = 1;
  [[no_unique_address]] Weigh weigh{};

  template <score_row R, int MaxK>
    requires weigh_policy<Weigh, R, MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    weigh(scores, chosen);
    chosen.each([&](int j) { chosen.weight[j] *= factor; });
  }

  template <score_row R, int MaxK>
    requires weigh_policy<Weigh, R, MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    auto unscaled = chosen;
    weigh(scores, unscaled);
    auto dunscaled = dchosen;
    chosen.each([&](int j) { dunscaled.weight[j] *= factor; });
    weigh.backward(scores, unscaled, dunscaled, dscores);
  }
};

/// The weights that Weigh gives if experts [first, first + count) were not there: they count for nothing,
/// theirs is 0, and their scores get no gradient. Others are renormalised without them, say.
/// Source: MoE++, whose zero expert's gate is set to 0 before the gates are divided by their sum.
template <class Weigh>
struct without {
  std::int32_t first = 0;
  std::int32_t count = 0;
  [[no_unique_address]] Weigh weigh{};

  template <score_row R, int MaxK>
    requires weigh_policy<Weigh, R, MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const& scores,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    auto others = others_of(chosen);
    weigh(scores, others);
    chosen.each([&](int j) { chosen.weight[j] = others.weight[j]; });
  }

  template <score_row R, int MaxK>
    requires weigh_policy<Weigh, R, MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<MaxK, typename R::value_type> const& chosen,
                                          choices<MaxK, typename R::value_type> const& dchosen,
                                          R& dscores) const {
    weigh.backward(scores, others_of(chosen), dchosen, dscores);
  }

 private:
  template <int MaxK, class V>
  MOE_HOST_DEVICE constexpr choices<MaxK, V> others_of(choices<MaxK, V> const& chosen) const {
    auto others = chosen;
    chosen.each([&](int j) {
      bool const counts = chosen.expert[j] < first || chosen.expert[j] >= first + count;
      others.expert[j] = counts ? chosen.expert[j] : -1;
    });
    return others;
  }
};

/// w[j] = value, whatever the scores are: no gradient. For experts that were chosen without scores.
/// Source: Roller et al., "Hash layers for large sparse models", 2021.
struct constant_weight {
  float value = 1;

  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void operator()(R const&,
                                            choices<MaxK, typename R::value_type>& chosen) const {
    using V = typename R::value_type;
    chosen.each([&](int j) { chosen.weight[j] = chosen.expert[j] < 0 ? V(0) : V(value); });
  }

  template <score_row R, int MaxK>
  MOE_HOST_DEVICE constexpr void backward(R const&, choices<MaxK, typename R::value_type> const&,
                                          choices<MaxK, typename R::value_type> const&, R&) const {}
};

static_assert(weigh_policy<as_scored, array_row<float>, 1>);
static_assert(weigh_policy<renormalised, array_row<float>, 2>);
static_assert(weigh_policy<softmax_of_selected, array_row<double>, max_choices>);
static_assert(weigh_policy<sigmoid_of_selected, array_row<float>, 1>);
static_assert(weigh_policy<scaled<renormalised>, array_row<double>, 8>);
static_assert(weigh_policy<without<renormalised>, array_row<float>, 2>);
static_assert(weigh_policy<constant_weight, array_row<float>, 1>);

}  // namespace moe::inline MOE_ABI
