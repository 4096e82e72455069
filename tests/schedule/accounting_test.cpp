// SPDX-License-Identifier: MIT
#include <array>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <string>
#include <vector>

#include <moe/schedule/accounting.hpp>
#include <moe/schedule/shared_pool.hpp>

#include "support/refusal.hpp"

namespace {

using moe_test::refusal;
using moe_test::says;

using moe::expert_schedule;
using moe::parameter_count;
using moe::recompute;
using moe::transformer_shape;

constexpr transformer_shape gpt_350m{.M = 1024, .vocabulary = 51'200, .positions = 2048};
constexpr transformer_shape gpt_1_3b{.M = 2048, .vocabulary = 51'200, .positions = 2048};

constexpr expert_schedule pr_moe(int layers, int base, int top) {
  return expert_schedule::pyramid({.layers = layers, .base = base, .top = top, .last = 2})
      .with_residual();
}

// Billions of parameters, rounded to so many decimals, times 10^decimals.
constexpr std::int64_t rounded(std::int64_t count, int decimals) {
  std::int64_t unit = 1'000'000'000;
  for (int i = 0; i < decimals; ++i) unit /= 10;
  return (count + unit / 2) / unit;
}
constexpr std::int64_t size_of(transformer_shape const& shape, expert_schedule const& schedule,
                               int decimals) {
  return rounded(total_parameters(shape, schedule).total(), decimals);
}

// The sizes of the DeepSpeed-MoE paper's models, which it prints as 13, 4, 3.5, 52, 31 and 27.
static_assert(size_of(gpt_350m, expert_schedule::every_nth(24, 2, 128), 2) == 13'15);
static_assert(size_of(gpt_350m, pr_moe(24, 32, 64), 2) == 4'12);
static_assert(size_of(gpt_350m, pr_moe(21, 32, 64), 2) == 3'54);
static_assert(size_of(gpt_1_3b, expert_schedule::every_nth(24, 2, 128), 1) == 52'5);
static_assert(size_of(gpt_1_3b, pr_moe(24, 64, 128), 1) == 31'4);
static_assert(size_of(gpt_1_3b, pr_moe(21, 64, 128), 2) == 26'95);
static_assert(size_of(gpt_350m, expert_schedule::dense(24), 2) == 36);
static_assert(size_of(gpt_1_3b, expert_schedule::dense(24), 1) == 1'3);

// All tensors of a model, one by one.
struct tensors {
  std::int64_t parameters = 0;
  std::int64_t active = 0;
  std::int64_t flops = 0;

  void matrix(std::int64_t rows, std::int64_t cols, bool stored, bool used) {
    if (stored) parameters += rows * cols;
    if (used) active += rows * cols;
    if (used) flops += 2 * rows * cols;
  }
  void vector(std::int64_t size, bool stored = true, bool used = true) {
    if (stored) parameters += size;
    if (used) active += size;
  }
  void ffn(transformer_shape const& s, std::int64_t H, bool stored, bool used) {
    for (int i = 0; i < (s.glu ? 2 : 1); ++i) {
      matrix(s.M, H, stored, used);
      if (s.biases) vector(H, stored, used);
    }
    matrix(H, s.M, stored, used);
    if (s.biases) vector(s.M, stored, used);
  }
  void norm(transformer_shape const& s) {
    vector(s.M);
    if (s.biases) vector(s.M);
  }
};

tensors enumerate(transformer_shape const& s, expert_schedule const& schedule, int context) {
  std::int64_t const A = s.attention_M;
  tensors all;
  for (int l = 0; l < schedule.layers(); ++l) {
    auto const& layer = schedule.layer(l);
    all.norm(s);
    for (int i = 0; i < 3; ++i) {
      all.matrix(s.M, A, true, true);
      if (s.biases) all.vector(A);
    }
    all.matrix(A, s.M, true, true);
    if (s.biases) all.vector(s.M);
    for (int key = 0; key < context; ++key) all.flops += 2 * A + 2 * A;
    all.norm(s);
    if (layer.experts == 0) all.ffn(s, s.H, true, true);
    if (layer.experts > 0) all.matrix(s.M, layer.experts, true, true);
    bool first = true;
    for (int other = 0; other < l; ++other) {
      first = first && (layer.pool == 0 || schedule.layer(other).pool != layer.pool);
    }
    for (int e = 0; e < layer.experts; ++e) all.ffn(s, s.expert_H, first, e < layer.k);
    if (layer.residual) all.ffn(s, s.residual_H, true, true);
  }
  all.norm(s);
  all.vector(std::int64_t{s.vocabulary} * s.M);
  all.vector(std::int64_t{s.positions} * s.M);
  if (!s.tied_head) all.vector(std::int64_t{s.vocabulary} * s.M);
  all.flops += 2 * std::int64_t{s.vocabulary} * s.M;
  return all;
}

}  // namespace

TEST_CASE("schedule/accounting: parts of 350M+PR-MoE-32/64 by hand") {
  constexpr parameter_count count = total_parameters(gpt_350m, pr_moe(24, 32, 64));
  constexpr std::int64_t h = 1024;
  constexpr std::int64_t one_ffn = 8 * h * h + 5 * h;
  CHECK(count.experts == (10 * 32 + 2 * 64) * one_ffn);
  CHECK(count.residual == 12 * one_ffn);
  CHECK(count.dense_ffn == 12 * one_ffn);
  CHECK(count.attention == 24 * (4 * h * h + 4 * h));
  CHECK(count.norms == 24 * 2 * 2 * h + 2 * h);
  CHECK(count.router == (10 * 32 + 2 * 64) * h);
  CHECK(count.embedding == (51'200 + 2048) * h);
  CHECK(count.ffn() == (448 + 24) * one_ffn + 448 * h);
  CHECK(count.total() == count.ffn() + count.attention + count.norms + count.embedding);
  CHECK(count.without_embedding() == count.total() - count.embedding);

  constexpr parameter_count active = active_parameters_per_token(gpt_350m, pr_moe(24, 32, 64));
  CHECK(active.experts == 12 * one_ffn);
  CHECK(active.total() == count.total() - (448 - 12) * one_ffn);
}

TEST_CASE(
    "schedule/accounting: published sizes of models without biases, with GLU and their attention") {
  // Mixtral-8x7B: 32 query heads, 8 key and value heads of 128.
  constexpr transformer_shape mixtral{.M = 4096,
                                      .H = 14'336,
                                      .vocabulary = 32'000,
                                      .tied_head = false,
                                      .glu = true,
                                      .biases = false,
                                      .attention_parameters = 2 * 4096 * 4096 + 2 * 4096 * 1024};
  constexpr auto eight = expert_schedule::every_nth(32, 1, 8).with_k(2);
  CHECK(total_parameters(mixtral, eight).total() == 46'702'792'704);
  CHECK(active_parameters_per_token(mixtral, eight).total() == 12'879'925'248);

  // DeepSeek-V3 without its selection biases (58 * 256) and its multi-token head: low-rank attention
  // with its two inner norms, 3 dense layers, one shared expert as the residual MLP.
  constexpr transformer_shape deepseek_v3{
      .M = 7168,
      .H = 18'432,
      .expert_H = 2048,
      .attention_M = 128 * 128,
      .vocabulary = 129'280,
      .tied_head = false,
      .glu = true,
      .biases = false,
      .attention_parameters = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * (512 + 64) + 512 +
                              512 * 128 * 256 + 128 * 128 * 7168};
  auto experts = expert_schedule::every_nth(61, 1, 256).with_k(8).with_residual();
  for (int l = 0; l < 3; ++l) experts = experts.with_layer(l, {});
  CHECK(total_parameters(deepseek_v3, experts).total() == 671'026'404'352);
  CHECK(rounded(active_parameters_per_token(deepseek_v3, experts).without_embedding() +
                    std::int64_t{7168} * 129'280,
                0) == 37);
}

TEST_CASE("schedule/accounting: counts equal those of all tensors one by one") {
  std::mt19937 random(20'220'114);
  auto const draw = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  for (int round = 0; round < 300; ++round) {
    transformer_shape const shape{.M = draw(1, 40),
                                  .H = draw(1, 40),
                                  .expert_H = draw(1, 40),
                                  .residual_H = draw(1, 40),
                                  .attention_M = draw(1, 40),
                                  .vocabulary = draw(0, 99),
                                  .positions = draw(0, 99),
                                  .tied_head = draw(0, 1) == 1,
                                  .glu = draw(0, 1) == 1,
                                  .biases = draw(0, 1) == 1};
    std::array<int, 3> const experts_of_pool{0, draw(1, 9), draw(1, 9)};
    std::vector<moe::layer_experts> layers(static_cast<std::size_t>(draw(0, 12)));
    for (auto& layer : layers) {
      layer = {};
      if (draw(0, 2) == 0) continue;
      layer.pool = draw(0, 2);
      layer.experts =
          layer.pool > 0 ? experts_of_pool[static_cast<std::size_t>(layer.pool)] : draw(1, 9);
      layer.k = draw(1, layer.experts);
      layer.residual = draw(0, 1) == 1;
    }
    expert_schedule const schedule(layers);
    int const context = draw(0, 20);
    tensors const expected = enumerate(shape, schedule, context);
    CAPTURE(round);
    REQUIRE(total_parameters(shape, schedule).total() == expected.parameters);
    REQUIRE(active_parameters_per_token(shape, schedule).total() == expected.active);
    REQUIRE(forward_flops_per_token(shape, schedule, context).total() == expected.flops);
  }
}

TEST_CASE("schedule/accounting: widths default to each other") {
  constexpr expert_schedule schedule = expert_schedule{0, 4}.with_residual();
  auto const count = [&](transformer_shape const& s) { return total_parameters(s, schedule); };
  CHECK(count({.M = 8}) ==
        count({.M = 8, .H = 32, .expert_H = 32, .residual_H = 32, .attention_M = 8}));
  CHECK(count({.M = 8, .H = 5}) == count({.M = 8, .H = 5, .expert_H = 5, .residual_H = 5}));
  CHECK(count({.M = 8, .expert_H = 3}) == count({.M = 8, .H = 32, .expert_H = 3, .residual_H = 3}));
  CHECK(count({.M = 8, .attention_parameters = 7}).attention == 2 * 7);
}

TEST_CASE(
    "schedule/accounting: an operation count is twice the weights, and three times in training") {
  constexpr auto schedule = pr_moe(24, 32, 64);
  constexpr auto flops = forward_flops_per_token(gpt_350m, schedule, 1024);
  constexpr std::int64_t h = 1024;
  CHECK(flops.attention_projections == 24 * 2 * 4 * h * h);
  CHECK(flops.attention_scores == 24 * 4 * 1024 * h);
  CHECK(flops.dense_ffn == 12 * 2 * 8 * h * h);
  CHECK(flops.residual == 12 * 2 * 8 * h * h);
  CHECK(flops.experts == 12 * 2 * 8 * h * h);
  CHECK(flops.router == 2 * 448 * h);
  CHECK(flops.head == 2 * 51'200 * h);
  CHECK(flops.ffn() == 36 * 16 * h * h + 2 * 448 * h);
  CHECK(training_flops_per_token(flops) == 3 * flops.total());
  CHECK(training_flops_per_token(flops, recompute::ffn) == 3 * flops.total() + 36 * 16 * h * h);
  CHECK(training_flops_per_token(flops, recompute::layer) == 4 * flops.total() - flops.head);
}

TEST_CASE("schedule/accounting: the activation rate follows the published formula") {
  // Width d, fixed expert of k D_e, all layers MoE, GLU, no biases; routers and norms are the rest.
  transformer_shape const shape{
      .M = 2048, .expert_H = 768, .residual_H = 4 * 768, .glu = true, .biases = false};
  auto const schedule = expert_schedule::every_nth(12, 1, 32).with_k(4).with_residual();
  double const b = (4 * 768 + 4 * 768) / 2048.0;
  double const m = (4 * 768 + 32 * 768) / 2048.0;
  CHECK(activation_rate(shape, schedule) ==
        doctest::Approx((4 + 3 * b) / (4 + 3 * m)).epsilon(1e-3));
  CHECK(activation_rate(shape, expert_schedule::dense(3)) == 1);
  CHECK(activation_rate(shape, expert_schedule::every_nth(3, 1, 8).with_k(8)) == 1);
  // One pool of 2 experts, used by 4 layers.
  CHECK(activation_rate(shape, moe::share_experts(expert_schedule{2, 2, 2, 2}, 0, 4)) > 1);
}

TEST_CASE("schedule/accounting: bytes of weights") {
  auto const count = total_parameters(gpt_1_3b, expert_schedule::every_nth(24, 2, 128));
  CHECK(weight_bytes(count, 2) == 2 * count.total());
  CHECK(weight_bytes(count, 16) == 16 * count.total());
  CHECK(weight_bytes(count, 0) == 0);
}

TEST_CASE("schedule/accounting: saved bytes by hand") {
  constexpr transformer_shape shape{
      .M = 10, .H = 40, .expert_H = 30, .residual_H = 20, .attention_M = 8};
  constexpr auto schedule = expert_schedule{0, 4}.with_k(2).with_residual();
  constexpr std::int64_t attention = 2 * 10 + 4 * 8;
  constexpr std::int64_t dense = attention + 2 * 10 + 2 * 40;
  constexpr std::int64_t mixture = attention + 2 * 10 + 2 * (2 * 10 + 2 * 30) + 2 * 20;
  CHECK(saved_bytes_per_token(shape, schedule, 1) == dense + mixture);
  CHECK(saved_bytes_per_token(shape, schedule, 2) == 2 * (dense + mixture));
  CHECK(saved_bytes_per_token(shape, schedule, 2, recompute::ffn) == 2 * 2 * (attention + 20));
  CHECK(saved_bytes_per_token(shape, schedule, 2, recompute::layer) == 2 * 2 * 10);

  transformer_shape with_glu = shape;
  with_glu.glu = true;
  CHECK(saved_bytes_per_token(with_glu, schedule, 1) == dense + mixture + 40 + 2 * 30 + 20);
}

TEST_CASE("schedule/accounting: no layers, no vocabulary") {
  parameter_count const count = moe::total_parameters({.M = 8}, {});
  CHECK(count.total() == 16);  // The norm at the end.
  CHECK(moe::forward_flops_per_token({.M = 8}, {}, 5).total() == 0);
  CHECK(moe::saved_bytes_per_token({.M = 8}, {}, 2) == 0);
}

TEST_CASE("schedule/accounting: broken rules are refused by name and value") {
  expert_schedule const schedule{0, 4};
  says(refusal([&] { total_parameters({}, schedule); }),
       "transformer_shape: M >= 1, no size negative; got M = 0, H = 0");
  says(refusal([&] { total_parameters({}, schedule); }), "accounting_test.cpp");
  says(refusal([&] { total_parameters({.M = 1, .H = -1}, schedule); }), "H = -1");
  says(refusal([&] { total_parameters({.M = 1, .expert_H = -1}, schedule); }), "expert_H = -1");
  says(refusal([&] { active_parameters_per_token({.M = 1, .residual_H = -1}, schedule); }),
       "residual_H = -1");
  says(refusal([&] { activation_rate({.M = 1, .attention_M = -1}, schedule); }),
       "attention_M = -1");
  says(refusal([&] { saved_bytes_per_token({.M = 1, .vocabulary = -1}, schedule, 2); }),
       "vocabulary = -1");
  says(refusal([&] { forward_flops_per_token({.M = 1, .positions = -1}, schedule, 1); }),
       "positions = -1");
  says(refusal([&] { total_parameters({.M = 1, .attention_parameters = -1}, schedule); }),
       "attention_parameters = -1");
  says(refusal([&] { forward_flops_per_token({.M = 8}, schedule, -1); }),
       "0 <= context_tokens, context_tokens * attention_M < 2^46; got context_tokens = -1");
  says(refusal([&] { moe::weight_bytes({}, 65); }), "bytes_per_parameter = 65");
  says(refusal([&] { moe::weight_bytes({}, -1); }), "bytes_per_parameter = -1");
  says(refusal([&] { saved_bytes_per_token({.M = 8}, schedule, 17); }), "bytes_per_element = 17");
}

TEST_CASE(
    "schedule/accounting: sizes that would overflow are refused, the largest others are not") {
  constexpr int most = 2'147'483'647;
  expert_schedule const schedule{0, 4};
  for (auto const& shape :
       {transformer_shape{.M = most}, transformer_shape{.M = 1 << 20, .expert_H = most},
        transformer_shape{.M = most, .H = 1, .attention_M = 1, .vocabulary = most},
        transformer_shape{.M = 1, .attention_parameters = INT64_MAX}}) {
    says(refusal([&] { total_parameters(shape, schedule); }), "fewer than 2^56 parameters");
  }
  says(refusal([&] { total_parameters({.M = 1 << 20}, expert_schedule{most}); }), "2^56");
  says(refusal([&] { forward_flops_per_token({.M = 1 << 20}, schedule, 1 << 30); }), "2^46");
  // A quadrillion parameters, with room for the bytes of training and for its operations.
  auto const huge = expert_schedule::every_nth(moe::max_layers, 1, 1024).with_k(16);
  transformer_shape const shape{.M = 1 << 14, .vocabulary = 1 << 20};
  auto const count = total_parameters(shape, huge);
  CHECK(count.experts == std::int64_t{moe::max_layers} * 1024 * (8LL * (1 << 28) + 5 * (1 << 14)));
  CHECK(weight_bytes(count, 64) == 64 * count.total());
  CHECK(training_flops_per_token(forward_flops_per_token(shape, huge, 1 << 30)) > 0);
  CHECK(saved_bytes_per_token(shape, huge, 16) > 0);
}
