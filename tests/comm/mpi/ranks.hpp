// What the tests over MPI share: the processes of the job, and what they all say.
// SPDX-License-Identifier: MIT
#pragma once

#include <climits>
#include <cstddef>
#include <mpi.h>
#include <support/exchanged_rows.hpp>
#include <thread>

#include <moe/comm/mpi.hpp>

namespace moe_test {

/// A communicator of all processes. Collective.
inline moe::mpi_communicator all_ranks(std::size_t most_bytes = INT_MAX) {
  return moe::mpi_communicator(MPI_COMM_WORLD, most_bytes);
}

/// Whether `mine` is true on all ranks, so that all fail together. Collective; blocks, which is how the
/// ranks come together again after a test in which some have failed. Yields, as some MPIs do not: there
/// may be fewer cores than ranks.
inline bool on_all(bool mine) {
  int all = mine ? 1 : 0, done = 0;
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Iallreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD, &request);
  while (MPI_Test(&request, &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done == 0)
    std::this_thread::yield();
  return all != 0;
}

}  // namespace moe_test
