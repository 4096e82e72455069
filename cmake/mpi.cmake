# The target moe::mpi: the library for programs over MPI. Read by the build where MOE_MPI is on, and by the
# installed package where the component mpi is asked for.
set(MPI_CXX_SKIP_MPICXX ON)  # the C++ interface that MPI once had
find_package(MPI REQUIRED COMPONENTS CXX)
if(NOT TARGET moe::mpi)
  add_library(moe::mpi INTERFACE IMPORTED GLOBAL)
  target_link_libraries(moe::mpi INTERFACE moe::moe MPI::MPI_CXX)
endif()
