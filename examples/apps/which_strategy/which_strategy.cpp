// Asks the cost model which strategy is the fastest, for a machine of yours. Nothing here was measured.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/apps/which_strategy/which_strategy.cpp && ./a.out
//
// Each cell names the fastest strategy, and how many times as fast as flat it is. What gains less than
// 5 % is no gain.
#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <moe/comm/deduplicated.hpp>
#include <moe/comm/expected_rows.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/slot_names.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

namespace {

constexpr int G = 8;     // GPUs of a node
constexpr int E = 256;   // experts of a layer, all liked alike
constexpr int M = 7168;  // elements of a token, 2 bytes each

// [machine]
// Latency in seconds, seconds for each message, bytes per second, of NVLink 4 and of a 400 Gb/s port for
// each GPU; bytes per second of HBM 3.
moe::machine_speed machine(double us_per_message) {
  return {{4e-6, 0.5e-6, 371e9}, {14e-6, us_per_message * 1e-6, 45e9}, 3.35e12};
}
// [/machine]

/// A strategy and its time, which depends on the column of a table.
struct candidate {
  char const* name;
  std::function<double(int column)> seconds;
};
using candidates = std::vector<candidate>;

std::string fastest(candidates const& all, int column) {
  candidate const* best = nullptr;
  double shortest = 0;
  for (candidate const& c : all)
    if (double const seconds = c.seconds(column); best == nullptr || seconds < shortest)
      best = &c, shortest = seconds;
  double const gain = all[0].seconds(column) / shortest;
  if (gain < 1.05) return all[0].name;
  char text[32];
  std::snprintf(text, sizeof text, "%s %.1fx", best->name, gain);
  return text;
}

/// All-to-all: columns are bytes for each pair of ranks.
candidates all_to_all(int R, double us_per_message) {
  moe::topology const ranks = moe::topology::even(R / G, G);
  auto const seconds = [&](auto const& strategy) {
    // A leader and another rank: all others have as much to do as one of them.
    std::vector<moe::exchange_plan> plans{moe::make_plan(strategy, ranks, 0),
                                          moe::make_plan(strategy, ranks, 1)};
    return [=, plans = std::move(plans)](int bytes) {
      return moe::modelled_seconds(plans, ranks, machine(us_per_message), bytes);
    };
  };
  return {{"flat", seconds(moe::flat{})},
          {"inter", seconds(moe::two_hop{})},
          {"intra", seconds(moe::two_hop{moe::first_hop::intra})},
          {"leader", seconds(moe::leader{})}};
}

/// Dispatch of T tokens of each rank: columns are K, the experts of each token.
candidates dispatch(int R, int T, double us_per_message) {
  moe::topology const ranks = moe::topology::even(R / G, G);
  auto const seconds = [&](auto const& strategy) {
    std::vector<moe::exchange_plan> plans = moe::make_token_plans(strategy, ranks);
    moe::slot_names names(plans);
    return [=, plans = std::move(plans), names = std::move(names)](int K) {
      auto const rows = [&](moe::piece const& p) { return moe::expected_rows(T, K, E, R, p.span); };
      return moe::modelled_seconds(plans, ranks, machine(us_per_message), 2 * M, names, rows);
    };
  };
  return {{"flat", seconds(moe::flat{})},
          {"inter", seconds(moe::two_hop{})},
          {"intra", seconds(moe::two_hop{moe::first_hop::intra})},
          {"dedup", seconds(moe::deduplicated{})}};
}

template <class Candidates>
void print_table(std::vector<int> const& ranks, std::vector<int> const& columns,
                 Candidates const& of) {
  std::printf("%8s", "");
  for (int const column : columns) std::printf("%13d", column);
  for (int const R : ranks) {
    std::printf("\nR = %4d", R);
    candidates const all = of(R);
    for (int const column : columns) std::printf("%13s", fastest(all, column).c_str());
  }
  std::printf("\n");
}

}  // namespace

int main() {
  for (double const us : {2.0, 0.2}) {
    std::printf("all-to-all, %.1f us for each message between nodes; bytes for each pair\n", us);
    print_table({16, 32, 64, 256, 1024}, {256, 4 << 10, 64 << 10, 256 << 10, 1 << 20},
                [&](int R) { return all_to_all(R, us); });
  }
  for (double const us : {2.0, 0.2})
    for (int const T : {128, 4096}) {
      std::printf("dispatch of %d tokens, %.1f us for each message; K\n", T, us);
      print_table({16, 32, 64, 256}, {1, 2, 4, 8}, [&](int R) { return dispatch(R, T, us); });
    }
  // Small blocks want few messages, large ones no copies; many choices want no token twice.
  bool const plausible = fastest(all_to_all(256, 2), 256).starts_with("inter") &&
                         fastest(all_to_all(64, 2), 4 << 20) == "flat" &&
                         fastest(dispatch(32, 4096, 2), 8).starts_with("dedup");
  return plausible ? 0 : 1;
}
