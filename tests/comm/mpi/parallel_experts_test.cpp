// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <doctest/doctest.h>
#include <mpi.h>
#include <mutex>
#include <vector>

#include <moe/comm/expert_hosts.hpp>
#include <moe/comm/mpi.hpp>
#include <moe/layer/gathered_experts.hpp>
#include <moe/schedule/expert_parallel.hpp>

#include "layer/parallel_case.hpp"
#include "ranks.hpp"

namespace {

using namespace moe_test::parallel;

void sum_over_ranks(std::vector<double>& values) {
  MPI_Allreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()), MPI_DOUBLE, MPI_SUM,
                MPI_COMM_WORLD);
}

/// What all processes gave, against one rank. Outputs of other ranks' tokens are 0 here.
void check_sum(joint_result sum, whole_layer const& whole) {
  for (auto* part : {&sum.out, &sum.dtokens, &sum.router, &sum.experts}) sum_over_ranks(*part);
  check_equal(sum, whole);
}

}  // namespace

TEST_CASE(
    "mpi/parallel_experts: ranks equal one rank, by every strategy, in one piece and in three") {
  moe::mpi_communicator comm = moe_test::all_ranks();
  moe::mpi_communicator second = moe_test::all_ranks();
  int const R = comm.size();
  std::mutex mutex;
  for (int kind = 0; kind < any_strategy::kinds; ++kind)
    for (int const chunks : {1, 3}) {
      CAPTURE(kind);
      CAPTURE(chunks);
      parallel_case c{.T = some_tokens(R, static_cast<unsigned>(kind)), .E = 2 * R};
      c.degrees = moe::spread_experts(c.E, R);
      c.strategy = {kind};
      c.group = R / 2;
      c.chunks = chunks;
      whole_layer whole(c.first(R), c.E);
      joint_result sum = joint_result::of(whole);
      run_rank(comm, &second, whole, c, moe::expert_hosts(c.E, c.degrees, comm.rank()), sum, mutex);
      check_sum(sum, whole);
    }
}

TEST_CASE("mpi/gathered_experts: any number of partial experts with the same parameters") {
  moe::mpi_communicator comm = moe_test::all_ranks();
  int const R = comm.size(), rank = comm.rank();
  moe::expert_parallelism const kept{.expert_parallel = 2, .slices = R / 2, .experts_per_rank = 1};
  parallel_case c{.T = some_tokens(R, 2), .E = 2};
  whole_layer whole(c.first(R), c.E, 1, 0, 0, 12);
  moe::expert_hosts const keeps(c.E, kept, rank);
  std::mutex mutex;
  for (int const r : {0, 1, R / 2}) {
    CAPTURE(r);
    auto const [pool, color] = moe::adaptive_pool::of(kept, r, rank);
    moe::mpi_communicator pool_ranks;
    REQUIRE(static_cast<bool>(
        comm.split(color, rank, moe::within(std::chrono::seconds(60)), pool_ranks)));
    moe::gathered_experts const inner(inner_experts{}, pool_ranks, pool);
    joint_result sum = joint_result::of(whole);
    run_rank<moe::mpi_communicator>(comm, nullptr, whole, c,
                                    moe::expert_hosts::adaptive(c.E, kept, r, rank), sum, mutex,
                                    inner, &keeps);
    check_sum(sum, whole);
  }
}
