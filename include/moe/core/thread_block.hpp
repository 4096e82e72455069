// The threads of one block of a kernel: the concept that kernel bodies are written for, and CUDA's.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

/// Threads of a warp. Bit l of a mask of lanes stands for lane l = thread % warp_size.
inline constexpr int warp_size = 32;
inline constexpr std::uint32_t all_lanes = 0xffffffffu;

/// The lanes below one of them: who comes before it in the order of a warp.
MOE_HOST_DEVICE constexpr std::uint32_t lanes_below(int lane) noexcept {
  return (std::uint32_t(1) << lane) - 1;
}

/// How many lanes a mask names.
MOE_HOST_DEVICE inline int count_lanes(std::uint32_t lanes) noexcept {
#if MOE_DEVICE_PASS
  return __popc(lanes);
#else
  return __builtin_popcount(lanes);
#endif
}

/// The threads of one block, as one of them sees it. A kernel body is a template over this concept,
/// so that one source runs on a GPU and, in tests, on an emulator that checks it.
///
///     struct kernel {
///       static constexpr int threads = 128;
///       struct shared { float partial[threads / warp_size]; };    // trivial; undefined at first
///       template <thread_block B>
///       MOE_HOST_DEVICE void operator()(B& b, shared& s, float const* in, float* out) const;
///     };
///
/// Syntax.    Below; T of a shuffle is an arithmetic type of 4 or 8 bytes.
/// Semantics. thread() of threads() in block() of blocks(). sync() waits for all threads of the block
///            and orders memory among them; every thread calls it at the same place of the source.
///            The others are calls of some lanes of one warp together: each lane that the mask names
///            makes the same call with the same mask, its own lane among them.
///            sync_warp orders memory among those lanes; the others wait but order nothing.
///            shuffle gives the value of `lane`, shuffle_xor that of lane ^ bits, shuffle_up that
///            of lane - distance, or the own value if that is negative: a lane of the mask in each
///            case. ballot gives the lanes whose predicate holds, match_any those of an equal key.
///            atomic_add adds to shared or global memory, 4 or 8 bytes, gives what was there, orders
///            nothing.
/// Cost.      On a GPU one instruction each.
/// Models.    `cuda_block`; the block emulator of the tests.
template <class B>
concept thread_block = requires(B& b, B const& c, std::uint32_t lanes, int i, bool holds,
                                std::int32_t* counter, std::int32_t n, std::uint64_t key, float v) {
  { c.thread() } -> std::same_as<int>;
  { c.threads() } -> std::same_as<int>;
  { c.block() } -> std::same_as<int>;
  { c.blocks() } -> std::same_as<int>;
  { b.sync() } -> std::same_as<void>;
  { b.sync_warp(lanes) } -> std::same_as<void>;
  { b.shuffle(lanes, v, i) } -> std::same_as<float>;
  { b.shuffle_xor(lanes, v, i) } -> std::same_as<float>;
  { b.shuffle_xor(lanes, key, i) } -> std::same_as<std::uint64_t>;
  { b.shuffle_up(lanes, n, i) } -> std::same_as<std::int32_t>;
  { b.ballot(lanes, holds) } -> std::same_as<std::uint32_t>;
  { b.match_any(lanes, n) } -> std::same_as<std::uint32_t>;
  { b.highest(lanes, lanes) } -> std::same_as<std::uint32_t>;
  { b.atomic_add(counter, n) } -> std::same_as<std::int32_t>;
  { b.atomic_add(static_cast<std::int64_t*>(nullptr), n) } -> std::same_as<std::int64_t>;
  { b.arrive(counter) } -> std::same_as<std::int32_t>;
  { b.wait_for_previous() } -> std::same_as<void>;
  { b.let_next_start() } -> std::same_as<void>;
};

#if MOE_IS_CUDA

/// A one-dimensional block of CUDA threads. Has no state; each call is the intrinsic of that name.
template <int Threads>
struct cuda_block {
  static_assert(Threads % warp_size == 0 && Threads <= 1024);

  __device__ static int thread() { return static_cast<int>(threadIdx.x); }
  __device__ static constexpr int threads() { return Threads; }
  __device__ static int block() { return static_cast<int>(blockIdx.x); }
  __device__ static int blocks() { return static_cast<int>(gridDim.x); }

  __device__ static void sync() { __syncthreads(); }
  __device__ static void sync_warp(std::uint32_t lanes) { __syncwarp(lanes); }
  template <class T>
  __device__ static T shuffle(std::uint32_t lanes, T value, int lane) {
    return __shfl_sync(lanes, value, lane);
  }
  template <class T>
  __device__ static T shuffle_xor(std::uint32_t lanes, T value, int bits) {
    return __shfl_xor_sync(lanes, value, bits);
  }
  template <class T>
  __device__ static T shuffle_up(std::uint32_t lanes, T value, int distance) {
    return __shfl_up_sync(lanes, value, static_cast<unsigned>(distance));
  }
  __device__ static std::uint32_t ballot(std::uint32_t lanes, bool holds) {
    return __ballot_sync(lanes, holds);
  }
  __device__ static std::uint32_t match_any(std::uint32_t lanes, std::int32_t key) {
    return __match_any_sync(lanes, key);
  }
  __device__ static std::uint32_t highest(std::uint32_t lanes, std::uint32_t value) {
    return __reduce_max_sync(lanes, value);
  }
  __device__ static std::int32_t atomic_add(std::int32_t* counter, std::int32_t n) {
    return atomicAdd(counter, n);
  }
  __device__ static std::int64_t atomic_add(std::int64_t* counter, std::int64_t n) {
    return static_cast<std::int64_t>(atomicAdd(reinterpret_cast<unsigned long long*>(counter),
                                               static_cast<unsigned long long>(n)));
  }
  __device__ static std::int32_t arrive(std::int32_t* counter) {
    __threadfence();
    std::int32_t const before = atomicAdd(counter, 1);
    __threadfence();
    return before;
  }
  // Before Hopper a kernel starts when the one before has ended.
  __device__ static void wait_for_previous() {
#if MOE_DEVICE_ARCH >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  }
  __device__ static void let_next_start() {
#if MOE_DEVICE_ARCH >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
  }
};

static_assert(thread_block<cuda_block<128>>);

namespace detail {

/// Kernel::resident_blocks, if it has one: blocks that a multiprocessor is to have room for. ptxas, not
/// told, keeps some registers in memory so that more blocks would fit than there are.
template <class Kernel>
constexpr int resident_blocks() {
  if constexpr (requires { Kernel::resident_blocks; })
    return Kernel::resident_blocks;
  else
    return 0;
}

}  // namespace detail

/// The CUDA entry of a kernel body, which `gpu::launch` calls; a user's own launch is
/// run_kernel<<<blocks, Kernel::threads, 0, stream>>>(kernel, args...).
template <class Kernel, class... Args>
__global__ void __launch_bounds__(Kernel::threads, detail::resident_blocks<Kernel>())
    run_kernel(Kernel kernel, Args... args) {
  static_assert(std::is_trivially_default_constructible_v<typename Kernel::shared>);
  __shared__ typename Kernel::shared shared;
  cuda_block<Kernel::threads> block;
  kernel(block, shared, args...);
}

#endif

}  // namespace moe::inline MOE_ABI
