// Losses in two steps: sums of several batches, added up, make the loss and the gradients of all tokens.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <moe/loss/importance.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/z_loss.hpp>
#include <moe/routing/routing.hpp>

#include "support/refusal.hpp"

namespace {

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

constexpr int K = 2;

/// Tokens of every kind: masked, invalid, with experts that are no candidates.
struct tokens_of_all {
  std::int64_t T;
  int E;
  std::vector<double> x, threshold;  // [T,E] logits or scores, [T]
  std::vector<std::uint8_t> live;    // [T]
  std::vector<std::int32_t> expert;  // [T,K]

  tokens_of_all(std::int64_t count, int experts, unsigned seed)
      : T(count), E(experts), x(at(T * E)), threshold(at(T)), live(at(T)), expert(at(T * K)) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<double> unit(0, 1);
    for (double& v : x)
      v = unit(random) < 0.1 ? -std::numeric_limits<double>::infinity() : unit(random);
    for (double& v : threshold) v = unit(random);
    for (auto& l : live) l = unit(random) < 0.8 ? 1 : 0;
    for (auto& e : expert) e = static_cast<std::int32_t>(unit(random) * (E + 1)) - 1;
    for (std::int64_t t = 0; t < T; ++t)
      if (unit(random) < 0.1) {
        x[at(t * E)] = threshold[at(t)] = std::nan("");
        for (int j = 0; j < K; ++j) expert[at(t * K + j)] = moe::invalid_token;
      }
  }
};

/// Tokens [first, first + T) of them, as one rank has them.
struct part {
  tokens_of_all& all;
  std::int64_t first, T;

  moe::matrix_view<double const> x() const { return {all.x.data() + first * all.E, T, all.E}; }
  moe::vector_view<double const> threshold() const { return {all.threshold.data() + first, T}; }
  moe::batch ids() const {
    moe::batch b;
    b.live = all.live.data() + first;
    return b;
  }
  moe::basic_routing<double> routed() const {
    moe::basic_routing<double> r;
    r.T = T;
    r.K = K;
    r.E = all.E;
    r.expert = all.expert.data() + first * K;
    r.tokens = ids();
    return r;
  }
};

std::vector<part> split(tokens_of_all& all) {
  std::int64_t const a = all.T / 3, b = all.T - all.T / 7;
  return {{all, 0, a}, {all, a, 0}, {all, a, b - a}, {all, b, all.T - b}};
}

/// The sums of all parts.
template <class Sum>
std::vector<double> add_up(std::vector<part> const& parts, std::int64_t size, Sum const& sum) {
  std::vector<double> total(at(size));
  for (part const& p : parts) {
    std::vector<double> own(at(size), 1e30);
    sum(p, moe::vector_view<double>(own));
    for (std::size_t i = 0; i < total.size(); ++i) total[i] += own[i];
  }
  return total;
}

moe::load_balance_rule const rules[] = {{},
                                        {.choices = moe::load_balance_rule::counted::all},
                                        {.masked = moe::load_balance_rule::masked_tokens::scored}};

bool close(double a, double b) {
  return std::abs(a - b) <= 1e-12 * (1 + std::abs(b));
}
bool close(std::vector<double> const& a, std::vector<double> const& b) {
  bool all = a.size() == b.size();
  for (std::size_t i = 0; all && i < a.size(); ++i) all = close(a[i], b[i]);
  return all;
}

}  // namespace

TEST_CASE("loss/loss_sums: load_balance of tokens in several places") {
  for (std::int64_t const T : {0, 1, 50, 700})
    for (int const E : {1, 3, 17})
      for (auto const& rule : rules) {
        tokens_of_all all(T, E, static_cast<unsigned>(T + E));
        part const whole{all, 0, T};
        moe::buffer const scratch(moe::load_balance_scratch(T, E));
        auto const sums =
            add_up(split(all), moe::load_balance_sums(E), [&](part const& p, auto own) {
              moe::sum_load_balance(moe::cpu{}, p.x(), p.routed(), rule, scratch, own);
            });
        double const expected =
            moe::load_balance(moe::cpu{}, whole.x(), whole.routed(), rule, scratch);
        CHECK(close(moe::load_balance(whole.routed(), rule, sums), expected));
        if (T == 700 && E > 1) CHECK(expected > 0.5);
        std::vector<double> d(at(E), 99), expected_d(at(E), -99);
        moe::load_balance_backward(moe::cpu{}, whole.routed(), rule, 0.3, scratch, expected_d);
        for (part const& p : split(all)) {  // the same for all tokens
          moe::load_balance_backward(p.routed(), rule, sums, 0.3, d);
          CHECK(close(d, expected_d));
        }
      }
}

TEST_CASE("loss/loss_sums: z_loss of tokens in several places") {
  for (std::int64_t const T : {0, 1, 50, 700})
    for (int const E : {1, 3, 17}) {
      tokens_of_all all(T, E, static_cast<unsigned>(T + E));
      part const whole{all, 0, T};
      moe::buffer const scratch(moe::z_loss_scratch(T));
      auto const sums = add_up(split(all), moe::z_loss_sums, [&](part const& p, auto own) {
        moe::sum_z_loss(moe::cpu{}, p.x(), p.ids(), scratch, own);
      });
      CHECK(close(moe::z_loss(sums), moe::z_loss(moe::cpu{}, whole.x(), whole.ids(), scratch)));
      std::vector<double> d(at(T * E), 0.5), expected(d);
      moe::z_loss_backward(moe::cpu{}, whole.x(), whole.ids(), 0.3, scratch, {expected, T, E});
      for (part const& p : split(all))
        moe::z_loss_backward(moe::cpu{}, p.x(), p.ids(), sums, 0.3,
                             {d.data() + p.first * E, p.T, E});
      CHECK(close(d, expected));
      if (T == 700) CHECK(d != std::vector<double>(d.size(), 0.5));
    }
}

TEST_CASE("loss/loss_sums: importance_and_load of tokens in several places") {
  for (std::int64_t const T : {0, 1, 50, 700})
    for (int const E : {1, 3, 17}) {
      tokens_of_all all(T, E, static_cast<unsigned>(T + E));
      part const whole{all, 0, T};
      moe::buffer const scratch(moe::importance_and_load_scratch(T, E));
      auto const sums =
          add_up(split(all), moe::importance_and_load_sums(E), [&](part const& p, auto own) {
            moe::sum_importance_and_load(moe::cpu{}, p.x(), p.threshold(), 1.5, p.ids(), scratch,
                                         own);
          });
      CHECK(close(moe::importance_and_load(sums),
                  moe::importance_and_load(moe::cpu{}, whole.x(), whole.threshold(), 1.5,
                                           whole.ids(), scratch)));
      std::vector<double> d(at(T * E), 99), expected(d), bar(at(T), 99), expected_bar(bar);
      moe::importance_and_load_backward(moe::cpu{}, whole.x(), whole.threshold(), 1.5, whole.ids(),
                                        0.3, scratch, {expected, T, E}, expected_bar);
      for (part const& p : split(all))
        moe::importance_and_load_backward(moe::cpu{}, p.x(), p.threshold(), 1.5, p.ids(), sums, 0.3,
                                          scratch, {d.data() + p.first * E, p.T, E},
                                          {bar.data() + p.first, p.T});
      CHECK(close(d, expected));
      CHECK(close(bar, expected_bar));
    }
}

TEST_CASE("loss/loss_sums: refuse sums of another size") {
  using moe_test::refusal;
  using moe_test::says;
  tokens_of_all all(5, 3, 1);
  part const whole{all, 0, 5};
  std::vector<double> six(6), seven(7), d(15), bar(5);
  moe::buffer const scratch(1 << 12);
  says(refusal([&] { moe::load_balance(whole.routed(), {}, six); }),
       "load_balance: sums is [2E + 1]; got size = 6, E = 3");
  says(refusal(
           [&] { moe::sum_load_balance(moe::cpu{}, whole.x(), whole.routed(), {}, scratch, six); }),
       "load_balance: sums is [2E + 1]");
  says(refusal([&] { moe::load_balance_backward(whole.routed(), {}, six, 1, {d.data(), 3}); }),
       "load_balance: sums is [2E + 1]");
  says(refusal([&] { moe::z_loss(six); }), "z_loss: sums is [2]; got size = 6");
  says(refusal([&] { moe::sum_z_loss(moe::cpu{}, whole.x(), whole.ids(), scratch, six); }),
       "z_loss: sums is [2]");
  says(
      refusal([&] { moe::z_loss_backward(moe::cpu{}, whole.x(), whole.ids(), six, 1, {d, 5, 3}); }),
      "z_loss: sums is [2]");
  says(refusal([&] { moe::importance_and_load(seven); }),
       "importance_and_load: sums is [2E], E >= 1; got size = 7, E = 3");
  says(refusal([&] { moe::importance_and_load(moe::vector_view<double const>{}); }),
       "got size = 0, E = 0");
  says(refusal([&] {
         moe::importance_and_load_backward(moe::cpu{}, whole.x(), whole.threshold(), 1, whole.ids(),
                                           seven, 1, scratch, {d, 5, 3}, bar);
       }),
       "importance_and_load: sums is [2E]");
}
