// What a capacity does to a skewed routing: rows, drops, and the weights of what was kept.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/04_capacity.cpp -o capacity && ./capacity
//
//   rule                         C   rows   kept  dropped  imbalance
//   dropless, packed           115    512    512    0.0 %       1.80
//   dropless, padded           115    920    512    0.0 %       1.80
//   DeepSpeed 1.25, padded      80    640    433   15.4 %       1.48
//   Tutel 1, best tokens        64    512    368   28.1 %       1.39
//   DeepSpeed 1.25, random      80    433    433   15.4 %       1.48
#include <cmath>
#include <cstdint>
#include <cstdio>

#include <moe/core/execution.hpp>
#include <moe/routing/build_table.hpp>
#include <moe/routing/kept_weights.hpp>
#include <moe/routing/statistics.hpp>

int main() {
  constexpr int T = 256, E = 8, K = 2;

  // Token t chooses experts by a rule that favours the first ones.
  moe::routing_buffer routing(T, K, E);
  for (int t = 0; t < T; ++t) {
    int const first = (t * t / 7 + t) % 11 % E % (1 + t % E);
    routing.expert[t * K] = first;
    routing.expert[t * K + 1] = (first + 1 + t % 3) % E;
    routing.score[t * K] = routing.weight[t * K] = 0.5f + 0.001f * static_cast<float>(t % 100);
    routing.score[t * K + 1] = routing.weight[t * K + 1] = 0.25f;
  }

  using moe::layout, moe::order, moe::overflow;
  struct named_rules {
    char const* name;
    moe::table_rules rules;
  };
  auto const deepspeed = moe::capacity::deepspeed({.factor = 1.25, .eval_factor = 1.25});
  named_rules const all[] = {
      {"dropless, packed", {}},
      {"dropless, padded", {.rows = layout::padded}},
      {"DeepSpeed 1.25, padded", {.rows = layout::padded, .cap = deepspeed}},
      {"Tutel 1, best tokens",
       {.rows = layout::padded,
        .rank = order::choice_major,
        .cap = moe::capacity::tutel(1),
        .when_full = overflow::batch_prioritised}},
      {"DeepSpeed 1.25, random", {.cap = deepspeed, .when_full = overflow::random}},
  };

  bool right = true;
  std::printf("%-24s %5s %6s %6s %8s %10s\n", "rule", "C", "rows", "kept", "dropped", "imbalance");
  for (auto const& [name, rules] : all) {
    moe::table_shape shape{.T = T, .K = K, .E = E};
    shape.max_rows = moe::max_rows(rules, shape);
    moe::table_buffer table(shape);
    moe::buffer scratch(moe::build_table_scratch(moe::cpu{}, shape));
    moe::build_table(moe::cpu{}, routing, rules, scratch, table);

    moe::table_counts const& n = *table.counts;
    std::printf("%-24s %5d %6d %6d %6.1f %% %10.2f\n", name, static_cast<int>(n.capacity),
                static_cast<int>(n.rows), static_cast<int>(n.kept), 100 * drop_fraction(n),
                measure_load(moe::vector_view<std::int32_t const>(table.used, E)).imbalance);
    right = right && n.kept + n.dropped == T * K && n.rows <= shape.max_rows;

    // A token's weights sum to 1 again over the pairs that were kept.
    float weight[T * K];
    weigh_kept(moe::cpu{}, moe::kept_weights::renormalised, table, routing.weight, weight);
    for (int t = 0; t < T; ++t) {
      bool const any = table.row_of[t * K] >= 0 || table.row_of[t * K + 1] >= 0;
      right = right && std::fabs(weight[t * K] + weight[t * K + 1] - (any ? 1.0f : 0.0f)) < 1e-6f;
    }
  }
  return right ? 0 : 1;
}
