# Builds the demo, which trains language models on real text, and runs it, after installing what that
# needs.
#   cmake -P cmake/demo.cmake [-- <argument of the demo>...]       (-- --help lists them)
# The text is the headers of the compiler's own standard library unless --text names files.
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/dependencies.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/arguments.cmake")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source_dir)

set(demo_target pr_moe_text)  # the program under examples/apps that is the demo

moe_require(compiler generator)
include("${CMAKE_CURRENT_LIST_DIR}/generator.cmake")  # it looks for what is there now

function(step)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY "${source_dir}" COMMAND_ECHO STDOUT
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "moe: the demo FAILED (see above)")
  endif()
endfunction()

step("${CMAKE_COMMAND}" --preset cpu --fresh ${moe_generator} -DMOE_TESTS=OFF -DMOE_NATIVE=ON
  -B build/demo)
step("${CMAKE_COMMAND}" --build build/demo --parallel ${moe_jobs} --target moe_example_${demo_target})

step("${source_dir}/build/demo/examples/${demo_target}" ${moe_arguments})
message(STATUS "moe: the demo ran")
