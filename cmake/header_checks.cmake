# Compiles every header on its own terms (see tests/headers/CMakeLists.txt).
#   cmake [-DCHECK=cxx|cuda|controls] [-DCXX=<compiler>] [-DNVCC=<compiler>] [-DWORK=<folder>]
#         -P cmake/header_checks.cmake
# controls: runs the checks (with NVCC: the CUDA one) on headers that are wrong on purpose; each has
# to be refused.
cmake_minimum_required(VERSION 3.25)
cmake_path(GET CMAKE_CURRENT_LIST_DIR PARENT_PATH source_dir)
if(NOT CHECK)
  set(CHECK cxx)
endif()
if(NOT CXX)
  set(CXX c++)
endif()
if(NOT WORK)
  cmake_path(GET CXX FILENAME compiler_name)
  set(WORK "${source_dir}/build/headers-${CHECK}-${compiler_name}")
endif()
include("${CMAKE_CURRENT_LIST_DIR}/generator.cmake")

# Sets `result` (0: fine) and `out` (what the tools said).
macro(check_headers header_dir work)
  execute_process(
    COMMAND "${CMAKE_COMMAND}" -S "${source_dir}/tests/headers" -B "${work}" ${moe_generator}
      "-DCMAKE_CXX_COMPILER=${CXX}" "-DHEADER_DIR=${header_dir}" "-DNVCC=${nvcc}"
      "-DUPDATE=${UPDATE}"
    RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE out)
  if(result EQUAL 0)
    string(REGEX MATCH "checking [0-9]+ headers" checked "${out}")
    string(REGEX MATCH "left out,[^\n]*" left_out "${out}")
    execute_process(COMMAND "${CMAKE_COMMAND}" --build "${work}" --parallel ${moe_jobs} -- ${keep_going}
      RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE out)
  endif()
endmacro()

function(expect_refusal fixture message)
  file(REMOVE_RECURSE "${WORK}/${fixture}")
  check_headers("${source_dir}/tests/headers/bad/${fixture}" "${WORK}/${fixture}")
  if(result EQUAL 0)
    message(SEND_ERROR "control ${fixture}: the check accepted a wrong header")
  elseif(NOT out MATCHES "${message}")
    message(SEND_ERROR "control ${fixture}: refused, but not for \"${message}\":\n${out}")
  else()
    message(STATUS "control ${fixture}: refused, as it should be")
  endif()
endfunction()

# All wrong headers are reported, not the first one only.
set(keep_going -k)
if(moe_generator MATCHES "Ninja" OR "$ENV{CMAKE_GENERATOR}" MATCHES "Ninja")
  set(keep_going -k 0)
endif()

set(nvcc "${NVCC}")
if(CHECK STREQUAL "controls" AND NVCC)
  expect_refusal(missing_include "vector")
  expect_refusal(warning "-Werror[=,]|-W[a-z0-9-]*conversion")
  return()
elseif(CHECK STREQUAL "controls")
  expect_refusal(missing_include "vector")
  expect_refusal(missing_guard "redefinition of")
  expect_refusal(not_inline "multiple definition|duplicate symbol")
  expect_refusal(macro_name "hostile macro: near|hostile_macros.hpp")
  expect_refusal(warning "-Werror[=,]|-W[a-z0-9-]*conversion")
  expect_refusal(not_in_umbrella "does not include moe/core/fixture.hpp")
  expect_refusal(no_such_folder "no headers under")
  return()
elseif(CHECK STREQUAL "cuda")
  if(NOT NVCC)
    find_program(NVCC nvcc PATHS /usr/local/cuda/bin REQUIRED)
    set(nvcc "${NVCC}")
  endif()
elseif(CHECK STREQUAL "cxx")
  set(nvcc "")
else()
  message(FATAL_ERROR "CHECK is \"${CHECK}\"; it may be cxx, cuda or controls")
endif()

check_headers("${source_dir}/include" "${WORK}")
if(NOT result EQUAL 0)
  message(FATAL_ERROR "header check ${CHECK} failed:\n${out}")
endif()
message(STATUS "header check ${CHECK}: ${checked}, all fine ${left_out}")
