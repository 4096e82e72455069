# CUDA for moe's own programs.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real)
endif()
enable_language(CUDA)
include("${CMAKE_CURRENT_LIST_DIR}/cuda.cmake")

set(moe_own_cuda_flags -Xcompiler=-Wall,-Wextra,-Wconversion,-Wshadow)
if(MOE_WARNINGS_AS_ERRORS)
  list(APPEND moe_own_cuda_flags -Werror=all-warnings)
endif()

# All of them: what a machine with a GPU has to build.
add_custom_target(moe_cuda_programs)

# Gives a program of this project the library and the flags above.
function(moe_own_cuda_target target)
  target_link_libraries(${target} PRIVATE moe::cuda)
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${moe_own_cuda_flags}>)
  add_dependencies(moe_cuda_programs ${target})
endfunction()
