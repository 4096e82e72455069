# The target moe::nccl, where NCCL is: moe::cuda and NCCL, for moe/comm/nccl.cuh. Read after cuda.cmake, by the
# build and by the installed package.
find_path(MOE_NCCL_INCLUDE_DIR nccl.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
find_library(MOE_NCCL_LIBRARY nccl HINTS "${CUDAToolkit_LIBRARY_DIR}")
mark_as_advanced(MOE_NCCL_INCLUDE_DIR MOE_NCCL_LIBRARY)
if(MOE_NCCL_INCLUDE_DIR AND MOE_NCCL_LIBRARY AND NOT TARGET moe::nccl)
  add_library(moe::nccl INTERFACE IMPORTED GLOBAL)
  target_include_directories(moe::nccl INTERFACE "${MOE_NCCL_INCLUDE_DIR}")
  target_link_libraries(moe::nccl INTERFACE moe::cuda "${MOE_NCCL_LIBRARY}")
endif()
