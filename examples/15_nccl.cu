// Exchange rows between GPUs over NCCL: equal blocks in one call, and a plan that a CUDA graph could capture.
// SPDX-License-Identifier: MIT
//
//   nvcc -std=c++20 -arch=native -I include examples/15_nccl.cu -o nccl -lnccl && ./nccl
//
// A thread for each GPU of this machine is a rank; it sends n numbers to each, itself too, both ways, and
// checks what it got. Never run on a GPU yet. For 8 GPUs it should print "8 of 8 GPUs are right".
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include <moe/comm/nccl.cuh>
#include <moe/moe.cuh>

using namespace std::chrono_literals;
constexpr std::int64_t n = 1000;

bool exchange_rows(moe::nccl_communicator& comm, float* in, float* out, moe::memory room) {
  int const R = comm.size(), rank = comm.rank();
  std::vector<float> sent, expected, got(R * n);
  for (std::int64_t i = 0; i < R * n; ++i) {
    sent.push_back(static_cast<float>(rank * R * n + i));
    expected.push_back(static_cast<float>((i / n * R + rank) * n + i % n));
  }
  cudaMemcpy(in, sent.data(), sent.size() * sizeof(float), cudaMemcpyHostToDevice);
  auto const is_right = [&] {
    if (!comm.wait_for_stream(moe::within(60s))) return false;
    cudaMemcpy(got.data(), out, got.size() * sizeof(float), cudaMemcpyDeviceToHost);
    cudaMemset(out, 0, got.size() * sizeof(float));
    return got == expected;
  };

  // Block d of `in` goes to rank d. `ok` says that this is enqueued on the stream, not that it is done.
  if (!moe::all_to_all<float>(comm, {in, R * n}, {out, R * n}, moe::within(60s))) return false;
  if (!is_right()) return false;
  // [plan]
  // The plan is the host's, with an executor for the device. Groups of GPUs stand for nodes.
  auto const nodes = moe::topology::even(1, R).grouped((R + 1) / 2);
  moe::exchange_plan const plan = moe::make_plan(moe::two_hop{}, nodes, rank);
  moe::bound_plan sizes(plan);
  sizes.bind_equal(1);  // a row of n numbers for each rank
  moe::device_exchange exchange(moe::gpu(comm.stream()), comm);
  if (!exchange.run<float>(sizes, {in, R, n}, {out, R, n}, room, moe::within(60s))) return false;
  // [/plan]
  return is_right();
}

bool run_rank(ncclUniqueId id, int R, int rank) {
  cudaSetDevice(rank);
  cudaStream_t stream = nullptr;
  cudaStreamCreate(&stream);
  moe::gpu_buffer const in(R * n * sizeof(float)), out(in.size()), room(4 * in.size());
  // [communicator]
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;  // so that deadlines hold
  ncclComm_t nccl = nullptr;
  ncclCommInitRankConfig(&nccl, R, id, rank, &config);
  if (!moe::wait_for_nccl(nccl, moe::within(60s))) return false;
  moe::nccl_communicator comm(nccl, stream);  // owns neither
  // [/communicator]
  bool const right =
      exchange_rows(comm, static_cast<float*>(in.data()), static_cast<float*>(out.data()), room);
  if (comm.native() != nullptr) ncclCommDestroy(nccl);  // a failure has aborted it, and freed
  return right;
}

int main() {
  int R = 0;
  if (cudaGetDeviceCount(&R) != cudaSuccess || R == 0) return std::puts("skipped: no GPU"), 0;
  ncclUniqueId id;
  if (ncclGetUniqueId(&id) != ncclSuccess) return 1;
  std::atomic<int> right = 0;
  std::vector<std::thread> ranks;
  for (int r = 0; r < R; ++r) ranks.emplace_back([&, r] { right += run_rank(id, R, r) ? 1 : 0; });
  for (std::thread& rank : ranks) rank.join();
  std::printf("%d of %d GPUs are right\n", right.load(), R);
  return right == R ? 0 : 1;
}
