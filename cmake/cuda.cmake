# The target moe::cuda: the library for programs in CUDA C++. Read by the build where MOE_CUDA is on, and by
# the installed package where the component cuda is asked for.
find_package(CUDAToolkit 12.3 REQUIRED)
if(NOT TARGET moe::cuda)
  add_library(moe::cuda INTERFACE IMPORTED GLOBAL)
  target_link_libraries(moe::cuda INTERFACE moe::moe CUDA::cudart)
  # As an option, because CMake 3.25 does not know that nvcc speaks C++20.
  target_compile_options(moe::cuda INTERFACE $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-std=c++20>)
endif()
