// Arrays on the GPU for tests, and what a test does on a machine without one.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <cuda_runtime.h>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/core/gpu.cuh>

namespace moe_test {

/// Why nothing can be run on a GPU here, or null.
inline char const* why_no_gpu() {
  int devices = 0;
  cudaError_t const e = cudaGetDeviceCount(&devices);
  if (e == cudaSuccess && devices > 0) return nullptr;
  static_cast<void>(cudaGetLastError());
  return e != cudaSuccess ? cudaGetErrorName(e) : "no device";
}

/// Whether the test case goes on. Where it must, it fails instead of being skipped.
inline bool has_gpu() {
  char const* const why = why_no_gpu();
  if (why == nullptr) return true;
  char const* const required = std::getenv("MOE_REQUIRE_GPU");
  if (required != nullptr && std::strcmp(required, "1") == 0)
    FAIL("MOE_REQUIRE_GPU=1, and there is no GPU: " << std::string(why));
  MESSAGE("SKIPPED (no GPU): " << std::string(why));
  return false;
}

/// First line of every test case that runs something on a GPU.
#define MOE_NEEDS_GPU() \
  if (!moe_test::has_gpu()) return

/// An array on the device with a copy of a vector, or zeros.
template <class T>
class on_device {
 public:
  explicit on_device(std::vector<T> const& values) : on_device(values.size()) {
    copy(bytes_.data(), values.data(), cudaMemcpyHostToDevice);
  }
  explicit on_device(std::size_t size) : size_(size), bytes_(size * sizeof(T)) {
    if (size > 0)
      moe::detail::check_cuda(cudaMemset(bytes_.data(), 0, size * sizeof(T)), "on_device", {});
  }

  T* data() const { return static_cast<T*>(bytes_.data()); }
  std::size_t size() const { return size_; }

  /// What the array holds when all that was enqueued has run.
  std::vector<T> get() const {
    std::vector<T> values(size_);
    moe::detail::check_cuda(cudaDeviceSynchronize(), "on_device", {});
    copy(values.data(), bytes_.data(), cudaMemcpyDeviceToHost);
    return values;
  }

 private:
  void copy(void* to, void const* from, cudaMemcpyKind kind) const {
    if (size_ > 0)
      moe::detail::check_cuda(cudaMemcpy(to, from, size_ * sizeof(T), kind), "on_device", {});
  }

  std::size_t size_;
  moe::gpu_buffer bytes_;
};

/// Calls enqueue(exec) while its stream is captured, then runs the graph `times` times.
template <class F>
void replay_as_graph(F const& enqueue, int times = 1) {
  auto const check = [](cudaError_t e) { moe::detail::check_cuda(e, "replay_as_graph", {}); };
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamCreate(&stream));
  moe::gpu const exec(stream);
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  enqueue(exec);
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));
  for (int i = 0; i < times; ++i) check(cudaGraphLaunch(replay, stream));
  check(cudaStreamSynchronize(stream));
  check(cudaGraphExecDestroy(replay));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
}

}  // namespace moe_test
