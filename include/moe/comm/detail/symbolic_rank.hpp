// One rank of a plan that is run on numbers: its slots, and what moves do to them.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/comm/detail/symbolic_rows.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/plan_error.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Functions give a verdict without rank and phase. They trust nothing but the ends and the sizes of
/// buffers.
class symbolic_rank {
 public:
  /// @param input  Of all ranks; gets the input of this one.
  /// @param R      Ranks whose indices selections can name.
  symbolic_rank(exchange_plan const& plan, symbolic_input& input, std::int64_t R)
      : plan_(&plan), input_(&input), R_(R) {
    std::size_t total = 0;
    for (int const slots : plan.buffers) {
      first_.push_back(total);
      total += static_cast<std::size_t>(slots);
    }
    slots_.resize(total);
    symbolic_slot* slot = slots_.data();
    for (piece const& p : plan.input) {
      std::int64_t const number = input.push_back(p);
      *slot++ = original(number, p.destination, symbolic_input::last_destination(p));
    }
  }

  symbolic_slot* at(slot_at where) { return slots_.data() + place(where); }
  symbolic_slot const* at(slot_at where) const { return slots_.data() + place(where); }

  /// What a slot holds. No destinations: nothing.
  piece name(slot_at where) const {
    symbolic_slot const& s = *at(where);
    if (s.like < 0) return {-1, -1, 0, 0};
    piece const& origin = input_->name(s.like);
    return {origin.source, s.first, origin.part, s.last - s.first};
  }

  /// Whether slots hold what can be read.
  plan_verdict read(slot_at where, int count) {
    if (!exists(where, count)) return wrong(plan_error::out_of_range, where);
    symbolic_slot* const slot = at(where);
    for (int i = 0; i < count; ++i) {
      if (slot[i].settle()) continue;
      bool const nothing = slot[i].state == symbolic_slot::phase::unwritten;
      return wrong(nothing ? plan_error::unwritten : plan_error::incomplete, where);
    }
    return {};
  }

  enum class writing : std::uint8_t { anew, onto };
  /// Whether slots can be written to.
  plan_verdict write(slot_at where, int count, writing how) const {
    if (!exists(where, count)) return wrong(plan_error::out_of_range, where);
    if (where.buffer == 0) return wrong(plan_error::overwritten, where);
    symbolic_slot const* const slot = at(where);
    for (int i = 0; i < count; ++i) {
      bool const unwritten = slot[i].state == symbolic_slot::phase::unwritten;
      if (how == writing::anew && !unwritten) return wrong(plan_error::overwritten, where);
      if (how == writing::onto && unwritten) return wrong(plan_error::unwritten, where);
    }
    return {};
  }

  plan_verdict move(row_move const& m) {
    switch (m.action) {
      case row_action::copy:
        return copy(m);
      case row_action::add:
        return add(m);
      case row_action::select:
        return select(m);
      case row_action::clear:
        return clear(m);
      case row_action::scatter:
        return scatter(m);
    }
    return wrong(plan_error::shape, m.to);
  }

 private:
  static plan_verdict wrong(plan_error error, slot_at where) { return {error, -1, -1, where.slot}; }
  /// Rows as they lie in an input slot, or those of them for some destinations.
  static symbolic_slot original(std::int64_t number, int first, int last) {
    return {symbolic_input::rows(number, first, last),
            0,
            number,
            first,
            last,
            symbolic_slot::phase::settled};
  }

  std::size_t place(slot_at where) const {
    return first_[static_cast<std::size_t>(where.buffer)] + static_cast<std::size_t>(where.slot);
  }
  bool exists(slot_at where, int count) const {
    std::vector<int> const& buffers = plan_->buffers;
    return where.buffer >= 0 && where.buffer < static_cast<int>(buffers.size()) &&
           where.slot >= 0 && count >= 1 &&
           count <= buffers[static_cast<std::size_t>(where.buffer)] - where.slot;
  }
  plan_verdict read_and_write(row_move const& m, writing how) {
    plan_verdict const readable = read(m.from, m.count);
    return readable ? write(m.to, m.count, how) : readable;
  }

  plan_verdict copy(row_move const& m) {
    if (plan_verdict const v = read_and_write(m, writing::anew); !v) return v;
    std::copy_n(at(m.from), m.count, at(m.to));
    return {};
  }
  plan_verdict add(row_move const& m) {
    if (plan_verdict const v = read_and_write(m, writing::onto); !v) return v;
    if (plan_verdict const v = read(m.to, m.count); !v) return v;
    symbolic_slot const* const from = at(m.from);
    symbolic_slot* const to = at(m.to);
    for (int i = 0; i < m.count; ++i) {
      bool const as_many = input_->same_origin(from[i].like, to[i].like) &&
                           from[i].first == to[i].first && from[i].last == to[i].last;
      if (!as_many) return wrong(plan_error::other_extent, m.to);
      to[i].rows += from[i].rows;
    }
    return {};
  }

  /// Whether `what` names destinations of a slot, in a slot that holds what its name says.
  bool is_in(piece const& what, symbolic_slot const& s) const {
    return what.source >= 0 && what.source < R_ && what.part == 0 && what.destination >= 0 &&
           what.span >= 1 && what.destination <= R_ - what.span &&
           input_->name(s.like).source == what.source && what.destination >= s.first &&
           symbolic_input::last_destination(what) <= s.last;
  }
  plan_verdict select(row_move const& m) {
    if (plan_verdict const v = read_and_write(m, writing::anew); !v) return v;
    symbolic_slot const& from = *at(m.from);
    // Sums are not the tokens of one slot, each once.
    bool const is_original = from.rows == symbolic_input::rows(from.like, from.first, from.last);
    if (m.count != 1 || !is_in(m.what, from) || !is_original)
      return wrong(plan_error::wrong_selection, m.to);
    *at(m.to) = original(from.like, m.what.destination, symbolic_input::last_destination(m.what));
    return {};
  }
  plan_verdict clear(row_move const& m) {
    if (plan_verdict const v = write(m.to, m.count, writing::anew); !v) return v;
    if (m.count != 1) return wrong(plan_error::wrong_selection, m.to);
    at(m.to)->state = symbolic_slot::phase::growing;
    return {};
  }
  plan_verdict scatter(row_move const& m) {
    if (plan_verdict const v = read_and_write(m, writing::onto); !v) return v;
    symbolic_slot const& from = *at(m.from);
    symbolic_slot& to = *at(m.to);
    bool const grows = to.state == symbolic_slot::phase::growing;
    bool const fits = m.count == 1 && is_in(m.what, from) && m.what.destination == from.first &&
                      symbolic_input::last_destination(m.what) == from.last &&
                      (to.like < 0 || input_->same_origin(from.like, to.like)) &&
                      (grows || is_in(m.what, to));
    if (!fits) return wrong(plan_error::wrong_selection, m.to);
    to.rows += from.rows;
    if (grows) to.grow(from.like, from.first, from.last);
    return {};
  }

  exchange_plan const* plan_;
  symbolic_input const* input_;
  std::int64_t R_;
  std::vector<std::size_t> first_;    // [buffers] first slot
  std::vector<symbolic_slot> slots_;  // [slots of all buffers]
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
