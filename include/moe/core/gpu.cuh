// The GPU executor: where a function runs, on a stream that the caller owns.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <string>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/thread_block.hpp>

namespace moe {

/// The CUDA runtime refused a call of the library, or there is no device or driver to call.
class cuda_error : public error {
 public:
  cuda_error(std::string const& message, cudaError_t code) : error(message), code_(code) {}
  cudaError_t code() const noexcept { return code_; }

 private:
  cudaError_t code_;
};

}  // namespace moe

namespace moe::inline MOE_ABI {

namespace detail {

/// @throws cuda_error unless code is cudaSuccess, naming the function and the caller.
inline void check_cuda(cudaError_t code, char const* function, call_site site) {
  if (code == cudaSuccess) [[likely]]
    return;
  static_cast<void>(cudaGetLastError());  // so that the next call does not report it again
  bool const no_code = code == cudaErrorNoKernelImageForDevice ||
                       code == cudaErrorUnsupportedPtxVersion ||
                       code == cudaErrorInvalidDeviceFunction;
  throw cuda_error(std::string(function) + ": " + cudaGetErrorName(code) + ": " +
                       cudaGetErrorString(code) +
                       (no_code ? "; compile for the architecture of this device" : "") +
                       " (called at " + site.file + ":" + std::to_string(site.line) + ")",
                   code);
}

}  // namespace detail

/// The GPU executor: enqueues on a stream of the device that is current when it is made. Copyable; does
/// not own the stream.
///
/// Functions that are given one return at once. Pointers, those inside of views, batches, maps and
/// tables too, are to memory of the device; the views and structs themselves are the host's.
/// Everything can be captured into a CUDA graph.
/// @note  On Hopper and later, a kernel's blocks come while the kernel before still ends
///        (programmatic dependent launch). A user's kernels on the same stream see no difference.
class gpu {
 public:
  static constexpr int max_threads = 1024;

  /// @throws cuda_error if there is no device or driver.
  explicit gpu(cudaStream_t stream = nullptr, call_site site = call_site::here())
      : stream_(stream) {
    int device = 0, major = 0;
    auto const read = [&](int& value, cudaDeviceAttr attribute) {
      detail::check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "gpu", site);
    };
    detail::check_cuda(cudaGetDevice(&device), "gpu", site);
    read(processors_, cudaDevAttrMultiProcessorCount);
    read(major, cudaDevAttrComputeCapabilityMajor);
    overlaps_ = major >= 9;
  }

  cudaStream_t stream() const noexcept { return stream_; }
  /// Multiprocessors of the device.
  int processors() const noexcept { return processors_; }

  /// Enqueues a kernel body; see `kernel_executor`.
  /// @throws cuda_error if it cannot be launched: the program has no code for this device, say.
  template <class Kernel, class... Args>
  void launch(char const* function, Kernel const& kernel, std::int64_t blocks, call_site site,
              Args const&... args) const {
    if (blocks == 0) return;
    if (blocks < 0 || blocks > 0x7fffffff)
      throw precondition_error(
          std::string(function) + ": work fits 2^31 - 1 blocks; got " + std::to_string(blocks),
          site);
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(Kernel::threads));
    config.stream = stream_;
    config.attrs = &overlap;
    config.numAttrs = overlaps_ ? 1 : 0;
    detail::check_cuda(cudaLaunchKernelEx(&config, run_kernel<Kernel, Args...>, kernel, args...),
                       function, site);
  }

  /// Enqueues setting `bytes` bytes.
  void fill(void* data, int byte, std::size_t bytes, call_site site = call_site::here()) const {
    if (bytes == 0) return;
    detail::check_cuda(cudaMemsetAsync(data, byte, bytes, stream_), "gpu::fill", site);
  }

 private:
  cudaStream_t stream_;
  int processors_ = 0;
  bool overlaps_ = false;
};

static_assert(kernel_executor<gpu>);

/// Memory of the current device for callers who have none: uninitialised, converting to `memory`.
class gpu_buffer {
 public:
  gpu_buffer() noexcept = default;
  /// @throws cuda_error if there is not as much, or no device.
  explicit gpu_buffer(std::size_t bytes, call_site site = call_site::here()) : bytes_(bytes) {
    if (bytes > 0) detail::check_cuda(cudaMalloc(&data_, bytes), "gpu_buffer", site);
  }
  gpu_buffer(gpu_buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  gpu_buffer& operator=(gpu_buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  /// Waits for the device, as cudaFree does.
  ~gpu_buffer() { static_cast<void>(cudaFree(data_)); }

  operator memory() const noexcept { return {data_, bytes_}; }
  void* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace moe::inline MOE_ABI
