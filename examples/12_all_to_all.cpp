// Exchange rows between ranks, every rank with every other: directly, and by a strategy of two hops.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/12_all_to_all.cpp -o all_to_all -pthread && ./all_to_all
//
// The ranks are threads of this process. Rank s sends d + s % 3 rows to rank d; element c of them is
// 100 s + d + c / 10. Each rank checks what it got, both ways. Prints the messages between nodes.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/row_exchange.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

constexpr int nodes = 2, G = 3, R = nodes * G, M = 4;
moe::topology const cluster = moe::topology::even(nodes, G);

float value(int s, int d, int c) {
  return static_cast<float>(100 * s + d) + static_cast<float>(c) / 10;
}

bool exchange_rows(moe::thread_communicator& comm) {
  using namespace std::chrono_literals;
  int const rank = comm.rank();
  std::vector<std::int64_t> sent(R), received(R);
  std::vector<float> rows, expected;
  for (int d = 0; d < R; ++d) {
    sent[d] = d + rank % 3;
    for (int i = 0; i < sent[d] * M; ++i) rows.push_back(value(rank, d, i % M));
    for (int i = 0; i < (rank + d % 3) * M; ++i) expected.push_back(value(d, rank, i % M));
  }
  auto const N = [](auto const& counts) {
    return std::accumulate(counts.begin(), counts.end(), 0);
  };

  // [direct]
  // First how many rows, then the rows. Every wait has an end, and an outcome that names the peer.
  if (!moe::all_to_all<std::int64_t>(comm, sent, received, moe::within(5s))) return false;
  std::vector<float> out(N(received) * M);
  moe::outcome const done = moe::all_to_all_v<float>(
      comm, {rows, N(sent), M}, sent, {out, N(received), M}, received, moe::within(5s));
  // [/direct]
  if (!done || out != expected) return false;

  // [strategy]
  // A strategy makes a plan, once. The plan runs with any counts, over any communicator.
  auto const plan = moe::make_plan(moe::two_hop{}, cluster, rank);
  moe::row_exchange exchange(comm, plan);
  if (!exchange.bind(sent, moe::within(5s))) return false;  // tells every rank what will arrive
  std::vector<float> in_two_hops(exchange.output_rows() * M);
  if (!exchange.run<float>({rows, N(sent), M}, {in_two_hops, exchange.output_rows(), M},
                           moe::within(5s)))
    return false;
  // [/strategy]
  return in_two_hops == expected;
}

int main() {
  moe::thread_world world(R);
  std::vector<char> right(R);
  world.run([&](moe::thread_communicator& comm) { right[comm.rank()] = exchange_rows(comm); });

  auto const between = [](auto strategy) {
    return count_traffic(moe::make_plans(strategy, cluster), cluster).between_nodes.messages;
  };
  auto const flat = between(moe::flat{}), two_hop = between(moe::two_hop{});
  std::printf("messages between nodes: flat %d, two hops %d\n", int(flat), int(two_hop));
  return right == std::vector<char>(R, true) && flat == G * two_hop ? 0 : 1;
}
