# Install rules and the CMake package. The package is the same wherever it was packed.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set(moe_package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/moe")

install(TARGETS moe EXPORT moeTargets FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}")
install(EXPORT moeTargets NAMESPACE moe:: DESTINATION "${moe_package_dir}")

configure_package_config_file(cmake/moeConfig.cmake.in
  "${PROJECT_BINARY_DIR}/moeConfig.cmake" INSTALL_DESTINATION "${moe_package_dir}")
# Before 1.0 a minor version may break its users. Headers run on every word size.
write_basic_package_version_file("${PROJECT_BINARY_DIR}/moeConfigVersion.cmake"
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/moeConfig.cmake" "${PROJECT_BINARY_DIR}/moeConfigVersion.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/cuda.cmake" "${PROJECT_SOURCE_DIR}/cmake/nccl.cmake"
  "${PROJECT_SOURCE_DIR}/cmake/mpi.cmake"
  DESTINATION "${moe_package_dir}")

install(FILES "${PROJECT_SOURCE_DIR}/LICENSE" DESTINATION "${CMAKE_INSTALL_DATADIR}/licenses/moe")
