# Every option of the build, each with one sentence. A project that embeds moe gets none of them.
option(MOE_INSTALL "Make the install rules and the CMake package." ${PROJECT_IS_TOP_LEVEL})
option(MOE_TESTS "Build the tests (needs doctest)." ${PROJECT_IS_TOP_LEVEL})
option(MOE_EXAMPLES "Build the examples and register each as a test." ${PROJECT_IS_TOP_LEVEL})
option(MOE_BENCHMARKS "Build the benchmarks (needs Google Benchmark and a release build)." OFF)
option(MOE_FUZZ "Build the fuzz targets (needs clang++ and its libFuzzer)." OFF)
option(MOE_WARNINGS_AS_ERRORS "Stop at the first warning in moe's own programs."
  ${PROJECT_IS_TOP_LEVEL})
option(MOE_COVERAGE "Count executed lines in moe's own programs (g++ only, read by gcov)." OFF)
option(MOE_NATIVE "Compile moe's own programs for the processor of this machine."
  ${MOE_BENCHMARKS})
option(MOE_CUDA "Make moe::cuda, and the CUDA programs of what else is on (needs nvcc)." OFF)
option(MOE_CUDA_CHECKS "Register the check that nvcc compiles every header as a test." OFF)

set(moe_mpi_default OFF)
if(PROJECT_IS_TOP_LEVEL)
  set(moe_mpi_default AUTO)
endif()
set(MOE_MPI ${moe_mpi_default} CACHE STRING
  "Make moe::mpi, and the MPI programs of what else is on: ON, OFF, or AUTO where there is an MPI.")
set_property(CACHE MOE_MPI PROPERTY STRINGS AUTO ON OFF)
if(NOT MOE_MPI MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "moe: MOE_MPI is \"${MOE_MPI}\"; it may be AUTO, ON or OFF")
endif()

set(MOE_SANITIZE "" CACHE STRING
  "Sanitizers for moe's own programs: empty, \"address,undefined\" or \"thread\".")
set_property(CACHE MOE_SANITIZE PROPERTY STRINGS "" "address,undefined" "thread")
if(NOT MOE_SANITIZE STREQUAL "" AND NOT MOE_SANITIZE MATCHES "^(address,undefined|thread)$")
  message(FATAL_ERROR "moe: MOE_SANITIZE is \"${MOE_SANITIZE}\"; it may be empty, "
    "\"address,undefined\" or \"thread\"")
endif()
