// Noise: sources of random numbers, and the policies and functions that use them.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/random.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/gate/row_copies.hpp>

namespace moe::inline MOE_ABI {

// Two policies of one gate that draw from the same stream draw the same numbers: give one of them
// another stream. A noise is not [[no_unique_address]]: nvcc 13.0 fails to lay out a gate of policies
// whose last bytes are shared so.

/// Uniform numbers strictly between 0 and 1.
template <stream From = stream::noise>
struct uniform_noise {
  template <class Token = token const&>
  MOE_HOST_DEVICE constexpr float operator()(Token&& t, int e) const noexcept {
    return uniform(t, From, static_cast<std::uint32_t>(e));
  }
};

/// Standard Gumbel numbers, -log(-log(u)).
template <stream From = stream::gumbel>
struct gumbel_noise {
  template <class Token = token const&>
  MOE_HOST_DEVICE float operator()(Token&& t, int e) const noexcept {
    return gumbel(t, From, static_cast<std::uint32_t>(e));
  }
};

/// Standard normal numbers.
template <stream From = stream::noise>
struct normal_noise {
  template <class Token = token const&>
  MOE_HOST_DEVICE float operator()(Token&& t, int e) const noexcept {
    return normal(t, From, static_cast<std::uint32_t>(e));
  }
};

static_assert(noise_source<uniform_noise<>> && noise_source<gumbel_noise<>> &&
              noise_source<normal_noise<>>);

/// When a policy uses its noise.
enum class random_when : std::uint8_t { never, in_training, always };

MOE_HOST_DEVICE constexpr bool is_random(random_when when, token const& t) noexcept {
  return when == random_when::always || (when == random_when::in_training && t.training);
}

/// Score(logits + scale * noise), unless told otherwise in training only: selection, weights and losses see the noise.
/// Source: Tutel's gate_noise is {.scale = gate_noise, .over_E = true}.
template <class Score, class Noise = normal_noise<>>
struct noisy {
  static constexpr int copies = row_copies<Score>;

  float scale = 1;
  bool over_E = false;  ///< Divide scale by the number of experts.
  random_when when = random_when::in_training;
  [[no_unique_address]] Score score{};
  Noise noise{};

  template <score_row R>
    requires score_policy<Score, R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const& t) const {
    using V = typename R::value_type;
    if (is_random(when, t)) {
      V const factor = over_E ? V(scale) / V(row.size()) : V(scale);
      drawing_token draws(t);
      row.transform(
          [&](int e, V l) { return is_candidate(l) ? l + factor * V(noise(draws, e)) : l; });
    }
    score(row, t);
  }

  /// The noise is a constant.
  template <score_row R>
    requires score_policy<Score, R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const& t) const {
    score.backward(scores, grad, t);
  }
};

/// What the chance of an expert to be sampled is proportional to.
enum class odds {
  key,     ///< The key itself: probabilities, as softmax and sigmoid make them.
  exp_key  ///< exp(key): logits, as identity leaves them.
};

namespace detail {

/// The least odds of a candidate. (A variable: nvcc lets no device code call numeric_limits.)
template <class V>
inline constexpr V least_odds = std::numeric_limits<V>::min();

/// key -> log(odds) + noise: the argmax is then a sample, the k highest one without replacement.
template <score_row R, class Noise>
MOE_HOST_DEVICE constexpr void perturb(R& keys, odds by, Noise const& noise, token const& t) {
  using V = typename R::value_type;
  // A probability that has underflowed to 0 stays a candidate, the last one to be drawn.
  constexpr V least = least_odds<V>;
  drawing_token draws(t);
  if (by == odds::key)
    keys.transform([&](int e, V p) {
      return is_candidate(p) ? V(std::log(p > least ? p : least)) + V(noise(draws, e)) : p;
    });
  else
    keys.transform([&](int e, V l) { return is_candidate(l) ? l + V(noise(draws, e)) : l; });
}

}  // namespace detail

/// Select by keys to which Gumbel noise is added: with top_k, k experts are
/// sampled without replacement. The weights come from the clean scores.
/// Source: Kool et al., "Stochastic beams and where to find them", 2019; DeepSpeed's RSample is
/// sampled<top_k<1>>.
template <class Select, class Noise = gumbel_noise<>>
struct sampled {
  static constexpr int max_k = Select::max_k;
  static constexpr int copies = row_copies<Select>;

  [[no_unique_address]] Select select{};
  odds by = odds::key;
  random_when when = random_when::in_training;
  Noise noise{};

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    if (is_random(when, t)) detail::perturb(keys, by, noise, t);
    select(keys, chosen, t);
  }
};

/// Two choices: the expert of the highest key, and one sampled from the others (without noise the
/// second highest). The weights come from the clean scores.
/// Source: DeepSpeed's top-2 gate, which samples in evaluation, too: {.when = random_when::always}.
template <class Noise = gumbel_noise<>>
struct sampled_second {
  static constexpr int max_k = 2;

  odds by = odds::key;
  random_when when = random_when::in_training;
  Noise noise{};

  MOE_HOST_DEVICE constexpr int k() const noexcept { return 2; }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<2, typename R::value_type>& chosen,
                                            token const& t) const {
    chosen.k = 2;
    chosen.expert[0] = keys.pop_max(0, keys.size()).expert;
    if (is_random(when, t)) detail::perturb(keys, by, noise, t);
    chosen.expert[1] = keys.pop_max(0, keys.size()).expert;
  }
};

/// A gate of two choices whose second is withdrawn at random: kept with
/// probability min(1, 2 w[1]). The first weight stays as it is; a withdrawn choice has
/// expert = -1 and weight 0, and takes no gradient, while w[0] still depends on both scores.
/// Source: Lepikhin et al., "GShard", 2020, algorithm 1 (random routing).
/// @note  One draw for each token: noise(token, 0).
template <class Gate, class Noise = uniform_noise<stream::dispatch>>
struct random_second {
  static_assert(Gate::max_k == 2);
  static constexpr int max_k = 2;
  static constexpr int copies = Gate::copies;

  [[no_unique_address]] Gate gate{};
  random_when when = random_when::in_training;
  Noise noise{};

  MOE_HOST_DEVICE constexpr int k() const noexcept { return gate.k(); }

  template <score_row R>
    requires token_gate<Gate, R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, choices<2, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    gate(row, chosen, t);
    if (chosen.k < 2 || !is_random(when, t)) return;
    if (V(2) * chosen.weight[1] <= V(noise(t, 0))) {
      chosen.expert[1] = -1;
      chosen.weight[1] = 0;
    }
  }

  template <score_row R>
    requires token_gate<Gate, R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<2, typename R::value_type> const& chosen,
                                          choices<2, typename R::value_type> const& dchosen,
                                          R& dscores, token const& t) const {
    // The withdrawn expert is not in `chosen`, but the first weight depends on its score.
    choices<2, typename R::value_type> both;
    R keys = scores.copy();
    gate.select(keys, both, t);
    gate.weigh(scores, both);
    auto dboth = dchosen;
    chosen.each([&](int j) {
      if (chosen.expert[j] < 0) dboth.weight[j] = 0;
    });
    gate.backward(scores, both, dboth, dscores, t);
  }
};

}  // namespace moe::inline MOE_ABI
