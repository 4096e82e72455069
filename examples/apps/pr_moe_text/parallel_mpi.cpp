// Train the PR-MoE language model on the ranks of MPI, which share its experts: mpirun -n 4.
// SPDX-License-Identifier: MIT
#include <cstdio>
#include <exception>
#include <mpi.h>

#include <moe/comm/mpi.hpp>

#include "parallel.hpp"

namespace {

int run(int argc, char** argv) {
  using namespace pr_moe_text;
  options const o(argc, argv);
  corpus const text(o.text, S);
  moe::mpi_communicator all(MPI_COMM_WORLD);
  auto const many = losses_of(all, text, o.steps);
  return all.rank() > 0 || compare(losses_of_one(text, o.steps), many, all.size()) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  try {
    int const code = run(argc, argv);
    MPI_Finalize();
    return code;
  } catch (std::exception const& e) {
    std::fprintf(stderr, "pr_moe_text_parallel_mpi: %s\n", e.what());
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
}
