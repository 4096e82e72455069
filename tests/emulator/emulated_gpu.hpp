// An executor whose kernels run on the block emulator: the functions for a GPU, whole, on the CPU.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>

#include "emulator/block_emulator.hpp"

namespace moe_test {

/// A model of kernel_executor. "Device memory" is the CPU's: use arrays of their own, so that the
/// address sanitizer sees what is read past their end.
class emulated_gpu {
 public:
  static constexpr int max_threads = 64;  // the thread sanitizer follows 255 in a launch

  explicit emulated_gpu(schedule order = schedule::shuffled, unsigned seed = 1)
      : order_(order), seed_(seed) {}

  /// Few, so that small problems need several rounds.
  int processors() const { return 2; }

  template <class Kernel, class... Args>
  void launch(char const*, Kernel const& kernel, std::int64_t blocks, moe::call_site,
              Args const&... args) const {
    static_assert(Kernel::threads <= max_threads);
    moe_test::launch(order_, seed_, static_cast<int>(blocks), kernel, args...);
  }

  void fill(void* data, int byte, std::size_t bytes, moe::call_site = {}) const {
    if (bytes > 0) std::memset(data, byte, bytes);
  }

 private:
  schedule order_;
  unsigned seed_;
};

static_assert(moe::kernel_executor<emulated_gpu>);

/// Calls f(executor) under each schedule: under the thread sanitizer, which is slow, only one, as a
/// race shows in any.
template <class F>
void on_emulator(F const& f) {
  for (schedule const order : schedules) {
    if (has_thread_sanitizer && order != schedule::shuffled) continue;
    f(emulated_gpu(order));
  }
}

}  // namespace moe_test
