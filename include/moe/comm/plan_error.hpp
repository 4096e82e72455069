// What can be wrong with plans.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

enum class plan_error : std::uint8_t {
  none,
  shape,  ///< Ranks that repeat or differ in phases or epoch, or ends that do not fit the buffers.
  out_of_range,     ///< A slot or a peer that does not exist, or less than one slot.
  unwritten,        ///< Reads a slot that holds nothing, or adds to one.
  overwritten,      ///< Writes a slot a second time, or the input.
  unmatched,        ///< A message that is not received, or not sent, in its phase.
  other_count,      ///< Sent and received numbers of slots differ.
  other_extent,     ///< A sum of slots that may have different numbers of rows.
  wrong_selection,  ///< Select or scatter of tokens that a slot does not hold, or of several slots.
  incomplete,       ///< Reads a cleared slot that lacks tokens of a destination, or got some twice.
  wrong_rows        ///< An output slot lacks rows, or has others, or some twice.
};

/// What is wrong with plans, or nothing.
struct plan_verdict {
  plan_error error = plan_error::none;
  int rank = -1;   ///< As the communicator counts.
  int phase = -1;  ///< The number of phases: after the last.
  int slot = -1;   ///< Of an output slot, or where a message or move begins.

  constexpr explicit operator bool() const noexcept { return error == plan_error::none; }
  friend constexpr bool operator==(plan_verdict const&, plan_verdict const&) = default;
};

}  // namespace moe::inline MOE_ABI
