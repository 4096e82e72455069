// What DeepSpeed's and Tutel's own code computed on a CPU; see tests/data/README.md.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <support/preset_run.hpp>
#include <vector>

#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/dispatch.hpp>
#include <moe/gate/presets.hpp>

namespace {

using nlohmann::json;

json load(char const* name) {
  std::ifstream file(std::string(MOE_TEST_DATA "/") + name);
  REQUIRE(file.good());
  return json::parse(file);
}

std::vector<float> flat(json const& rows) {
  std::vector<float> values;
  for (auto const& row : rows)
    for (float v : row) values.push_back(v);
  return values;
}

moe::batch training(std::uint8_t const* live = nullptr) {
  return {.training = true, .live = live};
}

/// golden[name][j][t]
double at(json const& golden, char const* name, int j, std::int64_t t) {
  return golden[name][static_cast<std::size_t>(j)][static_cast<std::size_t>(t)].get<double>();
}

/// DeepSpeed's idx is -1 where a choice was dropped, and its gates are those after dropping.
template <class Run>
void compare(Run const& run, json const& golden) {
  CHECK(run.table.counts->capacity == golden["C"].get<int>());
  for (int e = 0; e < run.E; ++e)
    CHECK(run.table.wanted[e] == golden["cnt"][static_cast<std::size_t>(e)].get<int>());
  CHECK(std::abs(run.loss - golden["l_aux"].get<double>()) < 5e-7);
  REQUIRE(golden["idx"].size() == static_cast<std::size_t>(run.K));
  for (int j = 0; j < run.K; ++j)
    for (std::int64_t t = 0; t < run.T; ++t) {
      CAPTURE(t);
      CAPTURE(j);
      double const idx = at(golden, "idx", j, t);
      CHECK((run.slot(t, j) < 0 ? -1 : run.expert(t, j)) == idx);
      if (idx >= 0) CHECK(run.slot(t, j) == at(golden, "loc", j, t));
      CHECK(std::abs(run.weights[run.pair(t, j)] - at(golden, "gate", j, t)) < 1e-6);
    }
}

}  // namespace

TEST_CASE("gate/presets: golden cases of DeepSpeed") {
  json const data = load("deepspeed_golden.json");
  json const& cases = data["cases"];
  std::vector<float> const logits = flat(data["logits"]), U = flat(data["U"]), G = flat(data["G"]);
  moe_test::given_noise const uniform{U.data(), 4}, gumbel{G.data(), 4};
  using moe_test::preset_run;
  int compared = 0;
  auto const check = [&](char const* name, auto const& run) {
    CAPTURE(name);
    REQUIRE(cases.contains(name));
    compare(run, cases[name]);
    ++compared;
  };

  check("top1 cf=1 min=0 RTS(U)",
        preset_run(moe::deepspeed_top1({.min_capacity = 0}).with_overflow(uniform), logits, 4,
                   training()));
  std::uint8_t const used[] = {1, 1, 0, 1, 1, 1, 1, 1};
  check(
      "top1 cf=1.25 min=0 RTS(U) used=s!=2",
      preset_run(
          moe::deepspeed_top1({.capacity_factor = 1.25, .min_capacity = 0}).with_overflow(uniform),
          logits, 4, training(used)));
  check("top1 RSample(G) cf=1 RTS(U)",
        preset_run(moe::deepspeed_top1(
                       {.min_capacity = 0, .noisy_gate_policy = moe::noisy_gate::rsample}, gumbel)
                       .with_overflow(uniform),
                   logits, 4, training()));
  check("top1 nodrop",
        preset_run(moe::deepspeed_top1({.drop_tokens = false}), logits, 4, training()));
  check("top2 cf=1 nosample",
        preset_run(moe::deepspeed_top2({.min_capacity = 0, .top2_2nd_expert_sampling = false}),
                   logits, 4, training()));
  check("top2 cf=.5 gumbel(G)",
        preset_run(moe::deepspeed_top2({.capacity_factor = 0.5, .min_capacity = 0}, gumbel), logits,
                   4, training()));
  check("topk3 cf=.5 probs",
        preset_run(moe::deepspeed_topk({.capacity_factor = 0.5, .min_capacity = 0}), logits, 4,
                   training()));
  check("topk3 cf=.5 position",
        preset_run(moe::deepspeed_topk({.capacity_factor = 0.5,
                                        .min_capacity = 0,
                                        .drop_policy = moe::overflow::position}),
                   logits, 4, training()));
  check("topk3 nodrop",
        preset_run(moe::deepspeed_topk({.drop_tokens = false}), logits, 4, training()));
  CHECK(compared == 9);
  CHECK(cases.size() == 9);
}

TEST_CASE("gate/presets: golden cases of Tutel, from logits to outputs and back") {
  json const data = load("tutel_golden.json");
  std::int64_t const T = data["S"];
  int const E = data["E"], D = data["D"];
  auto const get = [&](json const& from, char const* name) {
    return from[name].get<std::vector<float>>();
  };
  auto const logits = get(data, "logits"), x = get(data, "x"), dy = get(data, "dy"),
             expert_scale = get(data, "expert_scale");
  moe::cpu const exec;
  int compared = 0, before_experts = 0;
  for (json const& golden : data["cases"]) {
    CAPTURE(compared);
    int const k = golden["k"];
    moe_test::preset_run const run(moe::tutel_topk({.k = k,
                                                    .capacity_factor = golden["f"],
                                                    .alignment = golden["align"],
                                                    .batch_prioritized_routing = golden["bpr"],
                                                    .normalize_gate = golden["norm"],
                                                    .is_postscore = golden["postscore"]}),
                                   logits, E, training());
    double const C = golden["C"];
    CHECK(static_cast<double>(run.table.counts->capacity) == C);
    CHECK(std::abs(run.loss - golden["l_aux"].get<double>()) < 5e-7);
    for (int j = 0; j < k; ++j)
      for (std::int64_t t = 0; t < T; ++t) {
        CAPTURE(t);
        CAPTURE(j);
        double const loc = at(golden, "loc", j, t);
        CHECK(run.expert(t, j) == at(golden, "idx", j, t));
        CHECK(run.slot(t, j) == (loc < C ? loc : -1));
        CHECK(std::abs(run.routing.weight[t * k + j] - at(golden, "gates", j, t)) < 1e-6);
        CHECK(run.weights[run.pair(t, j)] == (loc < C ? run.routing.weight[t * k + j] : 0.0f));
      }

    // Experts f_e(x) = x * expert_scale[e], and their gradient, row by row.
    auto const& table = run.table;
    auto const scale_rows = [&](std::vector<float>& rows) {
      for (int e = 0; e < E; ++e)
        for (int r = table.begin[e]; r < table.begin[e] + table.used[e]; ++r)
          for (int d = 0; d < D; ++d)
            rows[static_cast<std::size_t>(r * D + d)] *=
                expert_scale[static_cast<std::size_t>(e * D + d)];
    };
    std::int64_t const N = table.counts->rows;
    std::vector<float> rows(static_cast<std::size_t>(N * D)), drows(rows), y(x.size()),
        dx(x.size()), dweights(run.weights.size());
    moe::matrix_view const rows_view(rows, N, D), drows_view(drows, N, D), dx_view(dx, T, D),
        y_view(y, T, D);
    moe::matrix_view const x_view(x, T, D), dy_view(dy, T, D);
    moe::vector_view<float const> const weights(run.weights);
    if (run.preset.apply == moe::weights_apply::after_experts) {
      moe::dispatch(exec, x_view, table, rows_view);
      scale_rows(rows);
      moe::combine(exec, rows_view, table, weights, y_view);
      moe::combine_backward(exec, dy_view, rows_view, table, weights, drows_view,
                            moe::vector_view<float>(dweights));
      scale_rows(drows);
      moe::dispatch_backward(exec, drows_view, table, dx_view);
    } else {
      moe::dispatch(exec, x_view, table, weights, rows_view);
      scale_rows(rows);
      moe::combine(exec, rows_view, table, y_view);
      moe::dispatch(exec, dy_view, table, drows_view);  // the gradient of combine without weights
      scale_rows(drows);
      moe::dispatch_backward(exec, drows_view, x_view, table, weights, dx_view,
                             moe::vector_view<float>(dweights));
      ++before_experts;
    }
    auto const dlogits = run.gradient(dweights, data["aux_weight"]);
    auto const near = [&](std::vector<float> const& mine, char const* name) {
      auto const theirs = get(golden, name);
      REQUIRE(mine.size() == theirs.size());
      for (std::size_t i = 0; i < mine.size(); ++i) CHECK(std::abs(mine[i] - theirs[i]) < 2e-6f);
    };
    near(y, "y");
    near(dx, "dx");
    near(dlogits, "dlogits");
    ++compared;
  }
  CHECK(compared == 21);
  CHECK(before_experts == 9);
}
