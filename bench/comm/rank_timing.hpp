// Times what ranks do together, the ranks being threads of this process.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/traffic.hpp>

#include "support/roof.hpp"

namespace moe_bench {

inline moe::deadline soon() {
  return moe::within(std::chrono::seconds(60));
}

/// One sample: R ranks, anew, each make `make(comm)`, run it once, and see whether the result is right;
/// then all run it as often as `runs` says. Time of a run, from the first rank's start to the last one's
/// end; negative if anything was wrong.
///
/// @param make  Gives an object with `bool run()` and `bool is_right()`.
template <class Make>
double seconds_of_run(int R, int runs, Make const& make) {
  using clock = std::chrono::steady_clock;
  std::vector<clock::time_point> begin(static_cast<std::size_t>(R)), end(begin);
  std::atomic<bool> right = true;
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    auto const r = static_cast<std::size_t>(comm.rank());
    auto rank = make(comm);
    bool ran = rank.run() && rank.is_right();
    std::vector<char> in(begin.size()), out(begin.size());  // to meet
    ran = moe::all_to_all<char>(comm, {in.data(), R}, {out.data(), R}, soon()) && ran;
    begin[r] = clock::now();
    for (int i = 0; i < runs && ran; ++i) ran = rank.run();
    end[r] = clock::now();
    if (!ran || !rank.is_right()) right = false;
  });
  std::chrono::duration<double> const all =
      *std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end());
  return right ? all.count() / runs : -1;
}

/// For a benchmark with manual time.
template <class Make>
void time_ranks(benchmark::State& state, int R, Make const& make) {
  std::vector<double> samples;
  for (auto _ : state) {
    double const seconds = seconds_of_run(R, 20, make);
    if (seconds < 0) {
      state.SkipWithError("wrong result");
      return;
    }
    state.SetIterationTime(seconds);
    samples.push_back(seconds);
  }
  state.counters["fastest_tenth"] = fast_decile(samples);
}

/// What a run moves, all ranks together.
inline void count(benchmark::State& state, moe::exchange_rows const& t, double bytes_of_row) {
  state.counters["messages_between"] = static_cast<double>(t.between_nodes.messages);
  state.counters["bytes_between"] = t.between_nodes.rows * bytes_of_row;
  state.counters["messages_within"] = static_cast<double>(t.within_nodes.messages);
  state.counters["bytes_within"] = t.within_nodes.rows * bytes_of_row;
  state.counters["bytes_copied"] = t.copied_rows * bytes_of_row;
}

}  // namespace moe_bench
