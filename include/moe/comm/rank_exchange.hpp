// Runs plans: binds slots to numbers of rows, then moves rows over a communicator.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/row_format.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// One rank's executor of one plan: bind it to counts, then run it as often as they hold.
///
/// Owns the staging rows and the arrays of messages, and keeps them: a run allocates nothing once the
/// object has seen its largest. Results are bitwise the same in every run: sums are made in the order
/// of the plan.
template <communicator C>
class rank_exchange {
  static_assert(std::same_as<typename C::memory_space, host_memory>);

 public:
  /// @param comm, plan  Must outlive the exchange.
  /// @throws precondition_error if the plan is not of this rank of the communicator.
  rank_exchange(C& comm, exchange_plan const& plan, call_site site = call_site::here())
      : comm_(&comm), plan_(&plan) {
    expects(comm.rank() == plan.rank, "rank_exchange: the plan is of the communicator's rank", site,
            {{"plan.rank", plan.rank}, {"comm.rank()", comm.rank()}});
    first_slot_.push_back(0);
    for (int const slots : plan.buffers)
      first_slot_.push_back(first_slot_.back() + static_cast<std::size_t>(slots));
    rows_.resize(first_slot_.back());
    offset_.resize(first_slot_.back() + plan.buffers.size());
  }
  rank_exchange(C&, exchange_plan&&) = delete;

  /// Exact sizes: runs the plan once with the counts themselves as rows, so that every rank knows what
  /// each of its slots will hold. Collective; as many messages as a run.
  ///
  /// @param rows  [input slots] rows in each.
  /// @return What failed, if anything did. `stale`: the peer's plan is of another epoch.
  /// @throws precondition_error unless rows is as long as plan.input and none is negative.
  outcome bind(vector_view<std::int64_t const> rows, deadline until,
               call_site site = call_site::here()) {
    expects_idle("rank_exchange::bind: no exchange under way", site);
    expects(rows.size() == plan_->buffers[0], "rank_exchange::bind: one count for each input slot",
            site, {{"counts", rows.size()}, {"input slots", plan_->buffers[0]}});
    is_bound_ = false;
    counts_.assign(rows_.size(), {});
    for (std::int64_t i = 0; i < rows.size(); ++i) {
      expects(rows[i] >= 0, "rank_exchange::bind: counts >= 0", site, {{"count", rows[i]}});
      counts_[static_cast<std::size_t>(i)] = {rows[i], plan_->epoch};
    }
    std::fill(rows_.begin(), rows_.end(), 1);
    lay_out();
    auto* const all = reinterpret_cast<std::byte*>(counts_.data());
    format_ = {sizeof(detail::row_count), detail::agree};
    base_.clear();
    for (std::size_t b = 0; b + 1 < first_slot_.size(); ++b)
      base_.push_back(all + first_slot_[b] * format_.bytes);
    outcome result = start();
    if (result) result = wait_for_end(until);
    if (!result) return result;

    for (exchange_phase const& phase : plan_->phases)
      for (message const& m : phase.receives)
        for (int i = 0; i < m.count; ++i) {
          detail::row_count const& c = counts_[slot(m.at) + static_cast<std::size_t>(i)];
          if (c.epoch != plan_->epoch) return fail({exchange_status::stale, m.peer});
          if (c.rows < 0) return fail({exchange_status::wrong_length, m.peer});
        }
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      if (counts_[i].rows < 0) return fail({exchange_status::wrong_length});
      rows_[i] = counts_[i].rows;
    }
    lay_out();
    is_bound_ = true;
    return {};
  }

  /// Fixed sizes: every slot has the same number of rows, on all ranks. No messages.
  void bind_equal(std::int64_t rows, call_site site = call_site::here()) {
    expects_idle("rank_exchange::bind_equal: no exchange under way", site);
    expects(rows >= 0, "rank_exchange::bind_equal: rows >= 0", site, {{"rows", rows}});
    std::fill(rows_.begin(), rows_.end(), rows);
    lay_out();
    is_bound_ = true;
  }

  /// The sizes of the way there, for the way back. No messages.
  /// @pre  This plan is transpose(plan of `there`).
  /// @throws precondition_error unless `there` is bound and its plan has the transposed ends.
  void bind_back(rank_exchange const& there, call_site site = call_site::here()) {
    expects_idle("rank_exchange::bind_back: no exchange under way", site);
    expects(there.is_bound_ && there.plan_->input == plan_->output &&
                there.plan_->output == plan_->input && there.plan_->epoch == plan_->epoch &&
                there.plan_->buffers.size() <= plan_->buffers.size(),
            "rank_exchange::bind_back: the other is bound, and its plan the transposed one", site);
    std::size_t const known = there.plan_->buffers.size();
    for (std::size_t b = 0; b < known; ++b) {
      std::size_t const other = b < 2 ? 1 - b : b;
      for (int i = 0; i < plan_->buffers[b]; ++i)
        rows_[first_slot_[b] + static_cast<std::size_t>(i)] =
            there.rows_[there.first_slot_[other] + static_cast<std::size_t>(i)];
    }
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
    is_bound_ = true;
  }

  /// Rows of all slots of the input or output, once it is bound.
  std::int64_t input_rows() const noexcept { return rows_in(0); }
  std::int64_t output_rows() const noexcept { return rows_in(1); }
  /// [output slots] rows of each, once it is bound.
  vector_view<std::int64_t const> output_counts() const noexcept {
    return {rows_.data() + first_slot_[1], plan_->buffers[1]};
  }

  /// Moves rows; begin, and wait for the end. After a failure the output holds anything, and the
  /// communicator has aborted.
  ///
  /// @param in   [input_rows(), M] the input slots one after another. Contiguous, as is `out`.
  /// @param out  [output_rows() or more, M] the output slots one after another. No overlap with `in`.
  /// @throws precondition_error as begin does.
  template <class T>
  outcome run(matrix_view<T const> in, matrix_view<T> out, deadline until,
              call_site site = call_site::here()) {
    if (outcome const started = begin<T>(in, out, site); !started) return started;
    return finish(until);
  }

  /// Starts to move rows and returns. `in` and `out` stay as they are until poll or finish gives
  /// anything but `pending`; someone has to call poll, as nothing happens meanwhile.
  /// @throws precondition_error if it is not bound or under way, or if shapes do not fit.
  template <class T>
  outcome begin(matrix_view<T const> in, matrix_view<T> out, call_site site = call_site::here()) {
    static_assert(std::is_trivially_copyable_v<T>);
    expects_idle("rank_exchange::begin: no exchange under way", site);
    expects(is_bound_, "rank_exchange::begin: bound to counts", site);
    expects(in.rows() == input_rows() && out.rows() >= output_rows() && in.cols() == out.cols(),
            "rank_exchange::begin: in is [input_rows(), M], out [output_rows() or more, M]", site,
            {{"in.rows()", in.rows()},
             {"input_rows()", input_rows()},
             {"out.rows()", out.rows()},
             {"output_rows()", output_rows()},
             {"in.cols()", in.cols()},
             {"out.cols()", out.cols()}});
    expects(in.ld() == in.cols() && out.ld() == out.cols() && !overlap(in, out),
            "rank_exchange::begin: contiguous rows, in and out apart", site);
    format_ = detail::format_of_rows<T>(in.cols());
    std::size_t bytes = 0;
    for (std::size_t b = 2; b < plan_->buffers.size(); ++b) bytes += staging_bytes(b);
    if (staging_.size() < bytes) staging_.resize(bytes);
    // Nothing is written to the input: no plan has it as a target.
    base_.assign({const_cast<std::byte*>(reinterpret_cast<std::byte const*>(in.data())),
                  reinterpret_cast<std::byte*>(out.data())});
    std::byte* next = staging_.data();
    for (std::size_t b = 2; b < plan_->buffers.size(); ++b) {
      base_.push_back(next);
      next += staging_bytes(b);
    }
    return start();
  }

  /// Goes on as far as that is possible without waiting.
  outcome poll() {
    while (is_under_way_) {
      outcome const now = comm_->poll(ticket_);
      if (now.status == exchange_status::pending) return now;
      if (!now) return fail(now);
      ++phase_;
      if (outcome const next = enter_phase(); !next) return next;
    }
    return {};
  }

  /// Waits for the end of what begin has started.
  outcome finish(deadline until) { return wait_for_end(until); }

 private:
  static constexpr std::size_t alignment = alignof(std::max_align_t);

  void expects_idle(char const* rule, call_site site) const { expects(!is_under_way_, rule, site); }
  std::size_t slot(slot_at at) const {
    return first_slot_[static_cast<std::size_t>(at.buffer)] + static_cast<std::size_t>(at.slot);
  }
  /// Rows before a slot of a buffer; of the slot past the last one, the rows of the buffer.
  std::int64_t rows_before(slot_at at, int skip = 0) const {
    return offset_[slot(at) + static_cast<std::size_t>(at.buffer + skip)];
  }
  std::int64_t rows_in(int buffer) const noexcept {
    return rows_before({buffer, plan_->buffers[static_cast<std::size_t>(buffer)]});
  }
  std::size_t staging_bytes(std::size_t buffer) const {
    auto const bytes = static_cast<std::size_t>(rows_in(static_cast<int>(buffer))) * format_.bytes;
    return (bytes + alignment - 1) / alignment * alignment;
  }
  void lay_out() {
    std::size_t i = 0, at = 0;
    for (int const slots : plan_->buffers) {
      offset_[at++] = 0;
      for (int s = 0; s < slots; ++s, ++at) offset_[at] = offset_[at - 1] + rows_[i++];
    }
  }

  std::byte* data(slot_at at) const {
    return base_[static_cast<std::size_t>(at.buffer)] +
           static_cast<std::size_t>(rows_before(at)) * format_.bytes;
  }
  std::size_t bytes(slot_at at, int count) const {
    return static_cast<std::size_t>(rows_before(at, count) - rows_before(at)) * format_.bytes;
  }
  void move(std::vector<row_move> const& moves) const {
    for (row_move const& m : moves) {
      std::size_t const n = bytes(m.from, m.count);
      if (n == 0) continue;
      if (m.action == row_action::copy)
        std::memcpy(data(m.to), data(m.from), n);
      else
        format_.add(data(m.to), data(m.from), n);
    }
  }

  outcome start() {
    phase_ = 0;
    is_under_way_ = true;
    return enter_phase();
  }
  /// Local moves and messages of a phase; after the last one, the moves that end the exchange.
  outcome enter_phase() {
    if (phase_ == plan_->phases.size()) {
      move(plan_->last);
      is_under_way_ = false;
      return {};
    }
    exchange_phase const& phase = plan_->phases[phase_];
    move(phase.moves);
    sends_.clear();
    receives_.clear();
    // Both ends know that a message is empty, and neither has it.
    for (message const& m : phase.sends)
      if (std::size_t const n = bytes(m.at, m.count); n > 0)
        sends_.push_back({data(m.at), n, m.peer});
    for (message const& m : phase.receives)
      if (std::size_t const n = bytes(m.at, m.count); n > 0)
        receives_.push_back({data(m.at), n, m.peer});
    try {
      outcome const posted = comm_->exchange(sends_, receives_, ticket_);
      return posted ? posted : fail(posted);
    } catch (
        ...) {  // the caller's rows may be gone before this object is: peers must not read them
      static_cast<void>(fail({}));
      throw;
    }
  }
  outcome wait_for_end(deadline until) {
    outcome const end = wait([this] { return poll(); }, [this] { comm_->abort(); }, until);
    if (!end) is_under_way_ = false;
    return end;
  }
  outcome fail(outcome why) noexcept {
    is_under_way_ = false;
    comm_->abort();
    return why;
  }

  C* comm_;
  exchange_plan const* plan_;
  std::vector<std::size_t> first_slot_;    // [buffers + 1]
  std::vector<std::int64_t> rows_;         // [slots of all buffers]
  std::vector<std::int64_t> offset_;       // [slots + buffers]: rows before a slot, in its buffer
  std::vector<detail::row_count> counts_;  // [slots of all buffers]
  std::vector<std::byte> staging_;
  std::vector<std::byte*> base_;  // [buffers]
  std::vector<outgoing> sends_;
  std::vector<incoming> receives_;
  detail::row_format format_;
  std::size_t phase_ = 0;
  bool is_bound_ = false;
  bool is_under_way_ = false;
  typename C::ticket ticket_;
};

}  // namespace moe::inline MOE_ABI
