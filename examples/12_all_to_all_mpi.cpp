// Exchange rows between processes over MPI: equal blocks in one call, and any numbers of rows by a plan.
// SPDX-License-Identifier: MIT
//
//   mpicxx -std=c++20 -I include examples/12_all_to_all_mpi.cpp -o all_to_all_mpi -pthread
//   mpirun -n 4 ./all_to_all_mpi
//
// Halves of the ranks stand for nodes; rank s sends d + s % 3 rows to rank d. Each rank checks what it
// got. Rank 0 prints:
//
//   4 ranks, all right; messages between nodes: flat 8, two hops 4
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <mpi.h>
#include <numeric>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/hierarchical_all_to_all.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/mpi.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

constexpr int M = 4;

bool exchange_rows(moe::mpi_communicator& comm, moe::topology const& cluster) {
  using namespace std::chrono_literals;
  int const R = comm.size(), rank = comm.rank();

  // [blocks]
  // Block d of `counts`, here one number, goes to rank d, where it is block `rank` of `received`.
  std::vector<std::int64_t> counts, received(static_cast<std::size_t>(R));
  for (int d = 0; d < R; ++d) counts.push_back(d + rank % 3);
  if (!moe::hierarchical_all_to_all<std::int64_t>(comm, cluster, counts, received, moe::within(5s)))
    return false;
  // [/blocks]

  std::vector<float> rows, expected;
  for (int i = 0; i < R; ++i) {
    rows.insert(rows.end(), static_cast<std::size_t>((i + rank % 3) * M), float(10 * rank + i));
    expected.insert(expected.end(), static_cast<std::size_t>((rank + i % 3) * M),
                    float(10 * i + rank));
  }
  moe::exchange_plan const plan = moe::make_plan(moe::two_hop{}, cluster, rank);
  moe::bound_plan sizes(plan);
  moe::rank_exchange exchange(comm);
  if (!exchange.bind(sizes, counts, moe::within(5s))) return false;
  std::int64_t const N = sizes.output_rows();
  std::vector<float> out(static_cast<std::size_t>(N * M));
  moe::matrix_view<float const> const in(rows.data(), sizes.input_rows(), M);
  if (!exchange.run<float>(sizes, in, {out, N, M}, moe::within(5s))) return false;
  return N == std::reduce(received.begin(), received.end()) && out == expected;
}

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int right = 0;
  {
    moe::mpi_communicator comm(MPI_COMM_WORLD);  // all processes; gone before MPI_Finalize
    auto const cluster = moe::topology::even(1, comm.size()).grouped((comm.size() + 1) / 2);
    right = exchange_rows(comm, cluster) ? 1 : 0;
    MPI_Allreduce(MPI_IN_PLACE, &right, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
    auto const between = [&](auto strategy) {
      auto const traffic = count_traffic(moe::make_plans(strategy, cluster), cluster);
      return static_cast<int>(traffic.between_nodes.messages);
    };
    if (comm.rank() == 0)
      std::printf("%d ranks, %s; messages between nodes: flat %d, two hops %d\n", comm.size(),
                  right ? "all right" : "WRONG", between(moe::flat{}), between(moe::two_hop{}));
  }
  MPI_Finalize();
  return right ? 0 : 1;
}
