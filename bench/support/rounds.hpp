// Competitors in turn, so that all of them meet the same machine; samples that were preempted are dropped.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <benchmark/benchmark.h>
#include <cstddef>
#include <ctime>
#include <vector>

#include "support/roof.hpp"

namespace moe_bench {

/// CPU time of the process, all threads together.
inline double cpu_seconds() {
  timespec t{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

/// Times of one competitor. A sample counts if all threads had a processor nearly all the time.
class samples {
 public:
  explicit samples(int threads) : threads_(threads) {}

  /// @return Seconds of this run.
  template <class F>
  double take(F const& f) {
    double const before = cpu_seconds(), wall = seconds(f), busy = cpu_seconds() - before;
    all_.push_back(wall);
    if (busy >= 0.965 * threads_ * wall) clean_.push_back(wall);
    return wall;
  }
  /// The median of the samples that count; of the fastest half of all if these are fewer than three.
  double median() const {
    std::vector<double> of = clean_;
    if (of.size() < 3) {
      of = all_;
      std::sort(of.begin(), of.end());
      of.resize((of.size() + 1) / 2);
    }
    auto const middle = of.begin() + static_cast<std::ptrdiff_t>(of.size() / 2);
    std::nth_element(of.begin(), middle, of.end());
    return of.empty() ? 0 : *middle;
  }
  double clean_share() const {
    return all_.empty() ? 0 : static_cast<double>(clean_.size()) / static_cast<double>(all_.size());
  }

 private:
  int threads_;
  std::vector<double> all_, clean_;
};

}  // namespace moe_bench
