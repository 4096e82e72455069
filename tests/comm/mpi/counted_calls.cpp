// Stands between the program and MPI, by the interface that MPI has for that.
// SPDX-License-Identifier: MIT
#include "counted_calls.hpp"

#include <cstddef>
#include <cstdlib>
#include <mpi.h>
#include <new>

moe_test::call_counts moe_test::calls;

extern "C" int MPI_Isend(void const* data, int count, MPI_Datatype type, int peer, int tag,
                         MPI_Comm comm, MPI_Request* request) {
  ++moe_test::calls.sends;
  return PMPI_Isend(data, count, type, peer, tag, comm, request);
}

extern "C" int MPI_Irecv(void* data, int count, MPI_Datatype type, int peer, int tag, MPI_Comm comm,
                         MPI_Request* request) {
  ++moe_test::calls.receives;
  return PMPI_Irecv(data, count, type, peer, tag, comm, request);
}

void* operator new(std::size_t bytes) {
  ++moe_test::calls.allocations;
  if (void* const p = std::malloc(bytes == 0 ? 1 : bytes)) return p;
  throw std::bad_alloc();
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, std::size_t) noexcept {
  std::free(p);
}
