// Sums over tokens in kernels, in an order that the number of tokens fixes. Private to loss/.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/thread_block.hpp>

namespace moe::inline MOE_ABI::detail {

/// Tokens whose terms one block adds. A guess: 4096 tokens occupy the multiprocessors of an H200.
inline constexpr int tokens_per_block_sum = 32;

constexpr std::int64_t block_sums(std::int64_t T) noexcept {
  return T == 0 ? 1 : (T + tokens_per_block_sum - 1) / tokens_per_block_sum;
}

/// Bytes for [block_sums(T), width] sums.
constexpr std::size_t block_sums_scratch(std::int64_t T, std::int64_t width) noexcept {
  return memory_size().add<double>(block_sums(T) * width).bytes();
}

/// The tokens of a block: [first, first + count).
struct token_range {
  std::int64_t first;
  int count;

  template <thread_block B>
  MOE_HOST_DEVICE static token_range of(B const& b, std::int64_t T) {
    std::int64_t const first = std::int64_t{tokens_per_block_sum} * b.block();
    std::int64_t const left = T - first;
    return {first, left < tokens_per_block_sum ? static_cast<int>(left) : tokens_per_block_sum};
  }
};

/// The sum of the values of all threads of a block, in each of them, as a tree over their numbers.
template <thread_block B, int Threads>
MOE_HOST_DEVICE double sum_of_block(B& b, double (&shared)[Threads], double value) {
  static_assert((Threads & (Threads - 1)) == 0);
  b.sync();  // someone may still read the sum before
  shared[b.thread()] = value;
  for (int n = Threads / 2; n > 0; n /= 2) {
    b.sync();
    if (b.thread() < n) shared[b.thread()] += shared[b.thread() + n];
  }
  b.sync();
  return shared[0];
}

/// The sum over the lanes of a warp, in each of them.
template <thread_block B, class T>
MOE_HOST_DEVICE T sum_of_warp(B& b, T value) {
  MOE_UNROLL
  for (int bits = warp_size / 2; bits > 0; bits /= 2)
    value += b.shuffle_xor(all_lanes, value, bits);
  return value;
}

/// The greatest value of the lanes of a warp, in each of them.
template <thread_block B>
MOE_HOST_DEVICE double highest_of_warp(B& b, double value) {
  MOE_UNROLL
  for (int bits = warp_size / 2; bits > 0; bits /= 2) {
    double const other = b.shuffle_xor(all_lanes, value, bits);
    value = other > value ? other : value;
  }
  return value;
}

/// Adds the rows of sums [rows, width] to the first one, in order, and calls finish(b, room, totals) in
/// one block; room is for sum_of_block.
template <int Threads>
struct finish_sums_kernel {
  static constexpr int threads = Threads;
  struct shared {
    double room[Threads];
  };

  template <thread_block B, class Finish>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, double* sums, std::int64_t rows,
                                  std::int64_t width, Finish finish) const {
    b.wait_for_previous();
    b.let_next_start();
    for (std::int64_t i = b.thread(); i < width; i += Threads) {
      double total = 0;
      for (std::int64_t r = 0; r < rows; ++r) total += sums[r * width + i];
      sums[i] = total;
    }
    b.sync();
    finish(b, s.room, sums);
  }
};

template <kernel_executor X>
inline constexpr int loss_threads = threads_of<X>(256);

/// What a loss has of scratch, and how its sums are made and finished on an executor of kernels.
template <kernel_executor X>
struct block_summation {
  X const& exec;
  char const* function;
  call_site site;
  std::int64_t T, width;
  double* sums;  ///< [block_sums(T), width]

  block_summation(X const& on, char const* name, char const* enough, std::int64_t tokens,
                  std::int64_t terms, memory& scratch, call_site caller)
      : exec(on),
        function(name),
        site(caller),
        T(tokens),
        width(terms),
        sums(scratch.take<double>(block_sums(tokens) * terms, enough, caller)) {}

  /// Runs a kernel whose last argument is the sums.
  template <class Kernel, class... Args>
  void add(Kernel const& kernel, Args const&... args) const {
    exec.launch(function, kernel, block_sums(T), site, args..., sums);
  }
  template <class Finish>
  void finish(Finish const& f) const {
    exec.launch(function, finish_sums_kernel<loss_threads<X>>{}, 1, site, sums, block_sums(T),
                width, f);
  }
};

}  // namespace moe::inline MOE_ABI::detail
