// A team of threads over std::thread: what the CPU executor runs on.
// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
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

  /// Runs task(context, member) on every member, the calling thread being member 0, and waits for
  /// all. Calls from several threads take turns. A task may run another team
  /// (if all tasks that nest two teams nest them in the same order).
  /// @throws precondition_error from inside a task of this team, even through another team (it would
  ///         wait for itself); otherwise what a task threw.
  void run(void (*task)(void*, int), void* context, call_site site = call_site::here()) {
    for (nesting const* n = inside(); n != nullptr; n = n->outer)
      expects(n->team != this, "thread_team::run: not from inside a task of the same team", site);
    std::lock_guard const turn(turn_);
    {
      std::lock_guard const lock(mutex_);
      task_ = task;
      context_ = context;
      caller_ = inside();
      working_.store(size() - 1, std::memory_order_relaxed);
      epoch_.store(epoch_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }
    start_.notify_all();
    work(0);
    // Tasks are short: look for a while before going to sleep.
    for (int look = 0; look < spins && working_.load(std::memory_order_acquire) > 0; ++look)
      MOE_PAUSE();
    std::exception_ptr failure;
    {
      std::unique_lock lock(mutex_);
      done_.wait(lock, [this] { return working_.load(std::memory_order_acquire) == 0; });
      failure = std::exchange(failure_, nullptr);
    }
    if (failure) std::rethrow_exception(std::move(failure));
  }

 private:
  static constexpr int spins = 2000;  // a guess: some microseconds

  /// The teams that the calling thread works for, the innermost first. `outer` of a member is on
  /// the stack of the thread that called run, and lives until run returns.
  struct nesting {
    thread_team const* team;
    nesting const* outer;
  };
  static nesting const*& inside() noexcept {
    thread_local nesting const* innermost = nullptr;
    return innermost;
  }

  void work(int member) noexcept {
    nesting const here{this, caller_};
    nesting const* const before = std::exchange(inside(), &here);
    try {
      task_(context_, member);
    } catch (...) {
      std::lock_guard const lock(mutex_);
      if (!failure_) failure_ = std::current_exception();
    }
    inside() = before;
  }

  void serve(int member) {
    std::uint64_t seen = 0;
    for (;;) {
      for (int look = 0; look < spins && epoch_.load(std::memory_order_acquire) == seen; ++look)
        MOE_PAUSE();
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
  nesting const* caller_ = nullptr;
  std::exception_ptr failure_;
  bool stopping_ = false;
  std::vector<std::thread> members_;
};

static_assert(worker_team<thread_team>);

}  // namespace moe::inline MOE_ABI
