// A communication strategy as data: what one rank copies, sends and receives, without any sizes.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// The name of some rows. An exchange gives every output slot the sum of all input slots, of all
/// ranks, that have the same name; in an all-to-all each name stands in one of either.
///
/// A piece of several destinations holds the tokens of its source that any of them wants, each once:
/// a plan can *select* from it those for fewer destinations, and add what comes back to them.
struct piece {
  int source = -1;       ///< Index of the rank it comes from; -1: of several.
  int destination = -1;  ///< Index of the rank it goes to; -1: all.
  int part = 0;
  int span = 1;  ///< Destinations: `destination` and the indices that follow it.

  friend constexpr bool operator==(piece const&, piece const&) = default;
};

/// A place in a plan. Buffers are rows of slots; a slot holds any number of rows, which is known only
/// when the plan is bound. Buffer 0 is the input, 1 the output, the others are staging.
struct slot_at {
  int buffer = 0;
  int slot = 0;

  friend constexpr bool operator==(slot_at const&, slot_at const&) = default;
};

enum class row_action : std::uint8_t {
  copy,  ///< Into slots that nothing was written to.
  add,   ///< Onto what they hold.
  select,  ///< One slot: of its rows those that `what` names, into a slot that nothing was written to.
  clear,   ///< Nothing is read: zeros into a slot that nothing was written to.
  scatter  ///< One slot, of rows that `what` names: each is added to the row it was selected from.
};

/// `count` consecutive slots go to as many others of the same rank.
struct row_move {
  slot_at from;
  slot_at to;
  int count = 1;
  row_action action = row_action::copy;
  piece what = {};  ///< Of select and scatter; it has no part.

  friend constexpr bool operator==(row_move const&, row_move const&) = default;
};

/// `count` consecutive slots go to, or come from, another rank.
struct message {
  int peer = 0;  ///< As the communicator counts.
  slot_at at;
  int count = 1;

  friend constexpr bool operator==(message const&, message const&) = default;
};

/// Local moves, in order, and then messages, all at once.
struct exchange_phase {
  std::vector<row_move> moves;
  std::vector<message> sends;
  std::vector<message> receives;

  friend bool operator==(exchange_phase const&, exchange_phase const&) = default;
};

/// What one rank does in an exchange.
///
/// Invariants, which `verify_plans` checks over the plans of all ranks: every rank has the same number of
/// phases; message i from a to b in a phase is received as message i from a in the same phase of b;
/// a slot is written once, by a copy or a message, and then only added to; nothing reads a slot that
/// was not written. So a plan that passes cannot deadlock, whatever the counts.
struct exchange_plan {
  int rank = 0;  ///< As the communicator counts.
  std::uint64_t epoch = 0;
  std::vector<int> buffers = {0, 0};  ///< Slots of each.
  std::vector<piece> input = {};      ///< [buffers[0]] what the caller puts there.
  std::vector<piece> output = {};     ///< [buffers[1]] what the caller finds there.
  std::vector<exchange_phase> phases = {};
  std::vector<row_move> last = {};  ///< Local moves after the last phase.

  friend bool operator==(exchange_plan const&, exchange_plan const&) = default;
};

namespace detail {

/// Appends a move, or lengthens the last one.
inline void append_move(std::vector<row_move>& moves, row_move const& next) {
  if (!moves.empty()) {
    row_move& m = moves.back();
    bool const mergeable = next.action == row_action::copy || next.action == row_action::add;
    bool const follows = mergeable && m.action == next.action &&
                         m.from.buffer == next.from.buffer && m.to.buffer == next.to.buffer &&
                         m.from.slot + m.count == next.from.slot &&
                         m.to.slot + m.count == next.to.slot;
    if (follows) {
      m.count += next.count;
      return;
    }
  }
  moves.push_back(next);
}

inline int add_buffer(exchange_plan& plan, int slots) {
  plan.buffers.push_back(slots);
  return static_cast<int>(plan.buffers.size()) - 1;
}

}  // namespace detail

}  // namespace moe::inline MOE_ABI
