// Whether a gate gives on lanes the bits that it gives on an array.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/lane_row.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>

#include "emulator/on_lanes.hpp"
#include "emulator/sanitizers.hpp"
#include "support/laws.hpp"
#include "support/same_bits.hpp"

namespace moe_test {

/// Forward and backward of a gate on one row: its numbers, and how they compare, in any model.
template <class Gate, class R>
void evaluate(Gate const& gate, R& row, std::vector<float>& numbers) {
  moe::choices<Gate::max_k, float> chosen, dchosen;
  moe::token const t{.id = 3, .row = 1, .seed = 5, .step = 7, .training = true};
  gate(row, chosen, t);
  dchosen.k = chosen.k;
  for (int j = 0; j < chosen.k; ++j) dchosen.weight[j] = 0.25f - static_cast<float>(j);
  R grad = row.copy();
  grad.transform([](int e, float) { return static_cast<float>(e % 7) * 0.125f - 0.25f; });
  gate.backward(row, chosen, dchosen, grad, t);
  for (int j = 0; j < chosen.k; ++j) {
    numbers.push_back(static_cast<float>(chosen.expert[j]));
    numbers.push_back(chosen.weight[j]);
  }
  numbers.push_back(row.sum([](int, float s) { return moe::is_candidate(s) ? s : 0.0f; }));
  numbers.push_back(row.max(row.size() / 3, row.size()));
  int const step = row.size() / 16 + 1;
  for (int e = 0; e < row.size(); e += step) {
    numbers.push_back(row.at(e));
    numbers.push_back(grad.at(e));
  }
}

/// Logits with many ties, some absent candidates, and zeros of both signs.
inline std::vector<float> tied_logits(int E, unsigned seed) {
  auto logits = law_scores<float>(E, seed, 0.2);
  for (std::size_t e = 0; e < logits.size(); ++e)
    if (e % 3 == 0 && moe::is_candidate(logits[e]))
      logits[e] = static_cast<float>(static_cast<int>(logits[e] * 2)) * (e % 2 == 0 ? 1.0f : -1.0f);
  return logits;
}

/// Every thread has the bits that array_row has. Asserts nothing inside of emulated threads.
template <class Home, class Gate>
void check_bits(Gate const& gate, std::vector<int> const& sizes) {
  for (int const E : sizes)
    for (schedule const order : schedules) {
      // A race shows in any schedule and size, and the thread sanitizer is slow.
      if (has_thread_sanitizer && (order != schedule::shuffled || E < 31 || E > 60)) continue;
      CAPTURE(E);
      CAPTURE(static_cast<int>(order));
      auto const logits = tied_logits(E, 3);
      owned_row<float> plain(logits, Gate::copies + 1);
      std::vector<float> expected;
      evaluate(gate, plain.row(), expected);
      std::vector<std::vector<float>> found(Home::threads);
      with_row<Home>(order, logits, [&](auto& row, int thread) {
        evaluate(gate, row, found[static_cast<std::size_t>(thread)]);
      });
      int different = 0;
      for (auto const& numbers : found) different += same_bits(numbers, expected) ? 0 : 1;
      CHECK(different == 0);
    }
}

}  // namespace moe_test
