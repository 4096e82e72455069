# MPI for moe's own programs. Sets moe_has_mpi.
set(moe_has_mpi ${MOE_MPI})
if(MOE_MPI STREQUAL "AUTO")
  set(moe_has_mpi OFF)
  # The leak checker reports what MPI keeps, and the thread sanitizer does not know its threads.
  if(NOT MOE_SANITIZE AND NOT MOE_COVERAGE)
    set(MPI_CXX_SKIP_MPICXX ON)
    find_package(MPI QUIET COMPONENTS CXX)
    set(moe_has_mpi ${MPI_CXX_FOUND})
    if(NOT MPI_CXX_FOUND)
      message(STATUS "moe: no MPI here (Debian: libopenmpi-dev), its programs are left out")
    endif()
  endif()
endif()
if(NOT moe_has_mpi)
  return()
endif()
include("${CMAKE_CURRENT_LIST_DIR}/mpi.cmake")

# So that Open MPI runs more processes than there are cores, and for root (in a container); so that UCX
# does not list the messages that a test leaves behind on purpose.
set(moe_mpi_environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
  OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 UCX_LOG_LEVEL=error)

# All of them.
add_custom_target(moe_mpi_programs)

# Gives a program of this project the library, MPI and the flags of moe's own programs.
function(moe_own_mpi_target target)
  moe_own_target(${target})
  target_link_libraries(${target} PRIVATE moe::mpi)
  add_dependencies(moe_mpi_programs ${target})
endfunction()

# moe_add_mpi_test(<name> <processes> <program> [<argument>...])
function(moe_add_mpi_test name processes program)
  if(MPIEXEC_EXECUTABLE)
    add_test(NAME ${name} COMMAND "${MPIEXEC_EXECUTABLE}" ${MPIEXEC_NUMPROC_FLAG} ${processes}
      ${MPIEXEC_PREFLAGS} $<TARGET_FILE:${program}> ${MPIEXEC_POSTFLAGS} ${ARGN})
  else()
    add_test(NAME ${name} COMMAND "${CMAKE_COMMAND}" -E echo "SKIPPED: no mpirun")
  endif()
  set_tests_properties(${name} PROPERTIES LABELS mpi TIMEOUT 120 PROCESSORS ${processes}
    SKIP_REGULAR_EXPRESSION "SKIPPED: no mpirun" ENVIRONMENT "${moe_mpi_environment}")
endfunction()
