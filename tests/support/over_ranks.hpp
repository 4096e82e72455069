// Sums and times over all processes of an MPI job. All of it is collective.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <mpi.h>
#include <support/counted.hpp>

namespace moe_test {

inline std::int64_t sum_over_ranks(std::int64_t mine) {
  std::int64_t sum = 0;
  MPI_Allreduce(&mine, &sum, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
  return sum;
}
inline link_counts sum_over_ranks(link_counts mine) {
  return {sum_over_ranks(mine.messages), sum_over_ranks(mine.bytes)};
}

/// The shortest of some runs, of which each is as long as on the slowest rank.
template <class F>
double milliseconds_over_ranks(int runs, F const& run) {
  double best = 1e9;
  for (int i = 0; i < runs; ++i) {
    MPI_Barrier(MPI_COMM_WORLD);
    double const start = MPI_Wtime();
    run();
    double const mine = MPI_Wtime() - start;
    double slowest = 0;
    MPI_Allreduce(&mine, &slowest, 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
    best = std::min(best, 1e3 * slowest);
  }
  return best;
}

}  // namespace moe_test
