# Runs a command that has to fail with a certain message: a test that a check can fail.
#   cmake -DMESSAGE=<regular expression> -P expect_failure.cmake -- <command> <argument>...
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/arguments.cmake")
if(NOT moe_arguments OR NOT MESSAGE)
  message(FATAL_ERROR "usage: cmake -DMESSAGE=<regex> -P expect_failure.cmake -- <command>...")
endif()

execute_process(COMMAND ${moe_arguments} RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE out)
string(REGEX REPLACE "[ \n]+" " " flat "${out}")  # CMake wraps its messages
if(result EQUAL 0)
  message(FATAL_ERROR "the command succeeded, it has to fail with \"${MESSAGE}\":\n${out}")
elseif(NOT flat MATCHES "${MESSAGE}")
  message(FATAL_ERROR "the command failed without saying \"${MESSAGE}\":\n${out}")
endif()
message(STATUS "failed as it should: ${CMAKE_MATCH_0}")
