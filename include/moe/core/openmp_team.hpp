// A team over OpenMP, for programs that already run OpenMP threads. Needs -fopenmp.
// SPDX-License-Identifier: MIT
#pragma once

#include <exception>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

#if !defined(_OPENMP)
#error "moe: core/openmp_team.hpp needs OpenMP (-fopenmp); core/thread_team.hpp does not"
#endif

#include <omp.h>

namespace moe::inline MOE_ABI {

/// A team of OpenMP threads: the runtime's pool, so nothing is created per call.
class openmp_team {
 public:
  /// @throws precondition_error if threads < 1.
  explicit openmp_team(int threads = omp_get_max_threads(), call_site site = call_site::here())
      : threads_(threads) {
    expects(threads >= 1, "openmp_team: threads >= 1", site, {{"threads", threads}});
  }

  int size() const noexcept { return threads_; }

  /// As `worker_team` says. OpenMP may give fewer threads than asked (nested regions, a thread
  /// limit); the threads that came share all members' work.
  void run(void (*task)(void*, int), void* context) {
    std::exception_ptr failure;
#pragma omp parallel num_threads(threads_) default(none) shared(failure, task, context)
    {
      int const stride = omp_get_num_threads();
      for (int member = omp_get_thread_num(); member < threads_; member += stride) {
        try {
          task(context, member);
        } catch (...) {
#pragma omp critical(moe_openmp_team_failure)
          if (!failure) failure = std::current_exception();
        }
      }
    }
    if (failure) std::rethrow_exception(failure);
  }

 private:
  int threads_;
};

static_assert(worker_team<openmp_team>);

}  // namespace moe::inline MOE_ABI
