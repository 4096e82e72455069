// How often this program sends and receives with MPI, and how often it allocates.
// SPDX-License-Identifier: MIT
#pragma once

namespace moe_test {

struct call_counts {
  long sends = 0;     // MPI_Isend
  long receives = 0;  // MPI_Irecv
  long allocations = 0;
};
extern call_counts calls;

}  // namespace moe_test
