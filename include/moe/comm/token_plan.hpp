// Plans of tokens: a rank puts in its tokens as they are, and each rank gets those that it wants.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// The plan of an all-to-all as one of tokens: its one input slot holds all tokens of the rank, from
/// which those for each destination are selected, so that a token goes to a rank once, however many of
/// its experts are there.
///
/// @pre  `plan` is of an all-to-all, as make_plan gives it.
inline exchange_plan over_tokens(exchange_plan plan) {
  std::vector<piece> const names = std::move(plan.input);
  int const slots = plan.buffers[0];
  int const chosen = detail::add_buffer(plan, slots);
  plan.input = {{names.empty() ? 0 : names[0].source, 0, 0, slots}};
  plan.buffers[0] = 1;

  std::vector<row_move> selections;
  auto const select = [&](std::vector<row_move>& moves, int slot, slot_at to) {
    moves.push_back({{0, 0}, to, 1, row_action::select, names[static_cast<std::size_t>(slot)]});
  };
  auto const replace = [&](std::vector<row_move>& moves) {
    std::vector<row_move> const all = std::exchange(moves, {});
    for (row_move const& m : all)
      if (m.from.buffer != 0)
        moves.push_back(m);
      else
        for (int i = 0; i < m.count; ++i)
          select(moves, m.from.slot + i, {m.to.buffer, m.to.slot + i});
  };
  for (exchange_phase& phase : plan.phases) {
    replace(phase.moves);
    for (message& m : phase.sends) {
      if (m.at.buffer != 0) continue;
      m.at.buffer = chosen;
      for (int i = 0; i < m.count; ++i) select(selections, m.at.slot + i, {chosen, m.at.slot + i});
    }
  }
  replace(plan.last);
  std::vector<row_move>& first = plan.phases.empty() ? plan.last : plan.phases[0].moves;
  first.insert(first.begin(), selections.begin(), selections.end());
  return plan;
}

/// One rank's plan of tokens: input slot 0 holds its tokens, output slot s those from index s.
///
/// @param path  A strategy: `flat`, `two_hop`, `leader`, `grid`, or any `exchange_path`.
/// @throws precondition_error as make_plan.
template <exchange_path Path>
exchange_plan make_token_plan(Path const& path, topology const& ranks, int rank,
                              call_site site = call_site::here()) {
  return over_tokens(make_plan(path, ranks, rank, site));
}

/// The plans of all ranks, by index: of a path as make_plans, of any other strategy that has a
/// make_token_plan one by one.
template <class Strategy>
std::vector<exchange_plan> make_token_plans(Strategy const& strategy, topology const& ranks,
                                            call_site site = call_site::here()) {
  std::vector<exchange_plan> plans;
  if constexpr (exchange_path<Strategy>) {  // together they take hardly longer than one alone
    for (exchange_plan& plan : make_plans(strategy, ranks, site))
      plans.push_back(over_tokens(std::move(plan)));
  } else {
    for (int i = 0; i < ranks.size(); ++i)
      plans.push_back(make_token_plan(strategy, ranks, ranks.rank(i), site));
  }
  return plans;
}

}  // namespace moe::inline MOE_ABI
