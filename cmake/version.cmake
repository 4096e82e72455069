# Sets moe_version from the header that is the one place to hold it.
set(moe_version_header "${CMAKE_CURRENT_LIST_DIR}/../include/moe/core/version.hpp")
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${moe_version_header}")
file(READ "${moe_version_header}" moe_version_text)

set(moe_version "")
foreach(part MAJOR MINOR PATCH)
  if(NOT moe_version_text MATCHES "#define MOE_VERSION_${part} ([0-9]+)")
    message(FATAL_ERROR "moe: no MOE_VERSION_${part} in ${moe_version_header}")
  endif()
  list(APPEND moe_version ${CMAKE_MATCH_1})
endforeach()
list(JOIN moe_version "." moe_version)
