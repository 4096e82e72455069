// A fiber: a function with a stack of its own, which runs until it pauses.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <vector>

#include "emulator/sanitizers.hpp"

#if defined(__x86_64__) && !defined(MOE_TEST_UCONTEXT)
// Some nanoseconds; swapcontext takes 0.7 us, as it asks the system for the signal mask. Saves the
// registers that a called function has to keep, and the stack pointer, to go on with another stack.
asm(R"(
.pushsection .text
.weak moe_test_switch_stack
.type moe_test_switch_stack, @function
moe_test_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size moe_test_switch_stack, .-moe_test_switch_stack
.popsection
)");
extern "C" void moe_test_switch_stack(void** from, void* to);
#else
#include <ucontext.h>
#endif

namespace moe_test {

#if defined(__x86_64__) && !defined(MOE_TEST_UCONTEXT)

/// A place to go on at.
struct execution_point {
  void* stack_pointer = nullptr;

  /// Goes on at the beginning of `entry`, which never returns, on a stack of its own.
  void start_at(void (*entry)(), std::byte* stack, std::size_t bytes) {
    auto** top = reinterpret_cast<void**>(stack + bytes / 16 * 16);
    *--top = nullptr;  // where entry would return to
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer = top;
  }
};

inline void go_on(execution_point& from, execution_point const& to) {
  moe_test_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

struct execution_point {
  ucontext_t context;

  void start_at(void (*entry)(), std::byte* stack, std::size_t bytes) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};

inline void go_on(execution_point& from, execution_point const& to) {
  swapcontext(&from.context, &to.context);
}

#endif

#if MOE_TEST_TSAN
/// Fibers of the thread sanitizer for the next launch, because to make one takes the system longer than
/// to run it: a fiber of one launch goes on as one of a later launch, which comes after it anyhow.
class sanitizer_fibers {
 public:
  static void* take() {
    if (unused().empty()) return __tsan_create_fiber(0);
    void* const fiber = unused().back().fiber;
    uses()[fiber] = unused().back().uses;
    unused().pop_back();
    return fiber;
  }
  static void give(void* fiber) {
    // A fiber that ends leaves the calls it is in on the sanitizer's stack, which has room for 2^16.
    int const used = uses()[fiber] + 1;
    uses().erase(fiber);
    if (used < 1000)
      unused().push_back({fiber, used});
    else
      __tsan_destroy_fiber(fiber);
  }
  /// Before a fork: the sanitizer takes no account of what a child does before it goes on with them.
  static void forget() {
    for (used_fiber const& f : unused()) __tsan_destroy_fiber(f.fiber);
    unused().clear();
  }

 private:
  struct used_fiber {
    void* fiber;
    int uses;
  };
  static std::vector<used_fiber>& unused() {
    static std::vector<used_fiber> all;
    return all;
  }
  static std::map<void*, int>& uses() {
    static std::map<void*, int> all;
    return all;
  }
};
#endif

/// A function on a stack of its own. To the sanitizers it is a thread, ordered with no other.
class fiber {
 public:
  using function = void (*)(void* context);

  fiber() = default;
  fiber(fiber const&) = delete;
  fiber& operator=(fiber const&) = delete;
  ~fiber() {
#if MOE_TEST_TSAN
    if (thread_ != nullptr) sanitizer_fibers::give(thread_);
#endif
  }

  /// @param f      Called by the first resume(). It may throw nothing.
  /// @param stack  [bytes], 16-byte aligned; the caller's, until the fiber is destroyed.
  void start(function f, void* context, std::byte* stack, std::size_t bytes) {
    function_ = f;
    context_ = context;
    stack_ = stack;
    bytes_ = bytes;
    here_.start_at(enter, stack, bytes);
#if MOE_TEST_TSAN
    thread_ = sanitizer_fibers::take();
    release_order(this);  // as making a thread is
#endif
  }

  /// The one that runs, or null.
  static fiber* running() { return running_; }
  void* local = nullptr;  ///< For the use of the function.

  /// Runs it until it pauses or ends. Called by the program's own thread alone.
  // Not instrumented, because between the call that tells the sanitizer and the switch itself an
  // access would count as one of the other side.
  __attribute__((noinline, no_sanitize("thread"))) void resume() {
    running_ = this;
#if MOE_TEST_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, bytes_);
#endif
#if MOE_TEST_TSAN
    resumer_thread_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(thread_, __tsan_switch_to_fiber_no_sync);
#endif
    go_on(resumer_, here_);
#if MOE_TEST_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    running_ = nullptr;
  }

  /// Goes back to who resumed it, until it is resumed again. Called on its own stack.
  __attribute__((noinline, no_sanitize("thread"))) void pause() {
#if MOE_TEST_ASAN
    void* fake_stack = nullptr;
    leave(&fake_stack);
    __sanitizer_finish_switch_fiber(fake_stack, &resumer_stack_, &resumer_bytes_);
#else
    leave(nullptr);
#endif
  }

 private:
  __attribute__((noinline, no_sanitize("thread"))) static void enter() {
    fiber& self = *running_;
#if MOE_TEST_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &self.resumer_stack_, &self.resumer_bytes_);
#endif
    acquire_order(&self);
    self.function_(self.context_);
    self.leave(nullptr);
    std::abort();
  }

  /// @param fake_stack  Null when it ends.
  __attribute__((no_sanitize("thread"))) void leave([[maybe_unused]] void** fake_stack) {
#if MOE_TEST_ASAN
    __sanitizer_start_switch_fiber(fake_stack, resumer_stack_, resumer_bytes_);
#endif
#if MOE_TEST_TSAN
    __tsan_switch_to_fiber(resumer_thread_, __tsan_switch_to_fiber_no_sync);
#endif
    go_on(here_, resumer_);
  }

  static inline fiber* running_ = nullptr;

  function function_ = nullptr;
  void* context_ = nullptr;
  std::byte* stack_ = nullptr;
  std::size_t bytes_ = 0;
  execution_point here_;
  execution_point resumer_;
#if MOE_TEST_ASAN
  void const* resumer_stack_ = nullptr;
  std::size_t resumer_bytes_ = 0;
#endif
#if MOE_TEST_TSAN
  void* thread_ = nullptr;
  void* resumer_thread_ = nullptr;
#endif
};

}  // namespace moe_test
