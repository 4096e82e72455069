// The counts of all slots of a plan, as rows that the plan itself moves: how ranks learn sizes.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/row_format.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// From begin to end `sizes` has one row in each slot, the slot's count; and is not bound.
class slot_counts {
 public:
  /// @param rows  [input slots] rows in each.
  /// @throws precondition_error if the plan selects tokens, or unless rows is as long as plan.input and
  ///         none is negative.
  void begin(bound_plan& sizes, vector_view<std::int64_t const> rows, call_site site) {
    exchange_plan const& plan = sizes.plan();
    expects(rows.size() == plan.buffers[0], "bind: one count for each input slot", site,
            {{"counts", rows.size()}, {"input slots", plan.buffers[0]}});
    for (std::int64_t const n : rows) expects(n >= 0, "bind: counts >= 0", site, {{"count", n}});
    sizes.bind_equal(1, site);
    sizes.is_bound_ = false;
    counts_.assign(sizes.rows_.size(), {});
    for (std::int64_t i = 0; i < rows.size(); ++i)
      counts_[static_cast<std::size_t>(i)] = {rows[i], plan.epoch};
  }

  /// [slots of all buffers]
  row_count* data() { return counts_.data(); }
  std::int64_t size() const { return static_cast<std::int64_t>(counts_.size()); }

  /// What they hold once they are moved, which binds `sizes` to them.
  /// @return `stale`: the peer's plan is of another epoch; `wrong_length`: counts that cannot be.
  outcome end(bound_plan& sizes) const {
    exchange_plan const& plan = sizes.plan();
    for (exchange_phase const& phase : plan.phases)
      for (message const& m : phase.receives)
        for (int i = 0; i < m.count; ++i) {
          row_count const& c = counts_[sizes.slot(m.at) + static_cast<std::size_t>(i)];
          if (c.epoch != plan.epoch) return {exchange_status::stale, m.peer};
          if (c.rows < 0) return {exchange_status::wrong_length, m.peer};
        }
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      if (counts_[i].rows < 0) return {exchange_status::wrong_length};
      sizes.rows_[i] = counts_[i].rows;
    }
    sizes.lay_out();
    return {};
  }

 private:
  std::vector<row_count> counts_;
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
