// Runs plans in memory of the host: moves rows over a communicator, as a bound plan says.
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

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/placed_rows.hpp>
#include <moe/comm/detail/row_format.hpp>
#include <moe/comm/detail/slot_counts.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/row_parts.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// One rank's executor of plans, of one exchange at a time.
///
/// Owns the staging rows and the arrays of messages, and keeps them: a run allocates nothing once the
/// object has seen its largest. Results are bitwise the same in every run: sums are made in the order
/// of the plan.
///
/// Several may have exchanges under way over one communicator, begun in the same order on all ranks, if
/// the plans have one phase. With more phases each needs a communicator of its own (`split`): ranks come
/// to the later phases in any order, and messages meet in that order.
template <class C>
class rank_exchange {
  static_assert(communicator<C> && std::same_as<typename C::memory_space, host_memory>);

 public:
  /// @param comm  Must outlive the exchange.
  explicit rank_exchange(C& comm) : comm_(&comm) {}

  /// Exact sizes: runs the plan once with the counts themselves as rows, so that every rank knows what
  /// each of its slots will hold. Collective; as many messages as a run.
  ///
  /// @param rows  [input slots] rows in each.
  /// @return What failed, if anything did. `stale`: the peer's plan is of another epoch.
  /// @throws precondition_error if the plan is not of this rank or selects tokens,
  ///         or unless rows is as long as plan.input and none is negative.
  outcome bind(bound_plan& sizes, vector_view<std::int64_t const> rows, deadline until,
               call_site site = call_site::here()) {
    expects_usable(sizes, site);
    counts_.begin(sizes, rows, site);
    format_ = detail::format_of_rows<detail::row_count>(1);
    rows_.place(sizes, format_.bytes, reinterpret_cast<std::byte*>(counts_.data()));
    outcome result = start();
    if (result) result = wait_for_end(until);
    if (!result) return result;
    result = counts_.end(sizes);
    return result ? result : fail(result);
  }

  /// Moves rows; begin, and wait for the end. After a failure the output holds anything, and the
  /// communicator has aborted.
  ///
  /// @param in   [sizes.input_rows(), M] the input slots one after another.
  /// @param out  [sizes.output_rows() or more, M] the output slots one after another. No overlap.
  /// @throws precondition_error as begin does.
  template <class T>
  outcome run(bound_plan const& sizes, std::type_identity_t<row_parts<T const>> in,
              std::type_identity_t<row_parts<T>> out, deadline until,
              call_site site = call_site::here()) {
    if (outcome const started = begin<T>(sizes, in, out, site); !started) return started;
    return finish(until);
  }

  /// Starts to move rows and returns. `sizes`, `in` and `out` stay as they are until poll or finish
  /// gives anything but `pending`; someone has to call poll, as nothing happens meanwhile.
  ///
  /// Rows are contiguous, but for tokens: those that a plan selects from, and those that it adds to on
  /// the way back, may have a leading dimension and two parts.
  /// @throws precondition_error if it is not bound or under way, or if shapes do not fit.
  template <class T>
  outcome begin(bound_plan const& sizes, std::type_identity_t<row_parts<T const>> in,
                std::type_identity_t<row_parts<T>> out, call_site site = call_site::here()) {
    static_assert(std::is_trivially_copyable_v<T>);
    expects_usable(sizes, site);
    expects(sizes.is_bound(), "rank_exchange::begin: bound to counts", site);
    expects(in.rows() == sizes.input_rows() && out.rows() >= sizes.output_rows() &&
                in.cols() == out.cols(),
            "rank_exchange::begin: in is [input_rows(), M], out [output_rows() or more, M]", site,
            {{"in.rows()", in.rows()},
             {"input_rows()", sizes.input_rows()},
             {"out.rows()", out.rows()},
             {"output_rows()", sizes.output_rows()},
             {"in.cols()", in.cols()},
             {"out.cols()", out.cols()}});
    expects((in.is_contiguous() || sizes.only_selects_from_input()) &&
                (out.is_contiguous() || sizes.only_adds_to_output()) && !overlap(in, out),
            "rank_exchange::begin: contiguous rows, in and out apart", site);
    format_ = detail::format_of_rows<T>(in.cols());
    std::size_t const staging = detail::placed_rows::staging_bytes(sizes, format_.bytes);
    if (staging_.size() < staging) staging_.resize(staging);
    rows_.place(sizes, format_.bytes, rows_of<T>(in), rows_of<T>(out), staging_.data());
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
  void expects_usable(bound_plan const& sizes, call_site site) const {
    expects(!is_under_way_, "rank_exchange: no exchange under way", site);
    expects(
        sizes.has_plan() && comm_->rank() == sizes.plan().rank,
        "rank_exchange: the plan is of the communicator's rank", site,
        {{"plan.rank", sizes.has_plan() ? sizes.plan().rank : -1}, {"comm.rank()", comm_->rank()}});
  }

  template <class T, class U>
  static detail::buffer_rows rows_of(row_parts<U> const& rows) {
    auto const part = [](matrix_view<U> const& m) {
      return detail::buffer_part{
          const_cast<std::byte*>(reinterpret_cast<std::byte const*>(m.data())),
          static_cast<std::size_t>(m.ld()) * sizeof(T),
          static_cast<std::size_t>(m.cols()) * sizeof(T)};
    };
    return {{part(rows.first), part(rows.second)}};
  }
  void move(std::vector<row_move> const& moves) const {
    for (row_move const& m : moves) switch (m.action) {
        case row_action::copy:
          if (std::size_t const n = rows_.bytes(m.from, m.count); n > 0)
            std::memcpy(rows_.data(m.to), rows_.data(m.from), n);
          break;
        case row_action::add:
          if (std::size_t const n = rows_.bytes(m.from, m.count); n > 0)
            format_.add(rows_.data(m.to), rows_.data(m.from), n);
          break;
        case row_action::clear:
          clear(m.to);
          break;
        case row_action::select:
          select(m.from, m.to);
          break;
        case row_action::scatter:
          scatter(m.from, m.to);
      }
  }
  void clear(slot_at at) const {
    for (detail::buffer_part const& p : rows_.rows_at(at).part)
      for (std::int64_t r = rows_.sizes().rows_before(at);
           p.bytes > 0 && r < rows_.sizes().rows_before(at, 1); ++r)
        std::memset(p.row(r), 0, p.bytes);
  }
  void select(slot_at from, slot_at to) const {
    std::int64_t const base = rows_.sizes().rows_before(from);
    std::byte* next = rows_.data(to);
    for (std::int32_t const i : rows_.sizes().selected(to))
      for (detail::buffer_part const& p : rows_.rows_at(from).part) {
        if (p.bytes > 0) std::memcpy(next, p.row(base + i), p.bytes);
        next += p.bytes;
      }
    // Room for rows that there are not: peers read it.
    std::byte* const end = rows_.data(to) + rows_.bytes(to, 1);
    if (next < end) std::memset(next, 0, static_cast<std::size_t>(end - next));
  }
  void scatter(slot_at from, slot_at to) const {
    std::int64_t const base = rows_.sizes().rows_before(to);
    std::byte const* next = rows_.data(from);
    for (std::int32_t const i : rows_.sizes().selected(from))
      for (detail::buffer_part const& p : rows_.rows_at(to).part) {
        if (p.bytes > 0) format_.add(p.row(base + i), next, p.bytes);
        next += p.bytes;
      }
  }

  outcome start() {
    phase_ = 0;
    is_under_way_ = true;
    return enter_phase();
  }
  /// Local moves and messages of a phase; after the last one, the moves that end the exchange.
  outcome enter_phase() {
    exchange_plan const& plan = rows_.sizes().plan();
    if (phase_ == plan.phases.size()) {
      move(plan.last);
      is_under_way_ = false;
      return {};
    }
    exchange_phase const& phase = plan.phases[phase_];
    move(phase.moves);
    rows_.list_messages(phase);
    try {
      outcome const posted = comm_->exchange(rows_.sends(), rows_.receives(), ticket_);
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
  detail::slot_counts counts_;
  std::vector<std::byte> staging_;
  detail::placed_rows rows_;
  detail::row_format format_;
  std::size_t phase_ = 0;
  bool is_under_way_ = false;
  typename C::ticket ticket_;
};

}  // namespace moe::inline MOE_ABI
