# CUDA for moe's own programs.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real)
endif()
enable_language(CUDA)
include("${CMAKE_CURRENT_LIST_DIR}/cuda.cmake")
include("${CMAKE_CURRENT_LIST_DIR}/nccl.cmake")

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

# Files called nccl_... or NN_nccl... need NCCL, and are left out where there is none.
function(moe_nccl_files files_variable)
  if(NOT TARGET moe::nccl)
    set(files ${${files_variable}})
    set(nccl_files ${files})
    list(FILTER nccl_files INCLUDE REGEX "(^|/)([0-9]+_)?nccl[^/]*$")
    list(REMOVE_ITEM files ${nccl_files})
    message(STATUS "moe: left out, no NCCL here: ${nccl_files}")
    set(${files_variable} ${files} PARENT_SCOPE)
  endif()
endfunction()
function(moe_link_nccl target file)
  if(file MATCHES "(^|/)([0-9]+_)?nccl[^/]*$")
    target_link_libraries(${target} PRIVATE moe::nccl)
  endif()
endfunction()
