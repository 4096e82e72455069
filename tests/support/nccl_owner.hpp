// What the user of an nccl_communicator has: a stream and a communicator of NCCL for each rank, in its thread.
// SPDX-License-Identifier: MIT
#pragma once

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <support/exchanged_rows.hpp>
#include <thread>
#include <vector>

#include <moe/comm/nccl.cuh>

namespace moe_test {

using moe::nccl_communicator;
using moe::nccl_options;

/// A rank's stream and communicator of NCCL, as a user makes them.
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

/// f(rank) on a thread for each.
template <class F>
void on_threads(int R, F const& f) {
  std::vector<std::thread> threads;
  for (int r = 0; r < R; ++r) threads.emplace_back(f, r);
  for (std::thread& t : threads) t.join();
}

}  // namespace moe_test
