// Whether a sum replaces what its output held or is added to it.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// What becomes of the old content of an output.
enum class update : std::uint8_t {
  assign,  ///< It is never read.
  add      ///< The result is added to it: a residual stream, a gradient of several terms.
};

}  // namespace moe::inline MOE_ABI
