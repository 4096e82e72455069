// Exchange rows between ranks, every rank with every other: directly, and by a strategy of two hops.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/12_all_to_all.cpp -o all_to_all -pthread && ./all_to_all
//
// The ranks are threads of this process. Rank s sends d + s % 3 rows to rank d; element c of them is
// 100 s + d + c / 10. Each rank checks what it got, both ways. Prints:
//   messages between nodes: flat 18, two hops 6
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/rank_exchange.hpp>
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
  std::int64_t sent[R], received[R];
  std::vector<float> rows, expected;
  for (int i = 0; i < R; ++i) {
    sent[i] = i + rank % 3;
    for (int j = 0; j < sent[i] * M; ++j) rows.push_back(value(rank, i, j % M));
    for (int j = 0; j < (rank + i % 3) * M; ++j) expected.push_back(value(i, rank, j % M));
  }
  moe::matrix_view<float const> const in(rows.data(), std::reduce(sent, sent + R), M);

  // [direct]
  // First how many rows, then the rows. Every wait has an end, and an outcome that names the peer.
  if (!moe::all_to_all<std::int64_t>(comm, {sent, R}, {received, R}, moe::within(5s))) return false;
  std::int64_t const N = std::reduce(received, received + R);
  std::vector<float> out(static_cast<std::size_t>(N * M));
  moe::outcome const done =
      moe::all_to_all_v<float>(comm, in, {sent, R}, {out, N, M}, {received, R}, moe::within(5s));
  // [/direct]
  if (!done || out != expected) return false;

  // [strategy]
  // A strategy makes a plan, once. The plan runs with any counts, over any communicator.
  moe::exchange_plan const plan = moe::make_plan(moe::two_hop{}, cluster, rank);
  moe::bound_plan sizes(plan);
  moe::rank_exchange exchange(comm);
  if (!exchange.bind(sizes, {sent, R}, moe::within(5s))) return false;  // what each will get
  std::vector<float> again(out.size());
  if (!exchange.run<float>(sizes, in, {again, N, M}, moe::within(5s))) return false;
  // [/strategy]
  return again == expected;
}

int main() {
  moe::thread_world world(R);
  bool right[R];
  world.run([&](moe::thread_communicator& comm) { right[comm.rank()] = exchange_rows(comm); });

  auto const between = [](auto strategy) {
    return count_traffic(moe::make_plans(strategy, cluster), cluster).between_nodes.messages;
  };
  auto const flat = static_cast<int>(between(moe::flat{}));
  auto const two_hop = static_cast<int>(between(moe::two_hop{}));
  std::printf("messages between nodes: flat %d, two hops %d\n", flat, two_hop);
  bool const all = std::count(right, right + R, true) == R;
  return all && flat == G * two_hop ? 0 : 1;
}
