include(CMakeFindDependencyMacro)
find_dependency(moe)
include("${CMAKE_CURRENT_LIST_DIR}/gatekeeperTargets.cmake")
