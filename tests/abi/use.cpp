// A user's translation unit, compiled twice with different -m flags as MOE_ABI_USE.
// SPDX-License-Identifier: MIT
#include "use.hpp"

#include <atomic>
#include <vector>

#if __has_include(<moe/moe.hpp>)
#include <moe/moe.hpp>
#endif
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/core/score_row.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

int MOE_ABI_USE() {
  constexpr int E = 37, members = 3;
  moe::thread_team team(members);
  std::atomic<int> wrong = 0;
  moe::cpu(team).each(members, [&](std::int64_t i, int) {
    std::vector<float> scores(E), copies(2 * E);
    for (int e = 0; e < E; ++e) scores[static_cast<std::size_t>(e)] = static_cast<float>(e % 11);
    moe::row_room<float> room{copies.data(), 2};
    moe::array_row<float> row(scores.data(), E, &room);
    moe::choices<1> chosen;
    moe::gate<moe::softmax, moe::top_k<1>, moe::as_scored> const gate{};
    gate(row, chosen, moe::token{.id = i, .row = i});
    if (chosen.expert[0] != 10) ++wrong;  // the first of the equal best scores
  });
  try {
    moe::thread_team const nobody(0);
    ++wrong;
  } catch (moe::precondition_error const&) {
  }
  return wrong;
}
