// A communication strategy as data: what one rank copies, sends and receives, without any sizes.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// The name of some rows. An exchange gives every output slot the sum of all input slots, of all
/// ranks, that have the same name; in an all-to-all each name stands in one of either.
struct piece {
  int source = -1;       ///< Index of the rank it comes from; -1: of several.
  int destination = -1;  ///< Index of the rank it goes to; -1: all.
  int part = 0;

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
  add    ///< Onto what they hold.
};

/// `count` consecutive slots go to as many others of the same rank.
struct row_move {
  slot_at from;
  slot_at to;
  int count = 1;
  row_action action = row_action::copy;

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
    bool const follows = m.action == next.action && m.from.buffer == next.from.buffer &&
                         m.to.buffer == next.to.buffer && m.from.slot + m.count == next.from.slot &&
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

/// Which slots of a plan have been written so far.
class written_slots {
 public:
  explicit written_slots(exchange_plan const& plan) {
    for (int const slots : plan.buffers) written_.emplace_back(static_cast<std::size_t>(slots), 0);
    std::fill(written_[0].begin(), written_[0].end(), std::uint8_t{1});
  }

  bool any(slot_at at, int count) const {
    auto const* const first = written_[static_cast<std::size_t>(at.buffer)].data() + at.slot;
    return std::find(first, first + count, 1) != first + count;
  }
  void set(slot_at at, int count) {
    auto* const first = written_[static_cast<std::size_t>(at.buffer)].data() + at.slot;
    std::fill(first, first + count, std::uint8_t{1});
  }
  /// Copies into slots that hold nothing and adds to the others, which it makes written.
  void move(std::vector<row_move>& moves, slot_at from, slot_at to, int count) {
    for (int i = 0; i < count; ++i) {
      slot_at const target{to.buffer, to.slot + i};
      append_move(moves, {{from.buffer, from.slot + i},
                          target,
                          1,
                          any(target, 1) ? row_action::add : row_action::copy});
      set(target, 1);
    }
  }

 private:
  std::vector<std::vector<std::uint8_t>> written_;
};

}  // namespace detail

/// The way back: everything in reverse, input and output exchanged. What was read several times is
/// summed, in the order of the result's moves; so it is the plan of the gradient of `plan`.
///
/// @pre  `plan` is one that `verify_plans` accepts, and reads every slot that it writes or is given.
/// @post transpose(transpose(p)) == p, up to the order of moves, if p reads every slot once.
inline exchange_plan transpose(exchange_plan const& plan) {
  exchange_plan back = {.rank = plan.rank,
                        .epoch = plan.epoch,
                        .buffers = plan.buffers,
                        .input = plan.output,
                        .output = plan.input};
  std::swap(back.buffers[0], back.buffers[1]);
  auto const there = [](slot_at at) {
    return slot_at{at.buffer < 2 ? 1 - at.buffer : at.buffer, at.slot};
  };
  detail::written_slots written(back);
  auto const reverse_moves = [&](std::vector<row_move> const& moves, std::vector<row_move>& out) {
    for (auto m = moves.rbegin(); m != moves.rend(); ++m)
      written.move(out, there(m->to), there(m->from), m->count);
  };

  back.phases.resize(plan.phases.size());
  std::vector<row_move>* moves = back.phases.empty() ? &back.last : &back.phases[0].moves;
  reverse_moves(plan.last, *moves);
  for (std::size_t i = 0; i < back.phases.size(); ++i) {
    exchange_phase const& forward = plan.phases[plan.phases.size() - 1 - i];
    exchange_phase& phase = back.phases[i];
    for (message const& m : forward.receives) phase.sends.push_back({m.peer, there(m.at), m.count});
    moves = i + 1 < back.phases.size() ? &back.phases[i + 1].moves : &back.last;
    for (message const& m : forward.sends) {
      slot_at const to = there(m.at);
      if (!written.any(to, m.count)) {
        phase.receives.push_back({m.peer, to, m.count});
        written.set(to, m.count);
      } else {  // these rows went to several ranks: what comes back is added
        slot_at const staged{detail::add_buffer(back, m.count), 0};
        phase.receives.push_back({m.peer, staged, m.count});
        written.move(*moves, staged, to, m.count);
      }
    }
    reverse_moves(forward.moves, *moves);
  }
  return back;
}

/// One exchange after another: the output of `first` is the input of `second`.
/// @throws precondition_error unless both are of one rank and first.output == second.input.
inline exchange_plan then(exchange_plan first, exchange_plan const& second,
                          call_site site = call_site::here()) {
  expects(
      first.rank == second.rank && first.epoch == second.epoch && first.output == second.input,
      "then: plans of one rank and epoch, the output of the first being the input of the second",
      site, {{"first.rank", first.rank}, {"second.rank", second.rank}});
  // The buffer between them becomes staging, and so do those of the second, behind the first's.
  int const between = detail::add_buffer(first, first.buffers[1]);
  first.buffers[1] = second.buffers[1];
  first.buffers.insert(first.buffers.end(), second.buffers.begin() + 2, second.buffers.end());
  auto const in_first = [&](slot_at at) {
    return slot_at{at.buffer == 1 ? between : at.buffer, at.slot};
  };
  auto const in_second = [&](slot_at at) {
    int const b = at.buffer;
    return slot_at{b == 0 ? between : b == 1 ? 1 : between + b - 1, at.slot};
  };
  auto const rename = [](exchange_phase phase, auto const& where) {
    for (row_move& m : phase.moves) m = {where(m.from), where(m.to), m.count, m.action};
    for (message& m : phase.sends) m.at = where(m.at);
    for (message& m : phase.receives) m.at = where(m.at);
    return phase;
  };
  for (exchange_phase& phase : first.phases) phase = rename(std::move(phase), in_first);
  std::vector<row_move> carried = rename({std::move(first.last), {}, {}}, in_first).moves;
  auto const after = [&](std::vector<row_move> const& moves) {
    std::vector<row_move> all = std::exchange(carried, {});
    all.insert(all.end(), moves.begin(), moves.end());
    return all;
  };
  for (exchange_phase const& phase : second.phases) {
    exchange_phase next = rename(phase, in_second);
    next.moves = after(next.moves);
    first.phases.push_back(std::move(next));
  }
  first.last = after(rename({second.last, {}, {}}, in_second).moves);
  first.output = second.output;
  return first;
}

/// The same exchange of finer slots: each becomes n consecutive ones, part 0, 1, ... of it, say one for
/// each expert of the destination. No more messages and no more moves than before.
///
/// @post  Slot i of an end is slots i n .. i n + n - 1; part p of a piece is parts p n .. p n + n - 1.
/// @throws precondition_error if n < 1.
inline exchange_plan split_slots(exchange_plan plan, int n, call_site site = call_site::here()) {
  expects(n >= 1, "split_slots: n >= 1", site, {{"n", n}});
  auto const split_names = [n](std::vector<piece>& names) {
    std::vector<piece> finer;
    for (piece const& p : names)
      for (int i = 0; i < n; ++i) finer.push_back({p.source, p.destination, p.part * n + i});
    names = std::move(finer);
  };
  auto const split_moves = [n](std::vector<row_move>& moves) {
    for (row_move& m : moves) {
      m.from.slot *= n;
      m.to.slot *= n;
      m.count *= n;
    }
  };
  auto const split_messages = [n](std::vector<message>& messages) {
    for (message& m : messages) {
      m.at.slot *= n;
      m.count *= n;
    }
  };
  split_names(plan.input);
  split_names(plan.output);
  for (int& slots : plan.buffers) slots *= n;
  for (exchange_phase& phase : plan.phases) {
    split_moves(phase.moves);
    split_messages(phase.sends);
    split_messages(phase.receives);
  }
  split_moves(plan.last);
  return plan;
}

}  // namespace moe::inline MOE_ABI
