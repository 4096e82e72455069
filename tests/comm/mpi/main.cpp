// The main function of a test program that every process of an MPI job runs, all cases in the same order.
// SPDX-License-Identifier: MIT
#include <mpi.h>

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <iostream>
#include <sstream>

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);  // see mpi_communicator
  int rank = 0, R = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &R);
  doctest::Context context(argc, argv);
  context.setOption("no-intro", true);
  std::ostringstream text;
  context.setCout(&text);
  int const result = context.run();
  // What one rank says is enough, unless it is not the same.
  if (rank == 0 || result != 0)
    std::cout << "rank " << rank << " of " << R << ":\n" << text.str() << std::flush;
  MPI_Finalize();
  return result;
}
