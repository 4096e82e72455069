// Where work runs on the CPU: an executor over a team of threads that the caller owns.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <type_traits>
#include <vector>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// A team over std::thread: its threads live as long as it does and sleep between tasks.
class thread_team {
 public:
  /// @param threads  Members, the calling thread of `run` among them; 1 creates no thread.
  /// @throws precondition_error if threads < 1.
  explicit thread_team(int threads, call_site site = call_site::here()) {
    expects(threads >= 1, "thread_team: threads >= 1", site, {{"threads", threads}});
    members_.reserve(static_cast<std::size_t>(threads - 1));
    try {
      for (int member = 1; member < threads; ++member)
        members_.emplace_back([this, member] { serve(member); });
    } catch (...) {
      stop();
      throw;
    }
  }
  thread_team(thread_team const&) = delete;
  thread_team& operator=(thread_team const&) = delete;
  ~thread_team() { stop(); }

  int size() const noexcept { return static_cast<int>(members_.size()) + 1; }

  /// Runs task(context, member) on every member and waits for all.
  /// Calls from several threads take turns.
  /// @throws precondition_error from inside a task of this team (it would wait for itself);
  ///         otherwise what a task threw.
  void run(void (*task)(void*, int), void* context, call_site site = call_site::here()) {
    expects(inside() != this, "thread_team::run: not from inside a task of the same team", site);
    std::lock_guard const turn(turn_);
    {
      std::lock_guard const lock(mutex_);
      task_ = task;
      context_ = context;
      working_ = size() - 1;
      failure_ = nullptr;
      epoch_.store(epoch_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }
    start_.notify_all();
    work(0);
    // Tasks are short: look for a while before going to sleep.
    for (int look = 0; look < spins && working_.load(std::memory_order_acquire) > 0; ++look) relax();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return working_.load(std::memory_order_acquire) == 0; });
    if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
  }

 private:
  static constexpr int spins = 2000;  // a guess: some microseconds

  static thread_team const*& inside() noexcept {
    thread_local thread_team const* team = nullptr;
    return team;
  }

  static void relax() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  void work(int member) noexcept {
    thread_team const* const outer = std::exchange(inside(), this);
    try {
      task_(context_, member);
    } catch (...) {
      std::lock_guard const lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    inside() = outer;
  }

  void serve(int member) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int look = 0; look < spins && epoch_.load(std::memory_order_acquire) == seen; ++look)
        relax();
      {
        std::unique_lock lock(mutex_);
        start_.wait(lock, [&] { return epoch_.load(std::memory_order_acquire) != seen; });
        if (stopping_) return;
        seen = epoch_.load(std::memory_order_relaxed);
      }
      work(member);
      if (working_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard const lock(mutex_);
        done_.notify_one();
      }
    }
  }

  void stop() noexcept {
    {
      std::lock_guard const lock(mutex_);
      stopping_ = true;
      epoch_.store(epoch_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }
    start_.notify_all();
    for (std::thread& member : members_) member.join();
  }

  std::mutex turn_;
  std::mutex mutex_;
  std::condition_variable start_;
  std::condition_variable done_;
  std::atomic<std::uint64_t> epoch_{0};
  std::atomic<int> working_{0};
  void (*task_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::exception_ptr failure_;
  bool stopping_ = false;
  std::vector<std::thread> members_;
};

static_assert(worker_team<thread_team>);

/// The CPU executor: runs on a team, or on the calling thread alone. Copyable; does not own the team.
class cpu {
 public:
  /// The calling thread.
  constexpr cpu() noexcept = default;

  /// All members of `team`, which must outlive the executor.
  template <worker_team Team>
    requires(!std::same_as<Team, cpu>)
  cpu(Team& team) noexcept
      : team_(&team), threads_(static_cast<int>(team.size())),
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
    run_(team_, [](void* body, int member) { (*static_cast<Body*>(body))(member); },
         const_cast<void*>(static_cast<void const*>(&f)));
  }

  /// Splits [0, n) into one contiguous range for each member and calls f(first, last, member);
  /// members without work are not called. Ranges start at multiples of `grain`, and fewer members
  /// are used than there are if each would get less than `grain`.
  template <class F>
  void split(std::int64_t n, std::int64_t grain, F&& f) const {
    if (n <= 0) return;
    std::int64_t const grains = (n + grain - 1) / grain;
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
