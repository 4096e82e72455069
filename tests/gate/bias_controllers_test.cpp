// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <numeric>
#include <string>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/collectives.hpp>
#include <moe/comm/threads.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/gate/bias_controllers.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/select.hpp>
#include <moe/routing/statistics.hpp>

namespace {

using moe_test::refusal;
using moe_test::says;
constexpr int E = 16, K = 4;

/// Sigmoids of logits that like the first experts much better. [T,E]
std::vector<float> skewed_scores(std::int64_t T, unsigned seed) {
  auto scores = moe_test::normals<float>(T * E, seed);
  for (std::size_t i = 0; i < scores.size(); ++i) {
    float const liking = 2.0f - 0.25f * static_cast<float>(i % E);
    scores[i] = 1 / (1 + std::exp(-scores[i] - liking));
  }
  return scores;
}

/// How many tokens take each expert: the top K of score + bias.
std::vector<std::int32_t> count(std::vector<float> const& scores, std::vector<float> const& bias) {
  std::vector<std::int32_t> counts(E);
  moe::biased<moe::top_k<K>> const select{{}, bias.data()};
  for (std::size_t t = 0; t < scores.size() / E; ++t) {
    float keys[E];
    std::copy_n(scores.begin() + static_cast<std::ptrdiff_t>(t * E), E, keys);
    moe::array_row<float> row(keys, E);
    moe::choices<K> chosen;
    select(row, chosen, {});
    for (int const e : chosen.expert) ++counts[static_cast<std::size_t>(e)];
  }
  return counts;
}

/// Greatest over mean load of experts [0, n) on tokens that no controller has seen.
double imbalance(std::vector<float> const& bias, int n = E) {
  auto counts = count(skewed_scores(20000, 999), bias);
  counts.resize(static_cast<std::size_t>(n));
  return moe::measure_load(moe::vector_view<std::int32_t const>(counts)).imbalance;
}

template <class Controller>
std::vector<float> balanced_by(Controller const& controller, int steps) {
  std::vector<float> bias(E);
  for (int step = 0; step < steps; ++step) {
    auto const counts = count(skewed_scores(256, static_cast<unsigned>(step)), bias);
    controller.update(moe::vector_view<std::int32_t const>(counts), bias);
  }
  return bias;
}

}  // namespace

TEST_CASE("gate/sign_controller: by hand") {
  std::vector<float> bias{0, 0, 0.5f};
  std::vector<std::int32_t> const counts{5, 1, 3};
  moe::sign_controller{}.update(moe::vector_view<std::int32_t const>(counts), bias);
  CHECK(bias == std::vector<float>{-1e-3f, 1e-3f, 0.5f});
  std::vector<std::int64_t> const thirds{1, 1, 2};  // a mean that is no integer
  moe::sign_controller{.rate = 1}.update(moe::vector_view<std::int64_t const>(thirds), bias);
  CHECK(bias == std::vector<float>{1 - 1e-3f, 1 + 1e-3f, -0.5f});
}

TEST_CASE("gate/sign_controller: brings the greatest load under 1.1 times the mean") {
  CHECK(imbalance(std::vector<float>(E)) > 2);
  CHECK(imbalance(balanced_by(moe::sign_controller{}, 20)) > 1.5);  // not at once
  CHECK(imbalance(balanced_by(moe::sign_controller{}, 1500)) < 1.1);
}

TEST_CASE("gate/proportional_controller: by hand") {
  std::vector<float> bias(3);
  std::vector<std::int32_t> const counts{6, 2, 4};
  moe::proportional_controller const c{.rate = 1, .computed = 2, .share = 2.0 / 3};
  c.update(moe::vector_view<std::int32_t const>(counts), bias);
  CHECK(bias[0] == doctest::Approx(-1.0 / 6));
  CHECK(bias[1] == doctest::Approx(1.0 / 6));
  CHECK(bias[2] == 0);
  std::vector<std::int32_t> const none(3);
  auto const before = bias;
  c.update(moe::vector_view<std::int32_t const>(none), bias);
  CHECK(bias == before);
}

TEST_CASE("gate/proportional_controller: brings the greatest load under 1.1 times the mean") {
  CHECK(imbalance(balanced_by(moe::proportional_controller{}, 400)) < 1.1);
}

TEST_CASE("gate/proportional_controller: computed experts share K_e of K choices alike") {
  int const N = 10;  // of 16; the others cost nothing
  auto const bias = balanced_by(moe::proportional_controller{.computed = N, .share = 0.75}, 600);
  for (std::size_t e = N; e < E; ++e) CHECK(bias[e] == 0);
  CHECK(imbalance(bias, N) < 1.1);
  auto const counts = count(skewed_scores(20000, 999), bias);
  double const computed = std::accumulate(counts.begin(), counts.begin() + N, 0.0);
  CHECK(computed / (20000.0 * K) == doctest::Approx(0.75).epsilon(0.02));
}

TEST_CASE("gate/quantile_controller: by hand") {
  std::vector<float> const scores{3, 0, 2, 1};
  std::vector<float> bias(2);
  moe::buffer const scratch(moe::quantile_controller::scratch_bytes({}, 2, 2));
  moe::quantile_controller{}.update(moe::cpu{}, moe::matrix_view<float const>(scores, 2, 2), {},
                                    scratch, bias);
  CHECK(bias == std::vector<float>{-1, 1});
  std::vector<float> half(2);
  moe::quantile_controller{.rate = 0.5f}.update(
      moe::cpu{}, moe::matrix_view<float const>(scores, 2, 2), {}, scratch, half);
  CHECK(half == std::vector<float>{-0.5f, 0.5f});
}

TEST_CASE("gate/quantile_controller: brings the greatest load under 1.1 times the mean") {
  std::int64_t const T = 4096;
  auto const scores = skewed_scores(T, 1);
  moe::cpu const exec;
  moe::buffer const scratch(moe::quantile_controller::scratch_bytes(exec, T, E));
  std::vector<float> bias(E);
  moe::quantile_controller const c{.k = K, .rounds = 20};
  c.update(exec, moe::matrix_view<float const>(scores, T, E), {}, scratch, bias);
  CHECK(imbalance(bias) < 1.1);
  auto const counts = count(scores, bias);
  CHECK(moe::measure_load(moe::vector_view<std::int32_t const>(counts)).imbalance < 1.02);

  for (int threads : {2, 5}) {
    moe::thread_team team(threads);
    moe::cpu const many(team);
    moe::buffer const room(moe::quantile_controller::scratch_bytes(many, T, E));
    std::vector<float> same(E);
    c.update(many, moe::matrix_view<float const>(scores, T, E), {}, room, same);
    CHECK(same == bias);
  }
}

TEST_CASE("gate/quantile_controller: follows batches, one round each") {
  moe::cpu const exec;
  moe::buffer const scratch(moe::quantile_controller::scratch_bytes(exec, 256, E));
  std::vector<float> bias(E);
  for (unsigned step = 0; step < 200; ++step)
    moe::quantile_controller{.k = K, .rate = 0.1f}.update(
        exec, moe::matrix_view<float const>(skewed_scores(256, step), 256, E), {}, scratch, bias);
  CHECK(imbalance(bias) < 1.1);
}

TEST_CASE("gate/quantile_controller: masked, invalid and hidden take no part") {
  std::int64_t const T = 200;
  auto scores = skewed_scores(T, 3);
  moe::cpu const exec;
  moe::buffer const scratch(moe::quantile_controller::scratch_bytes(exec, T + 50, E));
  moe::quantile_controller const c{.k = K, .rounds = 3};
  std::vector<float> bias(E), again(E);
  c.update(exec, moe::matrix_view<float const>(scores, T, E), {}, scratch, bias);
  std::vector<std::uint8_t> live(static_cast<std::size_t>(T), 1);
  for (int i = 0; i < 50; ++i) {  // 25 masked tokens and 25 invalid ones more
    live.push_back(i < 25 ? 0 : 1);
    for (int e = 0; e < E; ++e)
      scores.push_back(i < 25 ? 7.0f : -std::numeric_limits<float>::infinity());
  }
  c.update(exec, moe::matrix_view<float const>(scores, T + 50, E), {.live = live.data()}, scratch,
           again);
  CHECK(again == bias);

  // Tokens without a choice to make leave finite biases; an expert that nobody may take keeps its own.
  std::vector<float> few(static_cast<std::size_t>(T * E), -std::numeric_limits<float>::infinity());
  for (std::size_t t = 0; t < static_cast<std::size_t>(T); ++t) few[t * E] = few[t * E + 1] = 0.5f;
  std::vector<float> kept(E, 0.25f);
  c.update(exec, moe::matrix_view<float const>(few, T, E), {}, scratch, kept);
  CHECK(kept == std::vector<float>(E, 0.25f));
  c.update(exec, moe::matrix_view<float const>(few.data(), 0, E), {}, scratch, kept);
  CHECK(kept == std::vector<float>(E, 0.25f));
}

TEST_CASE("gate/bias_controllers: counts of all ranks move the same biases on each") {
  using namespace std::chrono_literals;
  int const R = 3;
  auto const scores = skewed_scores(300, 5);
  std::vector<float> bias(E), zeros(E);
  auto const all = count(scores, zeros);
  moe::sign_controller{}.update(moe::vector_view<std::int32_t const>(all), bias);
  std::vector<std::vector<float>> of_rank(R, std::vector<float>(E));
  std::vector<int> fine(R);
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    auto const own = static_cast<std::size_t>(r);
    auto counts =
        count({scores.begin() + r * 100 * E, scores.begin() + (r + 1) * 100 * E}, of_rank[own]);
    moe::buffer const scratch(moe::all_reduce_scratch<std::int32_t>(E, R));
    fine[own] = bool(
        moe::all_reduce(comm, moe::vector_view<std::int32_t>(counts), scratch, moe::within(20s)));
    moe::sign_controller{}.update(moe::vector_view<std::int32_t const>(counts), of_rank[own]);
  });
  for (std::size_t r = 0; r < R; ++r) {
    CHECK(fine[r]);
    CHECK(of_rank[r] == bias);
  }
}

TEST_CASE("gate/bias_controllers: bad input is refused") {
  std::vector<float> bias(3);
  std::vector<std::int32_t> const two(2), three(3);
  auto const view = [](std::vector<std::int32_t> const& of) {
    return moe::vector_view<std::int32_t const>(of);
  };
  says(refusal([&] { moe::sign_controller{}.update(view(two), bias); }),
       "sign_controller: counts and bias are [E], E >= 1; got counts = 2, bias = 3");
  says(refusal([&] { moe::proportional_controller{}.update(view(two), bias); }),
       "proportional_controller: counts and bias are [E]");
  says(refusal([&] { moe::proportional_controller{.computed = 4}.update(view(three), bias); }),
       "computed = 4, E = 3");
  says(refusal([&] { moe::proportional_controller{.share = 0}.update(view(three), bias); }),
       "share = 0");
  std::vector<float> const scores(6);
  moe::buffer const scratch(moe::quantile_controller::scratch_bytes({}, 2, 3));
  auto const text = [&](moe::quantile_controller const& c, moe::vector_view<float> to,
                        moe::memory room) {
    return refusal(
        [&] { c.update(moe::cpu{}, moe::matrix_view<float const>(scores, 2, 3), {}, room, to); });
  };
  CHECK(text({}, bias, scratch) == "nothing was thrown");
  says(text({.k = 0}, bias, scratch), "1 <= k <= E");
  says(text({.k = 4}, bias, scratch), "k = 4");
  says(text({.rounds = 0}, bias, scratch), "rounds = 0");
  says(text({.rate = 2}, bias, scratch), "rate = 2");
  says(text({}, {bias.data(), 2}, scratch), "bias = 2");
  says(text({}, bias, {scratch.data(), 4}), "scratch holds scratch_bytes");
}
