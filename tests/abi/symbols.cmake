# No function body of the library may have the same symbol in two objects that were compiled for
# different instruction sets: the linker keeps one of them, and it may be the wrong one.
# Exceptions are one type everywhere, so that they can be caught everywhere; their constructors and
# destructors are excepted.
#   cmake -DNM=<nm> -DONE=<object> -DOTHER=<object> -P symbols.cmake
cmake_minimum_required(VERSION 3.25)
function(moe_functions object result)
  execute_process(COMMAND "${NM}" --defined-only "${object}" OUTPUT_VARIABLE out
    COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[ ][WT] _Z[A-Za-z0-9_.]*3moe[A-Za-z0-9_.]*" symbols "${out}")
  list(FILTER symbols EXCLUDE REGEX "_ZN3moe[0-9]+([a-z]+_)?error[CD][0-9]")
  set(${result} "${symbols}" PARENT_SCOPE)
endfunction()

moe_functions("${ONE}" one)
moe_functions("${OTHER}" other)
if(NOT one OR NOT other)
  message(FATAL_ERROR "no function of moe in ${ONE} or ${OTHER}")
endif()
set(shared "")
foreach(symbol IN LISTS one)
  if(symbol IN_LIST other)
    string(APPEND shared "\n ${symbol}")
  endif()
endforeach()
if(shared)
  message(FATAL_ERROR "the same symbol for two instruction sets:${shared}")
endif()
list(LENGTH one count)
message(STATUS "${count} functions, none shared")
