// Plans from plans: the way back, one after another, finer slots.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

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
  void sum(std::vector<row_move>& moves, slot_at from, slot_at to, int count) {
    for (int i = 0; i < count; ++i) {
      slot_at const target{to.buffer, to.slot + i};
      append_move(moves, {{from.buffer, from.slot + i},
                          target,
                          1,
                          any(target, 1) ? row_action::add : row_action::copy});
      set(target, 1);
    }
  }
  /// Adds rows to those they were selected from.
  void scatter(std::vector<row_move>& moves, slot_at from, slot_at to, piece const& what) {
    if (!any(to, 1)) moves.push_back({{}, to, 1, row_action::clear, {}});
    set(to, 1);
    moves.push_back({from, to, 1, row_action::scatter, what});
  }
  void select(std::vector<row_move>& moves, slot_at from, slot_at to, piece const& what) {
    set(to, 1);
    moves.push_back({from, to, 1, row_action::select, what});
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
    for (auto m = moves.rbegin(); m != moves.rend(); ++m) {
      slot_at const from = there(m->to), to = there(m->from);
      if (m->action == row_action::select)
        written.scatter(out, from, to, m->what);
      else if (m->action == row_action::scatter)
        written.select(out, from, to, m->what);
      else if (m->action != row_action::clear)
        written.sum(out, from, to, m->count);
    }
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
        written.sum(*moves, staged, to, m.count);
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
    for (row_move& m : phase.moves) m = {where(m.from), where(m.to), m.count, m.action, m.what};
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
/// @throws precondition_error if n < 1, or if the plan selects tokens, which have no parts.
inline exchange_plan split_slots(exchange_plan plan, int n, call_site site = call_site::here()) {
  expects(n >= 1, "split_slots: n >= 1", site, {{"n", n}});
  auto const split_names = [n](std::vector<piece>& names) {
    std::vector<piece> finer;
    for (piece const& p : names)
      for (int i = 0; i < n; ++i)
        finer.push_back({p.source, p.destination, p.part * n + i, p.span});
    names = std::move(finer);
  };
  auto const split_moves = [&](std::vector<row_move>& moves) {
    for (row_move& m : moves) {
      expects(m.action == row_action::copy || m.action == row_action::add,
              "split_slots: the plan selects no tokens", site);
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
