// Send tokens to experts and bring the results back: route, table, dispatch, experts, combine.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/02_dispatch_combine.cpp -o dispatch_combine -pthread
//
// The experts are toys: expert e gives (e + 1) x + e. Prints how many rows each had and the greatest
// difference from a loop over the choices of each token.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/core/memory.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/dispatch.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.hpp>

float expert(int e, float x) {
  return static_cast<float>(e + 1) * x + static_cast<float>(e);
}

int main() {
  constexpr int T = 100, M = 32, K = 2, E = 6;
  std::vector<float> token_data(T * M), logit_data(T * E), row_data(T * K * M), out_data(T * M);
  moe::matrix_view const tokens(token_data, T, M), logits(logit_data, T, E);
  moe::matrix_view const rows(row_data, T * K, M), out(out_data, T, M);
  for (int t = 0; t < T; ++t) {
    for (int c = 0; c < M; ++c) tokens(t, c) = std::sin(static_cast<float>(t * M + c));
    for (int e = 0; e < E; ++e) logits(t, e) = std::cos(static_cast<float>(3 * (t * E + e)));
  }

  moe::thread_team team(2);
  moe::cpu const exec(team);
  moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised> const gate;
  moe::routing_buffer routing(T, K, E);
  moe::buffer scratch(moe::route_scratch<decltype(gate)>(exec, E));
  moe::route(exec, gate, logits, {}, scratch, routing);

  moe::table_shape const shape{.T = T, .K = K, .E = E, .max_rows = T * K};
  moe::table_buffer table(shape);
  scratch = moe::buffer(moe::build_table_scratch(exec, shape));
  moe::build_table(exec, routing, moe::table_rules{}, scratch, table);

  // [dispatch]
  moe::dispatch(exec, tokens, table, rows);

  for (int e = 0; e < E; ++e) {  // the rows of expert e follow one another
    int const first = table.begin[e], last = first + table.used[e];
    for (int r = first; r < last; ++r)
      for (int c = 0; c < M; ++c) rows(r, c) = expert(e, rows(r, c));
    std::printf("expert %d: %d rows\n", e, last - first);
  }

  moe::combine(exec, rows, table, {routing.weight, T * K}, out);
  // [/dispatch]

  float greatest = 0;
  for (int t = 0; t < T; ++t)
    for (int c = 0; c < M; ++c) {
      float sum = 0;
      for (int i = t * K; i < t * K + K; ++i)
        sum += routing.weight[i] * expert(routing.expert[i], tokens(t, c));
      greatest = std::max(greatest, std::abs(sum - out(t, c)));
    }
  std::printf("greatest difference from a loop: %g\n", static_cast<double>(greatest));
  return greatest < 1e-5f && table.counts->kept == T * K ? 0 : 1;
}
