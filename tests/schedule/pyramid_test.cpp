// SPDX-License-Identifier: MIT
#include <array>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/schedule/pyramid.hpp>

#include "support/refusal.hpp"

namespace {

using moe_test::refusal;
using moe_test::says;

using moe::expert_schedule;
using moe::layer_experts;

template <expert_schedule Schedule>
struct model {
  std::array<float, static_cast<std::size_t>(Schedule.max_experts())> logits{};
};

template <expert_schedule Schedule>
int calls() {
  static int count = 0;
  return ++count;
}

constexpr expert_schedule pr_moe =
    expert_schedule::pyramid({.layers = 24, .base = 32, .top = 64, .last = 2}).with_residual();

static_assert(pr_moe.layers() == 24);
static_assert(pr_moe.moe_layers() == 12);
static_assert(pr_moe.max_experts() == 64);
static_assert(pr_moe.total_experts() == 10 * 32 + 2 * 64);
static_assert(!pr_moe.is_moe(0) && pr_moe.is_moe(1) && pr_moe.is_moe(23));
static_assert(pr_moe.experts(19) == 32 && pr_moe.experts(21) == 64 && pr_moe.experts(23) == 64);
static_assert(pr_moe.has_residual(1) && !pr_moe.has_residual(0));
static_assert(sizeof(model<pr_moe>::logits) == 64 * sizeof(float));
static_assert(expert_schedule{}.layers() == 0);

// Whether an expression is a constant one: broken schedules must not be.
template <class F, bool = (F{}(), true)>
constexpr bool is_constant(F) {
  return true;
}
constexpr bool is_constant(...) {
  return false;
}

static_assert(is_constant([] { return expert_schedule::every_nth(4, 2, 8).with_k(2); }));
static_assert(!is_constant([] { return expert_schedule::every_nth(4, 2, 8).with_k(9); }));
static_assert(!is_constant([] { return expert_schedule{0, -1}; }));
static_assert(is_constant([] { return expert_schedule::dense(moe::max_layers); }));
static_assert(!is_constant([] { return expert_schedule::dense(moe::max_layers + 1); }));
static_assert(is_constant([] { return expert_schedule{0, 2}.experts(1); }));
static_assert(!is_constant([] { return expert_schedule{0, 2}.experts(2); }));

}  // namespace

TEST_CASE("schedule/pyramid: an explicit list gives each layer its experts") {
  expert_schedule const schedule{0, 32, 0, 64, 8};
  CHECK(schedule.layers() == 5);
  CHECK(schedule.moe_layers() == 3);
  CHECK(schedule.max_experts() == 64);
  CHECK(schedule.total_experts() == 104);
  CHECK(schedule.layer(0) == layer_experts{.experts = 0, .k = 0});
  CHECK(schedule.layer(1) == layer_experts{.experts = 32, .k = 1});
  CHECK(schedule.k(0) == 0);
  CHECK(schedule.k(4) == 1);
  CHECK(schedule.owner(3) == 3);
  CHECK(schedule.owns_experts(3));
  CHECK_FALSE(schedule.owns_experts(2));
}

TEST_CASE("schedule/pyramid: run-time numbers make the same value as constants") {
  std::vector<int> experts;
  for (int l = 0; l < 24; ++l) experts.push_back(l % 2 == 0 ? 0 : l < 20 ? 32 : 64);
  CHECK(expert_schedule(experts).with_residual() == pr_moe);

  std::vector<layer_experts> layers;
  for (int const E : experts) layers.push_back({.experts = E, .k = 1, .residual = E > 0});
  CHECK(expert_schedule(layers) == pr_moe);
  layers[1].residual = false;
  CHECK_FALSE(expert_schedule(layers) == pr_moe);

  CHECK(expert_schedule(std::vector<int>{}) == expert_schedule{});
  std::vector<int> const most(moe::max_layers, 2);
  CHECK(expert_schedule(most).total_experts() == 2 * moe::max_layers);
}

TEST_CASE("schedule/pyramid: makers agree with lists") {
  CHECK(expert_schedule::dense(3) == expert_schedule{0, 0, 0});
  CHECK(expert_schedule::dense(0) == expert_schedule{});
  CHECK(expert_schedule::every_nth(7, 3, 8) == expert_schedule{0, 0, 8, 0, 0, 8, 0});
  CHECK(expert_schedule::every_nth(3, 1, 60) == expert_schedule{60, 60, 60});
  CHECK(expert_schedule::every_nth(3, 4, 60) == expert_schedule{0, 0, 0});
  CHECK(expert_schedule::pyramid({.layers = 5, .every = 2, .base = 4, .top = 8, .last = 1}) ==
        expert_schedule{0, 4, 0, 8, 0});
  CHECK(expert_schedule::pyramid({.layers = 2, .every = 1, .base = 4, .top = 8, .last = 2}) ==
        expert_schedule{8, 8});
  CHECK(expert_schedule::pyramid({.layers = 2, .every = 1, .base = 4, .top = 8, .last = 0}) ==
        expert_schedule{4, 4});
  // No experts below the top: first half dense, second half MoE.
  CHECK(expert_schedule::pyramid({.layers = 4, .every = 1, .base = 0, .top = 8, .last = 2}) ==
        expert_schedule{0, 0, 8, 8});
}

TEST_CASE("schedule/pyramid: k, residual and single layers change a copy") {
  expert_schedule const schedule = expert_schedule::every_nth(4, 2, 8);
  expert_schedule const changed =
      schedule.with_k(2).with_layer(0, {.experts = 4, .k = 3, .residual = true});
  CHECK(schedule == expert_schedule{0, 8, 0, 8});
  CHECK(changed.k(0) == 3);
  CHECK(changed.k(1) == 2);
  CHECK(changed.k(2) == 0);
  CHECK(changed.has_residual(0));
  CHECK_FALSE(changed.has_residual(1));
  CHECK(changed.with_residual().has_residual(3));
  CHECK_FALSE(changed.with_residual().has_residual(2));
  CHECK(changed.with_layer(0, {}) == schedule.with_k(2));
}

TEST_CASE("schedule/pyramid: equal schedules are one template argument") {
  CHECK(calls<expert_schedule{0, 4}>() == 1);
  CHECK(calls<expert_schedule::every_nth(2, 2, 4)>() == 2);
  CHECK(calls<expert_schedule{0, 4, 0}>() == 1);
}

TEST_CASE("schedule/pyramid: broken rules are refused by name and value") {
  std::vector<int> const too_many(moe::max_layers + 1, 0);
  says(refusal([&] { expert_schedule{too_many}; }),
       "expert_schedule: 0 <= layers <= max_layers; got layers = 257, max_layers = 256");
  says(refusal([&] { expert_schedule{too_many}; }), "pyramid_test.cpp");
  says(refusal([] { expert_schedule::dense(-1); }), "got layers = -1");
  says(refusal([] { expert_schedule(std::vector<int>{4, -2}); }),
       "expert_schedule: experts >= 0; got layer = 1, experts = -2");
  says(refusal([] { expert_schedule::every_nth(4, 2, 2).with_k(3); }),
       "1 <= k <= experts and k <= max_choices; got layer = 1, k = 3, experts = 2");
  says(refusal([] { expert_schedule{64}.with_k(moe::max_choices + 1); }), "k = 17");
  says(refusal([] { expert_schedule{64}.with_k(0); }), "k = 0");
  CHECK(expert_schedule{64}.with_k(moe::max_choices).k(0) == moe::max_choices);
  says(refusal([] { expert_schedule::every_nth(4, 0, 2); }), "every >= 1; got every = 0");
  says(refusal([] { expert_schedule::pyramid({.layers = 4, .base = 2, .top = 4, .last = 3}); }),
       "0 <= last <= MoE layers; got last = 3, MoE layers = 2");
  says(refusal([] { expert_schedule::pyramid({.layers = 4, .base = 2, .top = 4, .last = -1}); }),
       "last = -1");
  says(refusal([] { expert_schedule{1}.with_layer(0, {.experts = 0, .residual = true}); }),
       "neither a residual MLP nor a pool; got layer = 0, residual = 1");
  says(refusal([] { expert_schedule{1}.with_layer(0, {.experts = 0, .pool = 2}); }), "pool = 2");
  says(refusal([] { expert_schedule{1}.with_layer(0, {.experts = 1, .pool = -1}); }),
       "pool >= 0; got layer = 0, pool = -1");
  for (int const l : {-1, 2}) {
    expert_schedule const schedule{0, 4};
    std::string const rule =
        "0 <= layer < layers; got layer = " + std::to_string(l) + ", layers = 2";
    says(refusal([&] { schedule.layer(l); }), rule);
    says(refusal([&] { schedule.experts(l); }), rule);
    says(refusal([&] { schedule.k(l); }), rule);
    says(refusal([&] { schedule.is_moe(l); }), rule);
    says(refusal([&] { schedule.has_residual(l); }), rule);
    says(refusal([&] { schedule.owner(l); }), rule);
    says(refusal([&] { schedule.owns_experts(l); }), rule);
    says(refusal([&] { schedule.with_layer(l, {.experts = 2}); }), rule);
  }
}
