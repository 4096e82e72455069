// All-to-all of equal blocks over MPI: every strategy beside MPI_Alltoall and MPI_Alltoallv.
// SPDX-License-Identifier: MIT
//
//   mpirun -n 8 build/bench/bench/moe_mpi_strategies [<ranks of a node> [<runs>]]
//
// Nodes are groups of ranks, whatever the machine is. Each time is that of the slowest rank, in the best
// of the runs. Messages, bytes and copies are of all ranks together. The result is verified first.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mpi.h>
#include <support/counted.hpp>
#include <support/over_ranks.hpp>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/mpi.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

namespace {

using namespace std::chrono_literals;
using communicator = moe_test::counted<moe::mpi_communicator>;
using moe_test::link_counts;
using moe_test::milliseconds_over_ranks;
using moe_test::sum_over_ranks;
using bytes = std::vector<unsigned char>;

struct blocks {
  int m;  // bytes of each
  int runs;
  bytes in, out, right;  // [R * m]

  bool are_right() const { return sum_over_ranks(out == right ? 0 : 1) == 0; }
};

blocks make_blocks(int R, int rank, int m, int runs) {
  auto const size = static_cast<std::size_t>(R) * static_cast<std::size_t>(m);
  blocks b{m, runs, bytes(size), bytes(size), bytes(size)};
  for (std::size_t i = 0; i < size; ++i) {
    auto const peer = i / static_cast<std::size_t>(m), place = i % static_cast<std::size_t>(m);
    auto const self = static_cast<std::size_t>(rank);
    b.in[i] = static_cast<unsigned char>(37 * self + 11 * peer + place);
    b.right[i] = static_cast<unsigned char>(37 * peer + 11 * self + place);
  }
  return b;
}

template <class Strategy>
bool time_strategy(char const* name, Strategy const& strategy, moe::topology const& cluster,
                   communicator& comm, blocks& b) {
  std::int64_t const R = cluster.size();
  moe::exchange_plan const plan = moe::make_plan(strategy, cluster, comm.rank());
  moe::bound_plan sizes(plan);
  sizes.bind_equal(1);
  moe::rank_exchange<communicator> exchange(comm);
  bool ran = true;
  auto const run = [&] {
    moe::outcome const end = exchange.run<unsigned char>(sizes, {b.in.data(), R, b.m},
                                                         {b.out.data(), R, b.m}, moe::within(60s));
    ran = ran && end;
  };
  std::fill(b.out.begin(), b.out.end(), static_cast<unsigned char>(0));
  comm.between_nodes = comm.within_nodes = {};
  run();
  link_counts const between = sum_over_ranks(comm.between_nodes);
  link_counts const within = sum_over_ranks(comm.within_nodes);
  if (!b.are_right()) {
    if (comm.rank() == 0) std::printf("WRONG: %s\n", name);
    return false;
  }
  double const time = milliseconds_over_ranks(b.runs, run);
  auto const copied = count_traffic(moe::make_plans(strategy, cluster), cluster).copied_slots * b.m;
  if (comm.rank() == 0)
    std::printf("%8d  %-19s %9.3f ms %6lld %11lld %6lld %11lld %11lld\n", b.m, name, time,
                static_cast<long long>(between.messages), static_cast<long long>(between.bytes),
                static_cast<long long>(within.messages), static_cast<long long>(within.bytes),
                static_cast<long long>(copied));
  return ran;
}

template <class F>
bool time_mpi(char const* name, int rank, blocks& b, F const& run) {
  std::fill(b.out.begin(), b.out.end(), static_cast<unsigned char>(0));
  run();
  bool const right = b.are_right();
  double const time = milliseconds_over_ranks(b.runs, run);
  if (rank == 0) std::printf("%8d  %-19s %9.3f ms%s\n", b.m, name, time, right ? "" : " WRONG");
  return right;
}

bool time_all(moe::topology const& cluster, communicator& comm, blocks b) {
  int const R = comm.size(), rank = comm.rank(), G = cluster.node_size(0);
  bool right = time_strategy("flat", moe::flat{}, cluster, comm, b);
  right = time_strategy("two_hop inter first", moe::two_hop{}, cluster, comm, b) && right;
  right =
      time_strategy("two_hop intra first", moe::two_hop{moe::first_hop::intra}, cluster, comm, b) &&
      right;
  right = time_strategy("leader", moe::leader{}, cluster, comm, b) && right;
  right = time_strategy("grid", moe::grid<2>{{R / G, G}}, cluster, comm, b) && right;
  right = time_mpi("MPI_Alltoall", rank, b,
                   [&] {
                     MPI_Alltoall(b.in.data(), b.m, MPI_BYTE, b.out.data(), b.m, MPI_BYTE,
                                  MPI_COMM_WORLD);
                   }) &&
          right;
  std::vector<int> const counts(static_cast<std::size_t>(R), b.m);
  std::vector<int> first;
  for (int i = 0; i < R; ++i) first.push_back(i * b.m);
  return time_mpi("MPI_Alltoallv", rank, b,
                  [&] {
                    MPI_Alltoallv(b.in.data(), counts.data(), first.data(), MPI_BYTE, b.out.data(),
                                  counts.data(), first.data(), MPI_BYTE, MPI_COMM_WORLD);
                  }) &&
         right;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  bool right = false;
  {
    moe::mpi_communicator inner(MPI_COMM_WORLD);
    int const R = inner.size();
    int const G = argc > 1 ? std::atoi(argv[1]) : R / 2;
    int const runs = argc > 2 ? std::atoi(argv[2]) : 50;
    if (G < 1 || R % G != 0 || runs < 1) {
      if (inner.rank() == 0)
        std::printf("the ranks of a node divide all %d; at least one run\n", R);
    } else {
      moe::topology const cluster = moe::topology::even(R / G, G);
      communicator comm(inner, cluster);
      if (inner.rank() == 0)
        std::printf(
            "%d nodes of %d ranks, the best of %d runs\n"
            "   bytes                               time    between nodes"
            "       inside nodes      copied\n"
            "of block                                     messages  bytes"
            "     messages  bytes       bytes\n",
            R / G, G, runs);
      right = true;
      for (int const m : {64, 4096, 65536, 1 << 20})
        right = time_all(cluster, comm, make_blocks(R, inner.rank(), m, runs)) && right;
    }
  }
  MPI_Finalize();
  return right ? 0 : 1;
}
