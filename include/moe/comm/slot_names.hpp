// What the slots of plans hold, by name: found by running the plans without rows.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/verify.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// The names of all slots of the plans of all ranks: whose rows they hold, for which destinations. A
/// slot that is a sum has the name of its terms.
class slot_names {
 public:
  /// @throws precondition_error unless verify_plans accepts the plans.
  /// @cost   As verify_plans; keeps one name for each slot.
  explicit slot_names(vector_view<exchange_plan const> plans, call_site site = call_site::here()) {
    detail::plan_checker checker(plans);
    plan_verdict const v = checker.verdict();
    expects(static_cast<bool>(v), "slot_names: verify_plans accepts the plans", site,
            {{"error", static_cast<int>(v.error)}, {"rank", v.rank}, {"phase", v.phase}});
    for (std::int64_t i = 0; i < plans.size(); ++i) {
      std::vector<std::vector<piece>> buffers;
      for (std::size_t b = 0; b < plans[i].buffers.size(); ++b) {
        std::vector<piece> names;
        names.reserve(static_cast<std::size_t>(plans[i].buffers[b]));
        for (int s = 0; s < plans[i].buffers[b]; ++s)
          names.push_back(checker.name(i, {static_cast<int>(b), s}));
        buffers.push_back(std::move(names));
      }
      names_.push_back(std::move(buffers));
    }
  }

  /// @param plan  Its place among the plans.
  piece const& operator()(std::int64_t plan, slot_at at) const {
    return names_[static_cast<std::size_t>(plan)][static_cast<std::size_t>(at.buffer)]
                 [static_cast<std::size_t>(at.slot)];
  }

 private:
  std::vector<std::vector<std::vector<piece>>> names_;  // [plans][buffers][slots]
};

}  // namespace moe::inline MOE_ABI
