// Route tokens to experts and print the routing table: who computes what, with which weight.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/01_route.cpp -o route -pthread && ./route
//
// Prints one line for each expert: its tokens and, in brackets, how much each counts.
#include <cstdio>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.hpp>

int main() {
  // What a router gave six tokens for four experts.
  constexpr int T = 6, K = 2, E = 4;
  std::vector<float> const logits{2,  1, 0,  0,   //
                                  0,  3, 0,  1,   //
                                  1,  1, 0,  -1,  // equal: the lower expert is first
                                  0,  2, -1, 3,   //
                                  4,  0, 0,  0,   //
                                  -1, 1, -2, 0};
  // [route]
  moe::cpu const exec;  // the calling thread
  moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised> const mixtral;
  moe::routing_buffer routing(T, K, E);
  moe::buffer scratch(moe::route_scratch<decltype(mixtral)>(exec, E));
  moe::route(exec, mixtral, moe::matrix_view(logits, T, E), {}, scratch, routing);

  moe::table_shape const shape{.T = T, .K = K, .E = E, .max_rows = T * K};
  moe::table_buffer table(shape);
  scratch = moe::buffer(moe::build_table_scratch(exec, shape));
  moe::build_table(exec, routing, moe::table_rules{}, scratch, table);

  for (int e = 0; e < E; ++e) {
    std::printf("expert %d:", e);
    for (int row = table.begin[e]; row < table.begin[e] + table.used[e]; ++row) {
      int const pair = table.pair_of[row];  // pair i is choice i % K of token i / K
      std::printf("  token %d (%.2f)", pair / K, static_cast<double>(routing.weight[pair]));
    }
    std::printf("\n");
  }
  // [/route]
  bool const right = table.counts->kept == T * K && table.used[0] == 3 && table.used[1] == 6 &&
                     table.used[2] == 0 && table.used[3] == 3;
  return right ? 0 : 1;
}
