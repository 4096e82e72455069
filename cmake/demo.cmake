# Builds the demo and runs it on a real text, after installing what that needs.
#   cmake -P cmake/demo.cmake [-- <argument of the demo>...]
# Without arguments the text is a header of the compiler's own standard library.
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/dependencies.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/generator.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/arguments.cmake")
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source_dir)

set(demo_target route_text)  # the program under examples/apps that is the demo

moe_require(compiler generator)

function(step)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY "${source_dir}" COMMAND_ECHO STDOUT
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "moe: the demo FAILED (see above)")
  endif()
endfunction()

step("${CMAKE_COMMAND}" --preset cpu --fresh ${moe_generator} -DMOE_TESTS=OFF -B build/demo)
step("${CMAKE_COMMAND}" --build build/demo --parallel ${moe_jobs} --target moe_example_${demo_target})

set(text "${moe_arguments}")
if(text STREQUAL "")
  file(STRINGS "${source_dir}/build/demo/CMakeCache.txt" compiler REGEX "^CMAKE_CXX_COMPILER:")
  string(REGEX REPLACE "^[^=]*=" "" compiler "${compiler}")
  execute_process(COMMAND "${compiler}" -x c++ -std=c++20 -M -include algorithm /dev/null
    OUTPUT_VARIABLE headers COMMAND_ERROR_IS_FATAL ANY)
  # In libstdc++ the algorithms themselves stand in another header.
  if(headers MATCHES "[^ \n]+/stl_algo\\.h")
  elseif(NOT headers MATCHES "[^ \n]+/algorithm")
    message(FATAL_ERROR "moe: ${compiler} does not say where <algorithm> is")
  endif()
  cmake_path(SET text NORMALIZE "${CMAKE_MATCH_0}")
endif()
step("${source_dir}/build/demo/examples/${demo_target}" ${text})
message(STATUS "moe: the demo ran")
