// Which sanitizer this program is built with, and what it has to be told about emulated threads.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>

#if defined(__has_feature)
#define MOE_TEST_HAS_FEATURE(name) __has_feature(name)
#else
#define MOE_TEST_HAS_FEATURE(name) 0
#endif

#if defined(__SANITIZE_THREAD__) || MOE_TEST_HAS_FEATURE(thread_sanitizer)
#define MOE_TEST_TSAN 1
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(char const* file, int line);
void AnnotateIgnoreReadsEnd(char const* file, int line);
void AnnotateIgnoreWritesBegin(char const* file, int line);
void AnnotateIgnoreWritesEnd(char const* file, int line);
}
#else
#define MOE_TEST_TSAN 0
#endif

#if defined(__SANITIZE_ADDRESS__) || MOE_TEST_HAS_FEATURE(address_sanitizer)
#define MOE_TEST_ASAN 1
#include <sanitizer/common_interface_defs.h>
#else
#define MOE_TEST_ASAN 0
#endif

namespace moe_test {

inline constexpr bool has_thread_sanitizer = MOE_TEST_TSAN != 0;
inline constexpr bool has_address_sanitizer = MOE_TEST_ASAN != 0;

/// Everything this thread did before `release_order` comes before what follows an `acquire_order` of
/// the same token elsewhere: the only order that the thread sanitizer knows of emulated threads.
inline void release_order([[maybe_unused]] void* token) {
#if MOE_TEST_TSAN
  __tsan_release(token);
#endif
}
inline void acquire_order([[maybe_unused]] void* token) {
#if MOE_TEST_TSAN
  __tsan_acquire(token);
#endif
}

/// While one lives, the running thread's accesses are not those of a kernel: the emulator's own
/// state is shared by all threads without any order that the thread sanitizer could see.
class unobserved {
 public:
#if MOE_TEST_TSAN
  unobserved() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~unobserved() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  unobserved() {}
  ~unobserved() {}
#endif
  unobserved(unobserved const&) = delete;
  unobserved& operator=(unobserved const&) = delete;
};

}  // namespace moe_test
