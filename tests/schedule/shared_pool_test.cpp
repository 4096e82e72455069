// SPDX-License-Identifier: MIT
#include <array>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/routing/expert_map.hpp>
#include <moe/schedule/accounting.hpp>
#include <moe/schedule/shared_pool.hpp>

#include "support/refusal.hpp"

namespace {

using moe_test::refusal;
using moe_test::says;

using moe::expert_schedule;

constexpr expert_schedule own = expert_schedule::every_nth(24, 2, 128);
constexpr expert_schedule one_pool = moe::share_experts(own, 0, 24);
static_assert(own.total_experts() == 12 * 128);
static_assert(one_pool.total_experts() == 128);
static_assert(one_pool.owner(23) == 1);
static_assert(one_pool.moe_layers() == 12);
static_assert(moe::share_experts_by(expert_schedule::every_nth(moe::max_layers, 1, 8), 16)
                  .total_experts() == moe::max_layers / 16 * 8);

}  // namespace

TEST_CASE("schedule/shared_pool: layers in a range share, the others keep their own") {
  expert_schedule const schedule = moe::share_experts(expert_schedule{4, 8, 0, 8, 8, 4}, 1, 4);
  CHECK(schedule.total_experts() == 4 + 8 + 8 + 4);
  CHECK(schedule.owner(0) == 0);
  CHECK(schedule.owner(1) == 1);
  CHECK(schedule.owner(2) == 2);
  CHECK(schedule.owner(3) == 1);
  CHECK(schedule.owner(4) == 4);
  CHECK(schedule.owns_experts(1));
  CHECK_FALSE(schedule.owns_experts(3));
  CHECK_FALSE(schedule.owns_experts(2));
}

TEST_CASE("schedule/shared_pool: a second pool does not join the first") {
  expert_schedule const first = moe::share_experts(expert_schedule{8, 8, 8, 8, 8}, 0, 2);
  expert_schedule const both = moe::share_experts(first, 2, 4);
  CHECK(both.total_experts() == 3 * 8);
  CHECK(both.owner(1) == 0);
  CHECK(both.owner(3) == 2);
  // Layer 1 leaves the first pool.
  CHECK(moe::share_experts(both, 1, 3).total_experts() == 4 * 8);
  CHECK(moe::share_experts(both, 1, 3).owner(2) == 1);
  CHECK(moe::share_experts(both, 2, 2) == both);
  // A layer that is alone in its pool may change its size.
  expert_schedule const alone = moe::share_experts(expert_schedule{8, 8}, 0, 1);
  CHECK(alone.with_layer(0, {.experts = 4, .pool = 1}).total_experts() == 4 + 8);
}

TEST_CASE("schedule/shared_pool: pools of n MoE layers") {
  expert_schedule const schedule = moe::share_experts_by(own.with_k(2).with_residual(), 5);
  CHECK(schedule.total_experts() == 3 * 128);
  CHECK(schedule.owner(9) == 1);  // MoE layers 1 3 5 7 9 | 11 13 15 17 19 | 21 23
  CHECK(schedule.owner(11) == 11);
  CHECK(schedule.owner(19) == 11);
  CHECK(schedule.owner(23) == 21);
  CHECK(schedule.k(23) == 2);
  CHECK(schedule.has_residual(23));
  CHECK(moe::share_experts_by(own, 12).total_experts() == one_pool.total_experts());
  CHECK(moe::share_experts_by(own, 1).total_experts() == own.total_experts());
  CHECK(moe::share_experts_by(one_pool, 1).total_experts() == own.total_experts());
  CHECK(moe::share_experts_by(expert_schedule::dense(4), 2) == expert_schedule::dense(4));
}

TEST_CASE("schedule/shared_pool: a pool is stored once, its routers by each layer") {
  moe::transformer_shape const shape{.M = 64, .vocabulary = 100, .positions = 10};
  auto const apart = total_parameters(shape, own);
  auto const pooled = total_parameters(shape, one_pool);
  CHECK(pooled.experts * 12 == apart.experts);
  CHECK(pooled.router == apart.router);
  CHECK(pooled.total() - pooled.experts == apart.total() - apart.experts);
  CHECK(active_parameters_per_token(shape, one_pool) == active_parameters_per_token(shape, own));
  CHECK(forward_flops_per_token(shape, one_pool, 10).total() ==
        forward_flops_per_token(shape, own, 10).total());
}

TEST_CASE("schedule/shared_pool: a layer sees the experts that it owns and the common ones") {
  std::array<std::int32_t, 5> const owner{3, 5, moe::every_layer, 3, 0};
  std::array<std::uint8_t, 5> visible{9, 9, 9, 9, 9};
  CHECK(moe::show_experts_of(3, owner, visible) == 3);
  CHECK(visible == std::array<std::uint8_t, 5>{1, 0, 1, 1, 0});
  CHECK(moe::show_experts_of(7, owner, visible) == 1);
  CHECK(visible == std::array<std::uint8_t, 5>{0, 0, 1, 0, 0});
  CHECK(moe::show_experts_of(0, owner, visible) == 2);
  moe::expert_map const map{.visible = visible.data()};
  CHECK(map.is_visible(4));
  CHECK_FALSE(map.is_visible(0));
  CHECK(moe::show_experts_of(0, std::vector<std::int32_t>{}, std::vector<std::uint8_t>{}) == 0);
}

TEST_CASE("schedule/shared_pool: broken rules are refused by name and value") {
  expert_schedule const uneven{4, 8, 8};
  says(refusal([&] { moe::share_experts(uneven, 0, 3); }),
       "layers of one pool have equal experts; got pool = 1, layer = 0, experts = 4, layer = 1, "
       "experts = 8");
  says(refusal([&] { moe::share_experts_by(uneven, 2); }), "layers of one pool");
  says(refusal([&] { moe::share_experts(uneven, 1, 3).with_layer(2, {.experts = 4, .pool = 1}); }),
       "layers of one pool");
  says(refusal([&] { moe::share_experts(uneven, -1, 2); }),
       "share_experts: 0 <= first <= last <= layers; got first = -1, last = 2, layers = 3");
  says(refusal([&] { moe::share_experts(uneven, 2, 1); }), "first = 2, last = 1");
  says(refusal([&] { moe::share_experts(uneven, 2, 4); }), "last = 4");
  says(refusal([&] { moe::share_experts_by(uneven, 0); }), "share_experts_by: n >= 1; got n = 0");
  std::vector<std::int32_t> const owner(3);
  std::vector<std::uint8_t> visible(2);
  says(refusal([&] { moe::show_experts_of(0, owner, visible); }), "owner = 3, visible = 2");
}
