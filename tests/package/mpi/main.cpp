// A program outside this project over MPI, alone in its world: it needs no mpirun.
// SPDX-License-Identifier: MIT
#include <moe/comm/mpi.hpp>
#include <moe/core/version.hpp>

static_assert(MOE_VERSION == MOE_EXPECTED_VERSION);

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  bool right = false;
  {
    moe::mpi_communicator const comm(MPI_COMM_WORLD);
    right = comm.rank() == 0 && comm.size() == 1;
  }
  MPI_Finalize();
  return right ? 0 : 1;
}
