// A plan with numbers: how many rows each of its slots holds, and where they begin.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

template <class C>
class token_binder;

namespace detail {
class slot_counts;
}

/// One rank's plan, bound to the rows of its slots. `rank_exchange` binds it to counts, which takes
/// messages; two ways to bind it take none. A bound plan runs as often as the numbers hold:
/// it is what has to be kept from dispatch to combine, and to backward.
///
/// Keeps its arrays: it allocates nothing once it has seen its largest.
class bound_plan {
 public:
  /// Of no plan.
  bound_plan() = default;
  /// @param plan  Must outlive this.
  explicit bound_plan(exchange_plan const& plan) : plan_(&plan) {
    first_slot_.push_back(0);
    for (int const slots : plan.buffers)
      first_slot_.push_back(first_slot_.back() + static_cast<std::size_t>(slots));
    rows_.resize(first_slot_.back());
    offset_.resize(first_slot_.back() + plan.buffers.size());
    selected_.resize(first_slot_.back());
  }
  explicit bound_plan(exchange_plan&&) = delete;

  bool has_plan() const noexcept { return plan_ != nullptr; }
  exchange_plan const& plan() const noexcept { return *plan_; }
  bool is_bound() const noexcept { return is_bound_; }

  /// Fixed sizes: every slot has the same number of rows, on all ranks. No messages.
  /// @throws precondition_error if rows < 0, or the plan selects tokens.
  void bind_equal(std::int64_t rows, call_site site = call_site::here()) {
    expects(plan_ != nullptr && rows >= 0, "bound_plan::bind_equal: there is a plan, rows >= 0",
            site, {{"rows", rows}});
    expects(!selects(), "bound_plan::bind_equal: the plan selects no tokens", site);
    std::fill(rows_.begin(), rows_.end(), rows);
    lay_out();
  }

  /// The sizes of the way there, for the way back. No messages.
  /// @pre  This plan is transpose(plan of `there`).
  /// @throws precondition_error unless `there` is bound and its plan has the transposed ends.
  void bind_back(bound_plan const& there, call_site site = call_site::here()) {
    expects(plan_ != nullptr && there.is_bound_ && there.plan_->input == plan_->output &&
                there.plan_->output == plan_->input && there.plan_->epoch == plan_->epoch &&
                there.plan_->buffers.size() <= plan_->buffers.size(),
            "bound_plan::bind_back: the other is bound, and its plan the transposed one", site);
    std::size_t const known = there.plan_->buffers.size();
    for (std::size_t b = 0; b < known; ++b) {
      std::size_t const other = b < 2 ? 1 - b : b;
      for (int i = 0; i < plan_->buffers[b]; ++i) {
        std::size_t const here = first_slot_[b] + static_cast<std::size_t>(i);
        std::size_t const from = there.first_slot_[other] + static_cast<std::size_t>(i);
        rows_[here] = there.rows_[from];
        selected_[here] = there.selected_[from];
      }
    }
    list_ = there.list_;
    // Buffers that only the transposed plan has hold what is added to others.
    auto const learn = [&](std::vector<row_move> const& moves) {
      for (row_move const& m : moves)
        if (static_cast<std::size_t>(m.from.buffer) >= known)
          for (std::size_t i = 0; i < static_cast<std::size_t>(m.count); ++i)
            rows_[slot(m.from) + i] = rows_[slot(m.to) + i];
    };
    for (exchange_phase const& phase : plan_->phases) learn(phase.moves);
    learn(plan_->last);
    lay_out();
  }

  /// Rows of all slots of the input or output, once it is bound.
  std::int64_t input_rows() const noexcept { return rows_in(0); }
  std::int64_t output_rows() const noexcept { return rows_in(1); }
  /// [output slots] rows of each, once it is bound.
  vector_view<std::int64_t const> output_counts() const noexcept {
    return {rows_.data() + first_slot_[1], plan_->buffers[1]};
  }

  /// Rows before a slot of a buffer, or before the one that is `skip` slots further on.
  std::int64_t rows_before(slot_at at, int skip = 0) const noexcept {
    return offset_[slot(at) + static_cast<std::size_t>(at.buffer + skip)];
  }
  /// Rows of a buffer.
  std::int64_t rows_in(int buffer) const noexcept {
    return rows_before({buffer, plan_->buffers[static_cast<std::size_t>(buffer)]});
  }
  /// Which rows of another slot stand in this one, in their order: of a slot that tokens were selected
  /// into. There may be fewer than the slot has room for.
  vector_view<std::int32_t const> selected(slot_at at) const noexcept {
    selection const& s = selected_[slot(at)];
    return {list_.data() + s.first, s.count};
  }

  /// Whether the plan selects tokens.
  bool selects() const {
    return !holds([](row_move const& m) { return !is_of_tokens(m); },
                  [](exchange_phase const&) { return true; });
  }
  /// Whether nothing but selections read the input; and nothing but sums of selections write the output.
  bool only_selects_from_input() const {
    return holds([](row_move const& m) { return m.from.buffer != 0 || is_of_tokens(m); },
                 [](exchange_phase const& phase) {
                   return std::none_of(phase.sends.begin(), phase.sends.end(),
                                       [](message const& m) { return m.at.buffer == 0; });
                 });
  }
  bool only_adds_to_output() const {
    return holds(
        [](row_move const& m) {
          return m.to.buffer != 1 || m.action == row_action::clear ||
                 m.action == row_action::scatter;
        },
        [](exchange_phase const& phase) {
          return std::none_of(phase.receives.begin(), phase.receives.end(),
                              [](message const& m) { return m.at.buffer == 1; });
        });
  }

 private:
  friend detail::slot_counts;
  template <class C>
  friend class token_binder;

  struct selection {
    std::int64_t first = 0;  // in list_
    std::int64_t count = 0;
  };

  static bool is_of_tokens(row_move const& m) {
    return m.action == row_action::select || m.action == row_action::scatter ||
           m.action == row_action::clear;
  }
  /// Whether that is so of all moves and all phases.
  template <class OfMove, class OfPhase>
  bool holds(OfMove const& of_move, OfPhase const& of_phase) const {
    return std::all_of(plan_->last.begin(), plan_->last.end(), of_move) &&
           std::all_of(plan_->phases.begin(), plan_->phases.end(), [&](exchange_phase const& p) {
             return of_phase(p) && std::all_of(p.moves.begin(), p.moves.end(), of_move);
           });
  }
  std::size_t slot(slot_at at) const noexcept {
    return first_slot_[static_cast<std::size_t>(at.buffer)] + static_cast<std::size_t>(at.slot);
  }
  void lay_out() {
    std::size_t i = 0, at = 0;
    for (int const slots : plan_->buffers) {
      offset_[at++] = 0;
      for (int s = 0; s < slots; ++s, ++at) offset_[at] = offset_[at - 1] + rows_[i++];
    }
    is_bound_ = true;
  }

  exchange_plan const* plan_ = nullptr;
  std::vector<std::size_t> first_slot_;  // [buffers + 1]
  std::vector<std::int64_t> rows_;       // [slots of all buffers]
  std::vector<std::int64_t> offset_;     // [slots + buffers]: rows before a slot, in its buffer
  std::vector<selection> selected_;      // [slots of all buffers]
  std::vector<std::int32_t> list_;
  bool is_bound_ = false;
};

}  // namespace moe::inline MOE_ABI
