// Rows in the registers of emulated threads, for the laws of score_row and for comparisons.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <vector>

#include <moe/core/lane_row.hpp>

#include "emulator/block_emulator.hpp"
#include "emulator/fiber.hpp"

namespace moe_test {

/// A block of `Threads`, each sub-warp of which keeps a row of its own: all the same one.
template <int Width, int Slots, int Threads = 64>
struct in_sub_warps {
  static constexpr int threads = Threads;
  struct shared {};
  using lanes = moe::sub_warp<emulated_block, Width>;
  using row = moe::lane_row<lanes, Slots>;

  static lanes lanes_of(emulated_block& b, shared&) { return lanes(b); }
};

/// A block of `Threads` that keeps one row.
template <int Slots, int Threads>
struct in_whole_block {
  static constexpr int threads = Threads;
  using shared = moe::row_exchange<Slots * Threads>;
  using lanes = moe::whole_block<emulated_block, Slots * Threads>;
  using row = moe::lane_row<lanes, Slots>;

  static lanes lanes_of(emulated_block& b, shared& s) { return lanes(b, s); }
};

/// Calls f(row, thread) in every thread of a block, on its part of a row of these scores.
template <class Home, class F>
void with_row(schedule order, std::vector<float> const& scores, F const& f) {
  launch_body<Home::threads, typename Home::shared>(
      order, 1, 1, [&](emulated_block& b, typename Home::shared& s) {
        auto lanes = Home::lanes_of(b, s);
        fiber::running()->local = &lanes;
        typename Home::row row(lanes, static_cast<int>(scores.size()),
                               [&](int e) { return scores[static_cast<std::size_t>(e)]; });
        f(row, b.thread());
      });
}

/// How `score_row_laws` makes a lane_row: the law runs in every emulated thread.
template <class Home>
struct on_lanes {
  schedule order;

  template <class F>
  void operator()(std::vector<float> const& scores, int, F&& f) const {
    if (fiber::running() == nullptr)
      return with_row<Home>(order, scores, [&](auto& row, int) { f(row); });
    // Called by a law that has a row already: another one in the same threads.
    auto& lanes = *static_cast<typename Home::lanes*>(fiber::running()->local);
    typename Home::row row(lanes, static_cast<int>(scores.size()),
                           [&](int e) { return scores[static_cast<std::size_t>(e)]; });
    f(row);
  }
};

}  // namespace moe_test
