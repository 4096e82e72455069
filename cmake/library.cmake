# The library: headers, a language level and threads. No flags, no definitions.
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

file(GLOB_RECURSE moe_headers CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/include/moe/*.hpp" "${PROJECT_SOURCE_DIR}/include/moe/*.cuh"
  "${PROJECT_SOURCE_DIR}/include/moe/*.inc")

add_library(moe INTERFACE)
add_library(moe::moe ALIAS moe)
target_compile_features(moe INTERFACE cxx_std_20)
target_link_libraries(moe INTERFACE Threads::Threads)
target_sources(moe INTERFACE
  FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include" FILES ${moe_headers})
