# Where NCCL is, moe_nccl_version (22809 is 2.28.9, 0 is none), and the target moe::nccl for moe/comm/nccl.cuh:
# moe::cuda and NCCL, 2.18 or later. Read after cuda.cmake, by the build and by the installed package; by the
# tests without CUDA for the headers alone.
find_path(MOE_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS} PATHS /usr/local/cuda/include)
# The toolkit's library folder may be one of links to its own libraries alone; NCCL then lies beside its header.
find_library(MOE_NCCL_LIBRARY nccl HINTS "${CUDAToolkit_LIBRARY_DIR}" "${MOE_NCCL_INCLUDE_DIR}/.."
  PATH_SUFFIXES lib64 lib)
mark_as_advanced(MOE_NCCL_INCLUDE_DIR MOE_NCCL_LIBRARY)
set(moe_nccl_version 0)
if(MOE_NCCL_INCLUDE_DIR)
  file(STRINGS "${MOE_NCCL_INCLUDE_DIR}/nccl.h" moe_nccl_version REGEX "define NCCL_VERSION_CODE +[0-9]+")
  string(REGEX REPLACE "[^0-9]" "" moe_nccl_version "0${moe_nccl_version}")
endif()
if(moe_nccl_version GREATER_EQUAL 21800 AND MOE_NCCL_LIBRARY AND TARGET moe::cuda AND NOT TARGET moe::nccl)
  add_library(moe::nccl INTERFACE IMPORTED GLOBAL)
  target_include_directories(moe::nccl INTERFACE "${MOE_NCCL_INCLUDE_DIR}")
  target_link_libraries(moe::nccl INTERFACE moe::cuda "${MOE_NCCL_LIBRARY}")
endif()
