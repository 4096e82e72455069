// What launches kernels: the concept that the library's GPU functions are written for.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/thread_block.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

struct any_kernel {
  static constexpr int threads = warp_size;
  struct shared {};

  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B&, shared&, int) const {}
};

}  // namespace detail

/// A queue of kernels. The functions of the library that take one only enqueue; `route`, `build_table`
/// and the others have one overload for `cpu` and one for these.
///
/// Syntax.    `X::max_threads`, an int; `x.processors()`; `x.launch(function, kernel, blocks, site,
///            args...)`; `x.fill(data, byte, bytes, site)`.
/// Semantics. launch runs kernel(b, shared, args...) in `blocks` blocks of Kernel::threads threads,
///            after all that was enqueued before, and returns at once. kernel and args are copied;
///            none of them is a reference. No blocks: nothing happens. fill sets memory that kernels
///            see. What fails at once is an exception that names `function`.
///            max_threads, a power of two of at least 32, bounds the blocks that it runs;
///            processors() says how many blocks it takes to occupy all of it once.
/// Cost.      Allocates nothing, waits for nothing.
/// Models.    `gpu`; the emulator of the tests.
template <class X>
concept kernel_executor =
    requires(X const& x, detail::any_kernel const& kernel, void* data, int argument,
             std::int64_t blocks, std::size_t bytes, char const* function, call_site site) {
      { X::max_threads } -> std::convertible_to<int>;
      { x.processors() } -> std::same_as<int>;
      x.launch(function, kernel, blocks, site, argument);
      x.fill(data, 0, bytes, site);
    };

namespace detail {

/// Blocks, or chunks, of `each` that n takes.
constexpr std::int64_t blocks_for(std::int64_t n, std::int64_t each) noexcept {
  return (n + each - 1) / each;
}

}  // namespace detail

/// Threads of a block: as many as the executor runs, but no more than are of use.
template <kernel_executor X>
constexpr int threads_of(int useful) noexcept {
  return useful < X::max_threads ? useful : X::max_threads;
}

}  // namespace moe::inline MOE_ABI
