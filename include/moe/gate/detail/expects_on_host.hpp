// Checks inside of policies, which on a device are preconditions. Private to gate/.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI::detail {

/// @throws precondition_error on the CPU, with `what` = value; a kernel has nobody to throw to.
MOE_NO_EXEC_CHECK
MOE_HOST_DEVICE constexpr void expects_on_host([[maybe_unused]] bool condition,
                                               [[maybe_unused]] char const* rule,
                                               [[maybe_unused]] char const* what,
                                               [[maybe_unused]] std::int64_t value) {
#if !MOE_DEVICE_PASS
  expects(condition, rule, call_site::here(), {{what, value}});
#endif
}

}  // namespace moe::inline MOE_ABI::detail
