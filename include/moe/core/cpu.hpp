// The CPU executor: where a function runs, on a team of threads that the caller owns.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// The CPU executor: runs on a team, or on the calling thread alone. Copyable; does not own the team.
class cpu {
 public:
  /// The calling thread.
  constexpr cpu() noexcept = default;

  /// All members of `team`, which must outlive the executor.
  template <worker_team Team>
  cpu(Team& team) noexcept
      : team_(&team),
        threads_(static_cast<int>(team.size())),
        run_([](void* t, void (*task)(void*, int), void* context) {
          static_cast<Team*>(t)->run(task, context);
        }) {}

  int threads() const noexcept { return threads_; }

  /// Calls f(member) once for each member in [0, threads()), concurrently.
  template <class F>
  void run(F&& f) const {
    if (threads_ == 1) {
      f(0);
      return;
    }
    using Body = std::remove_reference_t<F>;
    auto const task = [](void* body, int member) { (*static_cast<Body*>(body))(member); };
    run_(team_, task, const_cast<void*>(static_cast<void const*>(&f)));
  }

  /// Splits [0, n) into one contiguous range for each member and calls f(first, last, member);
  /// members without work are not called. Ranges start at multiples of `grain`, and fewer members
  /// are used than there are if each would get less than `grain`.
  /// @throws precondition_error if grain < 1; otherwise what f threw.
  template <class F>
  void split(std::int64_t n, std::int64_t grain, F&& f, call_site site = call_site::here()) const {
    expects(grain >= 1, "cpu::split: grain >= 1", site, {{"grain", grain}});
    if (n <= 0) return;
    std::int64_t const grains = (n - 1) / grain + 1;
    if (threads_ == 1 || grains == 1) {
      f(std::int64_t{0}, n, 0);
      return;
    }
    run([&](int member) {
      std::int64_t const first = grains * member / threads_ * grain;
      std::int64_t const last = std::min(n, grains * (member + 1) / threads_ * grain);
      if (first < last) f(first, last, member);
    });
  }

  /// Calls f(i, member) once for each i in [0, n); members take the next i when they are free.
  /// A member whose f throws takes no more; the others may take what is left, or the rest is not called.
  template <class F>
  void each(std::int64_t n, F&& f) const {
    if (threads_ == 1 || n <= 1) {
      for (std::int64_t i = 0; i < n; ++i) f(i, 0);
      return;
    }
    std::atomic<std::int64_t> next{0};
    run([&](int member) {
      for (;;) {
        std::int64_t const i = next.fetch_add(1, std::memory_order_relaxed);
        if (i >= n) return;
        f(i, member);
      }
    });
  }

 private:
  void* team_ = nullptr;
  int threads_ = 1;
  void (*run_)(void*, void (*)(void*, int), void*) = nullptr;
};

}  // namespace moe::inline MOE_ABI
