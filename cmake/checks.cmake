# Checks that are not programs of ours, registered as tests. Each has a negative control.
# Labels: headers, cuda, docs, package.
function(moe_check name label)
  add_test(NAME moe.${name} COMMAND "${CMAKE_COMMAND}" ${ARGN})
  set_tests_properties(moe.${name} PROPERTIES LABELS ${label} TIMEOUT 900)
  if(label MATCHES "^(headers|cuda)$")  # a parallel build each
    set_tests_properties(moe.${name} PROPERTIES RUN_SERIAL ON)
  endif()
endfunction()

set(header_checks -P "${PROJECT_SOURCE_DIR}/cmake/header_checks.cmake")
set(header_compilers "${CMAKE_CXX_COMPILER}")
find_program(MOE_CLANG clang++ DOC "A second compiler for the header checks.")
if(MOE_CLANG AND NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  list(APPEND header_compilers "${MOE_CLANG}")
endif()
foreach(compiler IN LISTS header_compilers)
  cmake_path(GET compiler FILENAME name)
  moe_check(headers.${name} headers -DCHECK=cxx "-DCXX=${compiler}"
    "-DWORK=${PROJECT_BINARY_DIR}/headers/${name}" ${header_checks})
  moe_check(headers.${name}_control headers -DCHECK=controls "-DCXX=${compiler}"
    "-DWORK=${PROJECT_BINARY_DIR}/headers/${name}_control" ${header_checks})
endforeach()

if(MOE_CUDA_CHECKS)
  find_program(MOE_NVCC nvcc PATHS /usr/local/cuda/bin REQUIRED DOC "The CUDA compiler.")
  moe_check(headers.cuda cuda -DCHECK=cuda "-DNVCC=${MOE_NVCC}" "-DCXX=${CMAKE_CXX_COMPILER}"
    "-DWORK=${PROJECT_BINARY_DIR}/headers/cuda" ${header_checks})
  moe_check(headers.cuda_control cuda -DCHECK=controls "-DNVCC=${MOE_NVCC}"
    "-DCXX=${CMAKE_CXX_COMPILER}" "-DWORK=${PROJECT_BINARY_DIR}/headers/cuda_control"
    ${header_checks})
  moe_check(package.cuda cuda -DCONSUMER=cuda "-DCXX=${CMAKE_CXX_COMPILER}" "-DNVCC=${MOE_NVCC}"
    "-DWORK=${PROJECT_BINARY_DIR}/package/cuda" -P "${PROJECT_SOURCE_DIR}/tests/package/run.cmake")
  cmake_path(GET MOE_NVCC PARENT_PATH toolkit)
  cmake_path(GET toolkit PARENT_PATH toolkit)
  set(nccl_consumers no_nccl)
  if(TARGET moe::nccl)
    list(APPEND nccl_consumers nccl)
  endif()
  foreach(consumer IN LISTS nccl_consumers)
    moe_check(package.${consumer} cuda "-DCONSUMER=${consumer}" "-DCXX=${CMAKE_CXX_COMPILER}"
      "-DTOOLKIT=${toolkit}" "-DWORK=${PROJECT_BINARY_DIR}/package/${consumer}"
      -P "${PROJECT_SOURCE_DIR}/tests/package/run.cmake")
  endforeach()
endif()

set(consumers find_package add_subdirectory fetch_content exported unknown_component wrong_version
  no_cuda no_mpi options)
if(moe_has_mpi)
  list(APPEND consumers mpi)
endif()
foreach(consumer IN LISTS consumers)
  moe_check(package.${consumer} package "-DCONSUMER=${consumer}" "-DCXX=${CMAKE_CXX_COMPILER}"
    "-DWORK=${PROJECT_BINARY_DIR}/package/${consumer}"
    -P "${PROJECT_SOURCE_DIR}/tests/package/run.cmake")
endforeach()

set(snippet_checks -P "${PROJECT_SOURCE_DIR}/cmake/snippet_checks.cmake")
moe_check(docs.snippets docs "-DPROGRAMS=${PROJECT_BINARY_DIR}/examples" ${snippet_checks})
moe_check(docs.controls docs -DCONTROLS=ON "-DPROGRAMS=${PROJECT_BINARY_DIR}/examples"
  ${snippet_checks})
