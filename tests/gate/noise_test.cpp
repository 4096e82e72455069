// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <support/laws.hpp>
#include <vector>

#include <moe/gate/gate.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

namespace {

/// Noise from a matrix [T,E], in the place of random numbers.
struct given_noise {
  float const* values = nullptr;
  int E = 1;
  float operator()(moe::token const& t, int e) const {
    return values == nullptr ? 0 : values[t.id * E + e];
  }
};

constexpr moe::token training{.id = 0, .training = true};

template <class P>
std::vector<int> selected(P const& p, std::vector<float> const& keys, moe::token const& t) {
  moe_test::owned_row<float> row(keys, moe_test::copies_of<P>(0));
  moe::choices<P::max_k> chosen;
  p(row.row(), chosen, t);
  return {chosen.expert, chosen.expert + chosen.k};
}

using ids = std::vector<int>;
constexpr float none = moe::no_score<float>;

}  // namespace

TEST_CASE("gate/noise: the sources keep the laws of noise sources") {
  moe_test::noise_source_laws(moe::uniform_noise<>{});
  moe_test::noise_source_laws(moe::gumbel_noise<>{});
  moe_test::noise_source_laws(moe::normal_noise<>{});
  moe_test::noise_source_laws(moe::uniform_noise<moe::stream::dispatch>{});
}

TEST_CASE("gate/noise: two streams draw different numbers") {
  int same = 0;
  for (int e = 0; e < 100; ++e)
    same += moe::uniform_noise<>{}(training, e) ==
            moe::uniform_noise<moe::stream::dispatch>{}(training, e);
  CHECK(same < 3);
}

TEST_CASE("gate/noise: moments of the sources") {
  constexpr int n = 20000;
  double uniform = 0, gumbel = 0, normal = 0, square = 0;
  for (int i = 0; i < n; ++i) {
    moe::token const t{.id = i / 16, .seed = 3};
    uniform += moe::uniform_noise<>{}(t, i % 16) / n;
    gumbel += moe::gumbel_noise<>{}(t, i % 16) / n;
    double const v = moe::normal_noise<>{}(t, i % 16);
    normal += v / n;
    square += v * v / n;
  }
  // Five standard deviations of each mean: 0.289, 1.28, 1 and 1.41 over the root of n.
  CHECK(std::abs(uniform - 0.5) < 0.0102);
  CHECK(std::abs(gumbel - 0.5772) < 0.0453);
  CHECK(std::abs(normal) < 0.0354);
  CHECK(std::abs(square - 1) < 0.05);
}

TEST_CASE("gate/noisy: keeps the laws of score policies, in training and outside") {
  moe_test::law_options options;
  moe_test::score_policy_laws(moe::noisy<moe::softmax>{.scale = 0.5f}, options);
  options.token.training = true;
  moe_test::score_policy_laws(moe::noisy<moe::softmax>{.scale = 0.5f}, options);
  moe_test::score_policy_laws(moe::noisy<moe::identity, moe::uniform_noise<>>{.over_E = true},
                              options);
}

TEST_CASE("gate/noisy: adds scale * noise to the logits in training only") {
  std::vector<float> const noise{1, -2, 4};
  std::vector<float> const logits{1, 2, none};
  moe::noisy<moe::identity, given_noise> p{.scale = 3, .noise = {noise.data(), 3}};
  CHECK(moe_test::law_score(p, logits, training) == std::vector<float>{4, -4, none});
  CHECK(moe_test::law_score(p, logits, {}) == logits);
  p.when = moe::random_when::always;
  CHECK(moe_test::law_score(p, logits, {}) == std::vector<float>{4, -4, none});
  p.over_E = true;
  CHECK(moe_test::law_score(p, logits, {}) == std::vector<float>{2, 0, none});
  p.when = moe::random_when::never;
  CHECK(moe_test::law_score(p, logits, training) == logits);
}

TEST_CASE("gate/sampled: keeps the laws of select policies") {
  moe_test::law_options options{.mean = 3, .sd = 0.5};
  for (bool const train : {false, true}) {
    options.token.training = train;
    moe_test::select_policy_laws(moe::sampled<moe::top_k<3>>{}, options);
    moe_test::select_policy_laws(moe::sampled<moe::top_k<3>>{.by = moe::odds::exp_key}, options);
    moe_test::select_policy_laws(moe::sampled_second<>{}, options);
    moe_test::select_policy_laws(moe::sampled<moe::visible<moe::top_k<2>>>{}, options);
  }
}

TEST_CASE("gate/sampled: log of probabilities or logits plus noise, in training only") {
  std::vector<float> const noise{0, 0.5f, 2, 9};
  std::vector<float> const probabilities{0.6f, 0.3f, 0.1f, none};
  moe::sampled<moe::top_k<4>, given_noise> p{.noise = {noise.data(), 4}};
  // log p + noise = -0.51, -0.70, -0.30
  CHECK(selected(p, probabilities, training) == ids{2, 0, 1, -1});
  CHECK(selected(p, probabilities, {}) == ids{0, 1, 2, -1});
  p.when = moe::random_when::always;
  CHECK(selected(p, probabilities, {}) == ids{2, 0, 1, -1});
  p.by = moe::odds::exp_key;  // 0.6, 0.8, 2.1
  CHECK(selected(p, probabilities, training) == ids{2, 1, 0, -1});
  p.when = moe::random_when::never;
  CHECK(selected(p, probabilities, training) == ids{0, 1, 2, -1});
}

TEST_CASE("gate/sampled: a probability that underflowed to 0 is still a candidate, the last one") {
  moe::sampled<moe::top_k<2>> const p{};
  for (int i = 0; i < 100; ++i)
    CHECK(selected(p, {0.0f, 1.0f}, {.id = i, .training = true}) == ids{1, 0});
}

TEST_CASE("gate/sampled: frequencies are the probabilities") {
  std::vector<float> const p{0.5f, 0.125f, 0.25f, 0.125f};
  constexpr int n = 20000;
  std::vector<int> first(4), second_after_0(4);
  int zeros = 0;
  for (int i = 0; i < n; ++i) {
    auto const e =
        selected(moe::sampled<moe::top_k<2>>{}, p, {.id = i, .seed = 5, .training = true});
    ++first[static_cast<std::size_t>(e[0])];
    if (e[0] == 0) ++zeros, ++second_after_0[static_cast<std::size_t>(e[1])];
  }
  for (std::size_t e = 0; e < 4; ++e) {
    CAPTURE(e);
    CHECK(std::abs(first[e] / double(n) - p[e]) < 5 * 0.5 / std::sqrt(n));
    if (e != 0)  // without replacement: p / (1 - p[0])
      CHECK(std::abs(second_after_0[e] / double(zeros) - 2 * p[e]) < 5 * 0.5 / std::sqrt(zeros));
  }
}

TEST_CASE("gate/sampled_second: the first choice is the best, the second is sampled") {
  std::vector<float> const noise{0, 9, 0, 3};
  std::vector<float> const logits{1, 4, 3, 1};
  moe::sampled_second<given_noise> p{.by = moe::odds::exp_key, .noise = {noise.data(), 4}};
  CHECK(selected(p, logits, training) == ids{1, 3});  // 3 + 0 < 1 + 3
  CHECK(selected(p, logits, {}) == ids{1, 2});
  p.when = moe::random_when::always;
  CHECK(selected(p, logits, {}) == ids{1, 3});
  CHECK(selected(p, {none, 4, none, none}, training) == ids{1, -1});
  p.when = moe::random_when::never;
  CHECK(selected(p, logits, training) == ids{1, 2});
}

TEST_CASE("gate/random_second: withdraws the second choice when 2 w <= u") {
  using inner = moe::gate<moe::identity, moe::top_k<2>, moe::renormalised>;
  std::vector<double> const scores{0.25, 0.75};
  std::vector<float> u{0.5f};
  moe::random_second<inner, given_noise> g{.noise = {u.data(), 1}};
  auto made = moe_test::law_gate(g, scores, training);
  CHECK(made.chosen.expert[0] == 1);
  CHECK(made.chosen.weight[0] == 0.75);  // as if the second were there
  CHECK(made.chosen.expert[1] == -1);
  CHECK(made.chosen.weight[1] == 0);
  u[0] = 0.4999f;
  made = moe_test::law_gate(g, scores, training);
  CHECK(made.chosen.expert[1] == 0);
  CHECK(made.chosen.weight[1] == 0.25);
  u[0] = 1;
  CHECK(moe_test::law_gate(g, scores, {}).chosen.expert[1] == 0);
  g.when = moe::random_when::always;
  CHECK(moe_test::law_gate(g, scores, {}).chosen.expert[1] == -1);
  g.when = moe::random_when::never;
  CHECK(moe_test::law_gate(g, scores, training).chosen.expert[1] == 0);
}

TEST_CASE("gate/random_second: laws and gradients, with a second choice withdrawn or not") {
  moe_test::law_options options;
  options.token.training = true;
  moe_test::token_gate_laws(
      moe::random_second<moe::gate<moe::softmax, moe::sampled_second<>, moe::renormalised>>{},
      options);
  using inner = moe::gate<moe::softmax, moe::sampled_second<>, moe::renormalised>;
  std::vector<float> const sure{1};
  moe_test::token_gate_laws(moe::random_second<inner, given_noise>{.noise = {sure.data(), 0}},
                            options);
  std::vector<float> const never{0};
  moe_test::token_gate_laws(moe::random_second<inner, given_noise>{.noise = {never.data(), 0}},
                            options);
}
