// Making, transposing and verifying the plans of all ranks.
// SPDX-License-Identifier: MIT
#include <benchmark/benchmark.h>
#include <cstdlib>
#include <string>
#include <vector>

#include <moe/comm/deduplicated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/comm/verify.hpp>

namespace {

using plans = std::vector<moe::exchange_plan>;

plans transposed(plans const& there) {
  plans back;
  back.reserve(there.size());
  for (moe::exchange_plan const& p : there) back.push_back(transpose(p));
  return back;
}

/// `make_all()` and `make_one(rank)` give plans.
template <class All, class One>
void add(std::string const& name, int R, All const& make_all, One const& make_one) {
  auto const add_one = [&](char const* what, auto const& run) {
    std::string const full = std::string(what) + "/R:" + std::to_string(R) + "/" + name;
    benchmark::RegisterBenchmark(full.c_str(), run)->Unit(benchmark::kMillisecond);
  };
  add_one("make_all", [=](benchmark::State& state) {
    if (!moe::verify_plans(make_all())) std::abort();
    for (auto _ : state) benchmark::DoNotOptimize(make_all());
  });
  add_one("make_one", [=](benchmark::State& state) {
    for (auto _ : state) benchmark::DoNotOptimize(make_one(R / 2));
  });
  add_one("transpose_all", [=](benchmark::State& state) {
    plans const there = make_all();
    if (!moe::verify_plans(transposed(there))) std::abort();
    for (auto _ : state) benchmark::DoNotOptimize(transposed(there));
  });
  add_one("verify", [=](benchmark::State& state) {
    plans const there = make_all();
    for (auto _ : state)
      if (!moe::verify_plans(there)) std::abort();
  });
}

int const registered = [] {
  for (int const R : {64, 1024}) {
    moe::topology const ranks = moe::topology::even(R / 8, 8);
    auto const add_path = [&](char const* name, auto const& path) {
      add(
          name, R, [=] { return moe::make_plans(path, ranks); },
          [=](int rank) { return moe::make_plan(path, ranks, rank); });
    };
    auto const add_tokens = [&](char const* name, auto const& strategy) {
      add(
          std::string("tokens_") + name, R, [=] { return moe::make_token_plans(strategy, ranks); },
          [=](int rank) { return make_token_plan(strategy, ranks, rank); });
    };
    add_path("flat", moe::flat{});
    add_path("two_hop_inter", moe::two_hop{});
    add_path("leader", moe::leader{});
    add_tokens("two_hop_inter", moe::two_hop{});
    add_tokens("deduplicated", moe::deduplicated{});
  }
  return 0;
}();

}  // namespace
