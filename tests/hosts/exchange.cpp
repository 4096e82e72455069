// Exchanges over several hosts: messages and bytes between them have to be what the formulas say, and the
// bytes also what the network counted; times are printed beside those of MPI, and gate nothing.
// SPDX-License-Identifier: MIT
//
//   tests/hosts/run.sh 4 2 mpirun <this program>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mpi.h>
#include <string>
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
#include <moe/comm/two_hop.hpp>

namespace {

using namespace std::chrono_literals;
using communicator = moe_test::counted<moe::mpi_communicator>;
using moe_test::link_counts;
using moe_test::milliseconds_over_ranks;
using moe_test::sum_over_ranks;

bool all_right = true;
int rank = 0;

/// Collective: something that has to hold on all ranks.
void check(bool holds, std::string const& what) {
  int all = holds ? 1 : 0;
  MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  if (all != 0) return;
  all_right = false;
  if (rank == 0) std::printf("WRONG: %s\n", what.c_str());
}

/// Bytes that left this host, by the counter of its link.
std::int64_t bytes_sent() {
  std::ifstream links("/proc/self/net/dev");
  for (std::string line; std::getline(links, line);) {
    std::size_t const colon = line.find("eth0:");
    if (colon == std::string::npos) continue;
    char const* rest = line.c_str() + colon + 5;
    char* next = nullptr;
    for (int column = 0; column < 8; ++column, rest = next) std::strtoll(rest, &next, 10);
    return std::strtoll(rest, &next, 10);
  }
  return -1;
}

constexpr int runs = 5;

void exchange_by_hand(std::vector<unsigned char> const& in, std::vector<unsigned char>& out, int R,
                      int m) {
  std::vector<MPI_Request> requests(static_cast<std::size_t>(2 * R));
  for (int i = 0; i < R; ++i)
    MPI_Irecv(out.data() + i * m, m, MPI_BYTE, i, 0, MPI_COMM_WORLD,
              &requests[static_cast<std::size_t>(i)]);
  for (int i = 0; i < R; ++i)
    MPI_Isend(in.data() + i * m, m, MPI_BYTE, i, 0, MPI_COMM_WORLD,
              &requests[static_cast<std::size_t>(R + i)]);
  MPI_Waitall(2 * R, requests.data(), MPI_STATUSES_IGNORE);
}

struct expected_counts {
  std::int64_t between_nodes, within_nodes;  // messages
};

template <class Strategy>
void try_strategy(char const* name, Strategy const& strategy, moe::topology const& cluster,
                  communicator& comm, int m, expected_counts const& expected) {
  int const R = cluster.size(), G = cluster.node_size(0), N = cluster.nodes();
  auto const bytes = static_cast<std::size_t>(R * m);
  std::vector<unsigned char> in(bytes), out(bytes), right(bytes);
  auto const value = [](int s, int d, int i) {
    return static_cast<unsigned char>((37 * s + 11 * d + i + i / 256) & 255);
  };
  for (int p = 0; p < R; ++p)
    for (int i = 0; i < m; ++i) {
      in[static_cast<std::size_t>(p * m + i)] = value(rank, p, i);
      right[static_cast<std::size_t>(p * m + i)] = value(p, rank, i);
    }
  moe::exchange_plan const plan = moe::make_plan(strategy, cluster, rank);
  moe::bound_plan sizes(plan);
  sizes.bind_equal(1);
  moe::rank_exchange<communicator> exchange(comm);
  bool ran = true;
  auto const run = [&] {
    ran = exchange.run<unsigned char>(sizes, {in.data(), R, m}, {out.data(), R, m},
                                      moe::within(20s)) &&
          ran;
  };
  run();  // opens the connections
  check(ran && out == right, std::string(name) + ": every block at its place");

  MPI_Barrier(MPI_COMM_WORLD);
  std::int64_t const wire_before = bytes_sent();
  comm.between_nodes = comm.within_nodes = {};
  MPI_Barrier(MPI_COMM_WORLD);
  run();
  MPI_Barrier(MPI_COMM_WORLD);
  std::int64_t const wire_after = bytes_sent();
  MPI_Barrier(MPI_COMM_WORLD);
  link_counts const between = sum_over_ranks(comm.between_nodes),
                    within = sum_over_ranks(comm.within_nodes);
  std::int64_t const payload = std::int64_t{G} * G * N * (N - 1) * m;
  std::int64_t const wire = sum_over_ranks(cluster.local(rank) == 0 ? wire_after - wire_before : 0);
  check(between == link_counts{expected.between_nodes, payload},
        std::string(name) + ": messages and bytes between nodes by the formula");
  check(within.messages == expected.within_nodes,
        std::string(name) + ": messages inside nodes by the formula");
  // Headers of packets, acknowledgements and of MPI: a tenth at most, and 400 bytes for each message;
  // barriers, and what mpirun tells its hosts: 16 KiB.
  check(wire_before >= 0 && wire >= payload &&
            wire <= payload + payload / 10 + 400 * between.messages + 16384,
        std::string(name) + ": the network counted " + std::to_string(wire) + " bytes for " +
            std::to_string(payload));
  double const time = milliseconds_over_ranks(runs, run);
  check(ran && out == right, std::string(name) + ": every block at its place, each time");
  if (rank == 0)
    std::printf(
        "%7d  %-20s %8.2f ms  %4lld messages between nodes, %4lld inside, %8lld bytes"
        " between nodes, %8lld on the wire\n",
        m, name, time, static_cast<long long>(between.messages),
        static_cast<long long>(within.messages), static_cast<long long>(between.bytes),
        static_cast<long long>(wire));
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int R = 0, G = 0, place = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &R);
  MPI_Comm node = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank, MPI_INFO_NULL, &node);
  MPI_Comm_size(node, &G);
  MPI_Comm_rank(node, &place);
  MPI_Comm_free(&node);
  bool const as_told = argc == 3 && R == std::atoi(argv[1]) * G && G == std::atoi(argv[2]);
  check(as_told && place == rank % G, "as many hosts, and ranks of a host, as were asked for");
  if (all_right) {
    int const N = R / G;
    moe::topology const cluster = moe::topology::even(N, G);
    communicator comm(moe::mpi_communicator(MPI_COMM_WORLD), cluster);
    for (int const m : {1024, 65536}) {
      std::int64_t const flat = G * G * N * (N - 1), rails = R * (N - 1), inside = R * (G - 1);
      try_strategy("flat", moe::flat{}, cluster, comm, m, {flat, inside});
      try_strategy("two_hop, inter first", moe::two_hop{}, cluster, comm, m, {rails, 2 * inside});
      try_strategy("two_hop, intra first", moe::two_hop{moe::first_hop::intra}, cluster, comm, m,
                   {rails, inside});
      try_strategy("grid", moe::grid<2>{{N, G}}, cluster, comm, m, {rails, inside});
      try_strategy("leader", moe::leader{}, cluster, comm, m, {N * (N - 1), (R + N) * (G - 1)});
      auto const bytes = static_cast<std::size_t>(R * m);
      std::vector<unsigned char> in(bytes), out(bytes);
      double const all_to_all = milliseconds_over_ranks(runs, [&] {
        MPI_Alltoall(in.data(), m, MPI_BYTE, out.data(), m, MPI_BYTE, MPI_COMM_WORLD);
      });
      double const by_hand =
          milliseconds_over_ranks(runs, [&] { exchange_by_hand(in, out, R, m); });
      if (rank == 0)
        std::printf("%7d  MPI_Alltoall         %8.2f ms\n%7d  Isend and Irecv      %8.2f ms\n", m,
                    all_to_all, m, by_hand);
    }
  }
  MPI_Finalize();
  return all_right ? 0 : 1;
}
