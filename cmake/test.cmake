# Builds the tests and the examples and runs them, after installing what that needs.
#   cmake -P cmake/test.cmake [-- <argument of ctest>...]
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/dependencies.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/arguments.cmake")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source_dir)

moe_require(compiler generator doctest json)
include("${CMAKE_CURRENT_LIST_DIR}/generator.cmake")  # it looks for what is there now

function(step)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY "${source_dir}" COMMAND_ECHO STDOUT
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "moe: tests FAILED (see above)")
  endif()
endfunction()

step("${CMAKE_COMMAND}" --preset cpu --fresh ${moe_generator})
step("${CMAKE_COMMAND}" --build build/cpu --parallel ${moe_jobs})
# The headers one by one, the package and CUDA are stages of their own in .ci/run.
step("${CMAKE_CTEST_COMMAND}" --test-dir build/cpu --output-on-failure --no-tests=error
  --parallel ${moe_jobs} --label-regex "^(cpu|abi|docs|mpi)$" ${moe_arguments})
message(STATUS "moe: all tests passed")
