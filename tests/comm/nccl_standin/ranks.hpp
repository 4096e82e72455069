// Ranks over the stand-in of NCCL: threads, each with a stream and a communicator.
// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime_api.h>
#include <doctest/doctest.h>
#include <nccl.h>
#include <support/exchanged_rows.hpp>
#include <thread>
#include <vector>

#include <moe/comm/nccl.cuh>

#include "comm/nccl_standin/nccl_standin.hpp"

namespace moe_test {

using moe::nccl_communicator;
using moe::nccl_options;

/// A rank's stream and communicator of NCCL, as a user makes them, destroyed unless it is dead.
class owner {
 public:
  owner(ncclUniqueId id, int R, int rank, bool is_blocking = false) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = is_blocking ? 1 : 0;
    static_cast<void>(cudaStreamCreate(&stream_));
    static_cast<void>(ncclCommInitRankConfig(&comm_, R, id, rank, &config));
    is_ready_ = static_cast<bool>(wait_for_nccl(comm_, late()));
  }
  owner(owner const&) = delete;
  owner& operator=(owner const&) = delete;
  ~owner() { static_cast<void>(cudaStreamDestroy(stream_)); }

  bool is_ready() const { return is_ready_; }
  nccl_communicator communicator(nccl_options options = {}) const {
    return {comm_, stream_, options};
  }
  ncclComm_t handle() const { return comm_; }
  cudaStream_t stream() const { return stream_; }

  /// What is left to the owner of a communicator when its user is done with it.
  void end(nccl_communicator const& used, bool is_over = false) const {
    if (used.native() == nullptr) return;
    if (is_over) return static_cast<void>(ncclCommAbort(comm_));
    static_cast<void>(ncclCommFinalize(comm_));
    static_cast<void>(wait_for_nccl(comm_, late()));
    static_cast<void>(ncclCommDestroy(comm_));
  }

 private:
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  bool is_ready_ = false;
};

template <class F>
void on_threads(int R, F const& f) {
  std::vector<std::thread> threads;
  for (int r = 0; r < R; ++r) threads.emplace_back(f, r);
  for (std::thread& t : threads) t.join();
}

/// f(communicator, owner) on a thread for each rank; afterwards nothing was wrong, and all is freed.
template <class F>
void on_ranks(int R, F const& f, nccl_options options = {}, bool is_blocking = false) {
  ncclUniqueId id;
  static_cast<void>(ncclGetUniqueId(&id));
  std::vector<char> ready(at(R));
  on_threads(R, [&](int r) {
    owner const mine(id, R, r, is_blocking);
    ready[at(r)] = mine.is_ready();
    nccl_communicator comm = mine.communicator(options);
    f(comm, mine);
  });
  CHECK(ready == std::vector<char>(at(R), true));
  CHECK(nccl_standin::wrong_uses() == 0);
  CHECK(nccl_standin::alive() == 0);
}

/// Turns off for its scope that ranks hear of those that have aborted.
struct aborts_untold {
  aborts_untold() { nccl_standin::tell_of_aborts(false); }
  ~aborts_untold() { nccl_standin::tell_of_aborts(true); }
};

}  // namespace moe_test
