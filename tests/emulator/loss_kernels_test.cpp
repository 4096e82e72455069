#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <moe/core/scalar.hpp>
#include <moe/loss/importance.cuh>
#include <moe/loss/load_balance.cuh>
#include <moe/loss/z_loss.cuh>

#include "emulator/emulated_gpu.hpp"
#include "support/refusal.hpp"

using rule = moe::load_balance_rule;
using moe_test::emulated_gpu;
using moe_test::on_emulator;

namespace {

/// Scores and a routing with everything that is skipped: masked and invalid tokens, -inf, no expert.
struct problem {
  std::vector<float> scores, threshold;
  std::vector<std::uint8_t> live;
  moe::basic_routing_buffer<float> routing;

  problem(std::int64_t T, int K, int E, std::uint32_t seed)
      : scores(static_cast<std::size_t>(T * E)),
        threshold(static_cast<std::size_t>(T)),
        live(static_cast<std::size_t>(T)),
        routing(T, K, E) {
    std::mt19937 random(seed);
    auto const unit = [&] { return static_cast<float>(random() >> 8) * 0x1p-24f; };
    for (float& s : scores) s = unit() < 0.1f ? moe::no_score<float> : unit();
    for (float& x : threshold) x = unit() < 0.1f ? std::numeric_limits<float>::quiet_NaN() : unit();
    for (auto& l : live) l = unit() < 0.8f ? 1 : 0;
    for (std::int64_t i = 0; i < T * K; ++i)
      routing.expert[i] = static_cast<std::int32_t>(unit() * static_cast<float>(E + 2)) - 1;
    for (std::int64_t t = 0; t < T; ++t) {
      float* const row = scores.data() + t * E;
      if (t % 9 == 4) routing.expert[t * K] = moe::invalid_token;
      if (t % 9 == 4) row[E - 1] = std::numeric_limits<float>::quiet_NaN();
      if (t % 13 == 6)
        for (int e = 0; e < E; ++e) row[e] = moe::no_score<float>;
    }
    routing.tokens.live = live.data();
  }

  moe::matrix_view<float const> view() const { return {scores.data(), routing.T, routing.E}; }
};

/// Bytes without a spare one, so that the address sanitizer sees what is written past their end.
struct exact_bytes {
  explicit exact_bytes(std::size_t bytes) : data(bytes) {}
  operator moe::memory() { return {data.data(), data.size()}; }
  std::vector<std::byte> data;
};

struct shape {
  std::int64_t T;
  int K, E;
};
// One block and several, a part of a block, more experts than threads, no tokens, one expert.
constexpr shape shapes[] = {{32, 2, 8}, {70, 3, 100}, {5, 1, 1}, {0, 2, 4}, {33, 1, 64}};

doctest::Approx about(double x) {
  return doctest::Approx(x).epsilon(1e-12);
}

}  // namespace

TEST_CASE("loss/load_balance kernels: the loss and gradient of the CPU") {
  for (shape const& at : shapes)
    for (auto const choices : {rule::counted::first, rule::counted::all})
      for (auto const masked : {rule::masked_tokens::left_out, rule::masked_tokens::scored}) {
        std::int64_t const T = at.T;
        int const K = at.K, E = at.E;
        CAPTURE(T);
        rule const r{choices, masked};
        problem const p(T, K, E, 3);
        moe::buffer const room(moe::load_balance_scratch(T, E));
        double const expected = moe::load_balance({}, p.view(), p.routing, r, room);
        std::vector<float> gradient(static_cast<std::size_t>(E), -1);
        moe::load_balance_backward({}, p.routing, r, 0.3, room, gradient);
        CHECK((T == 0 || expected > 0));
        on_emulator([&](emulated_gpu const& exec) {
          exact_bytes scratch(moe::load_balance_scratch(exec, T, E));
          double loss = -1;
          moe::load_balance(exec, p.view(), p.routing, r, scratch, &loss);
          CHECK(loss == about(expected));
          std::vector<float> found(gradient.size(), -1);
          moe::load_balance_backward(exec, p.routing, r, 0.3, scratch, found);
          CHECK(found == gradient);
        });
      }
}

TEST_CASE("loss/load_balance kernels: tokens with their own numbers of choices") {
  problem p(40, 3, 6, 5);
  std::vector<std::int32_t> begin{0};
  for (int t = 0; t < 40; ++t) begin.push_back(begin.back() + (t * 5 % 4));
  p.routing.token_begin = begin.data();
  for (int i = 0; i < begin.back(); ++i) p.routing.expert[i] = i * 7 % 8 - 1;
  for (auto const choices : {rule::counted::first, rule::counted::all}) {
    rule const r{choices, rule::masked_tokens::left_out};
    moe::buffer const room(moe::load_balance_scratch(40, 6));
    double const expected = moe::load_balance({}, p.view(), p.routing, r, room);
    emulated_gpu const exec;
    exact_bytes scratch(moe::load_balance_scratch(exec, 40, 6));
    double loss = -1;
    moe::load_balance(exec, p.view(), p.routing, r, scratch, &loss);
    CHECK(loss == about(expected));
  }
}

TEST_CASE_TEMPLATE("loss/z_loss kernels: the loss and gradient of the CPU", L, float, moe::bf16) {
  for (shape const& at : shapes) {
    std::int64_t const T = at.T;
    int const K = at.K, E = at.E;
    CAPTURE(T);
    problem const p(T, K, E, 7);
    std::vector<L> logits;
    for (float const s : p.scores) logits.push_back(static_cast<L>(8 * s));
    moe::matrix_view<L const> const view(logits.data(), T, E);
    moe::buffer const room(moe::z_loss_scratch(T));
    double const expected = moe::z_loss(moe::cpu{}, view, p.routing.tokens, room);
    std::vector<float> gradient(p.scores.size(), 0.25f);
    moe::z_loss_backward<L const, float>(moe::cpu{}, view, p.routing.tokens, 0.3, room,
                                         {gradient.data(), T, E});
    on_emulator([&](emulated_gpu const& exec) {
      exact_bytes scratch(moe::z_loss_scratch(exec, T));
      double loss = -1;
      moe::z_loss(exec, view, p.routing.tokens, scratch, &loss);
      CHECK(loss == about(expected));
      std::vector<float> found(gradient.size(), 0.25f);
      moe::z_loss_backward<emulated_gpu, L const, float>(exec, view, p.routing.tokens, 0.3, scratch,
                                                         {found.data(), T, E});
      for (std::size_t i = 0; i < found.size(); ++i) {
        bool const same = found[i] == doctest::Approx(gradient[i]).epsilon(1e-6);
        CHECK(same);
      }
    });
  }
}

TEST_CASE("loss/importance kernels: the loss and gradient of the CPU") {
  for (shape const& at : shapes) {
    std::int64_t const T = at.T;
    int const K = at.K, E = at.E;
    CAPTURE(T);
    problem const p(T, K, E, 11);
    moe::batch const& tokens = p.routing.tokens;
    moe::buffer const room(moe::importance_and_load_scratch(T, E));
    double const expected =
        moe::importance_and_load(moe::cpu{}, p.view(), p.threshold, 1.5, tokens, room);
    std::vector<float> ds(p.scores.size(), 99), dbar(p.threshold.size(), 99);
    moe::importance_and_load_backward<float const, float>(
        moe::cpu{}, p.view(), p.threshold, 1.5, tokens, 0.3, room, {ds.data(), T, E}, dbar);
    on_emulator([&](emulated_gpu const& exec) {
      exact_bytes scratch(moe::importance_and_load_scratch(exec, T, E));
      double loss = -1;
      moe::importance_and_load(exec, p.view(), p.threshold, 1.5, tokens, scratch, &loss);
      CHECK(loss == about(expected));
      std::vector<float> found(ds.size(), 99), found_bar(dbar.size(), 99);
      moe::importance_and_load_backward<emulated_gpu, float const, float>(
          exec, p.view(), p.threshold, 1.5, tokens, 0.3, scratch, {found.data(), T, E}, found_bar);
      for (std::size_t i = 0; i < ds.size(); ++i) {
        bool const same = found[i] == doctest::Approx(ds[i]).epsilon(1e-5);
        CHECK(same);
      }
      for (std::size_t i = 0; i < dbar.size(); ++i) {
        bool const same = found_bar[i] == doctest::Approx(dbar[i]).epsilon(1e-5);
        CHECK(same);
      }
    });
  }
}

TEST_CASE("loss kernels: what is missing is refused") {
  emulated_gpu const exec;
  problem const p(4, 1, 3, 1);
  double loss = 0;
  exact_bytes scratch(moe::load_balance_scratch(exec, 4, 3)), little(8);
  using moe_test::refusal;
  CHECK(refusal([&] {
          moe::load_balance(exec, p.view(), p.routing, {}, scratch, nullptr);
        }).starts_with("load_balance: loss is given"));
  CHECK(refusal([&] {
          moe::load_balance(exec, p.view(), p.routing, {}, little, &loss);
        }).starts_with("load_balance: scratch >= load_balance_scratch(exec, T, E); got bytes"));
  CHECK(refusal([&] {
          moe::load_balance(exec, moe::matrix_view<float const>{}, p.routing, {}, scratch, &loss);
        }).starts_with("load_balance: scores is [T,E]"));
  CHECK(refusal([&] {
          moe::z_loss(exec, p.view(), {}, scratch, nullptr);
        }).starts_with("z_loss: loss is given"));
  CHECK(refusal([&] {
          moe::importance_and_load(exec, p.view(), p.threshold, 1.0, {}, scratch, nullptr);
        }).starts_with("importance_and_load: loss is given"));
}
