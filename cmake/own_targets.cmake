# Flags of moe's own programs. They hang on the targets, so they never reach a user.

# A build that names no type would run everything unoptimised.
get_property(moe_multi_config GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT moe_multi_config)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Build type." FORCE)
endif()

if(MOE_COVERAGE AND NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR "moe: MOE_COVERAGE needs g++, the compiler is ${CMAKE_CXX_COMPILER_ID}")
endif()

set(moe_own_flags -Wall -Wextra -Wpedantic -Wconversion -Wshadow)
set(moe_own_link_flags "")
if(MOE_WARNINGS_AS_ERRORS)
  list(APPEND moe_own_flags -Werror)
endif()
if(MOE_NATIVE)
  list(APPEND moe_own_flags -march=native)
endif()
if(MOE_SANITIZE)
  list(APPEND moe_own_flags -fsanitize=${MOE_SANITIZE} -fno-sanitize-recover=all
    -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS -DMOE_NO_TARGETS)
  list(APPEND moe_own_link_flags -fsanitize=${MOE_SANITIZE})
endif()
if(MOE_COVERAGE)
  # Atomic counts, because several threads run the same line; kept inline functions, because one
  # that no test calls has to show as not covered.
  list(APPEND moe_own_flags --coverage -fprofile-update=atomic -fkeep-inline-functions -DMOE_NO_TARGETS)
  list(APPEND moe_own_link_flags --coverage)
endif()

# Gives a program or object library of this project the library and the flags above.
function(moe_own_target target)
  target_link_libraries(${target} PRIVATE moe::moe)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${moe_own_flags}>)
  target_link_options(${target} PRIVATE ${moe_own_link_flags})
  set_target_properties(${target} PROPERTIES CXX_EXTENSIONS OFF)
endfunction()

# A BLAS with the C interface is one provider of the experts' products: tested and timed where it is.
find_path(MOE_CBLAS_INCLUDE_DIR cblas.h PATH_SUFFIXES openblas)
find_library(MOE_CBLAS_LIBRARY NAMES openblas cblas)
mark_as_advanced(MOE_CBLAS_INCLUDE_DIR MOE_CBLAS_LIBRARY)
add_library(moe_cblas INTERFACE)
if(MOE_CBLAS_INCLUDE_DIR AND MOE_CBLAS_LIBRARY)
  target_include_directories(moe_cblas SYSTEM INTERFACE "${MOE_CBLAS_INCLUDE_DIR}")
  target_link_libraries(moe_cblas INTERFACE "${MOE_CBLAS_LIBRARY}")
  target_compile_definitions(moe_cblas INTERFACE MOE_TEST_CBLAS MOE_BENCH_CBLAS)
else()
  message(STATUS "moe: no CBLAS here (Debian: libopenblas-dev), its provider is left out")
endif()

# Files called openmp_... use OpenMP. They are left out where the compiler has none, and under
# sanitizers: the thread sanitizer does not see the synchronisation inside the runtimes, and the leak
# checker reports what libomp keeps until the end.
find_package(OpenMP QUIET COMPONENTS CXX)
function(moe_openmp_files files_variable)
  set(openmp_files ${${files_variable}})
  list(FILTER openmp_files INCLUDE REGEX "(^|/)openmp_[^/]*$")
  if(openmp_files AND OpenMP_CXX_FOUND AND NOT MOE_SANITIZE)
    set_source_files_properties(${openmp_files} PROPERTIES COMPILE_OPTIONS "${OpenMP_CXX_FLAGS}")
    link_libraries(${OpenMP_CXX_LIBRARIES})
  elseif(openmp_files)
    message(STATUS "moe: left out, no OpenMP here: ${openmp_files}")
    list(REMOVE_ITEM ${files_variable} ${openmp_files})
    set(${files_variable} ${${files_variable}} PARENT_SCOPE)
  endif()
endfunction()
