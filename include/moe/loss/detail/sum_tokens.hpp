// Sums over tokens whose value does not depend on the number of threads.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>

namespace moe::inline MOE_ABI::detail {

/// Tokens whose terms are added one after another; blocks are added in order. A guess: large enough
/// that the partial sums are few, small enough that 4096 tokens occupy 16 threads.
inline constexpr std::int64_t tokens_per_sum = 256;

constexpr memory_size& add_sum_tokens(memory_size& size, std::int64_t T,
                                      std::int64_t width) noexcept {
  std::int64_t const blocks = (T + tokens_per_sum - 1) / tokens_per_sum;
  return size.add<double>(std::max(blocks, std::int64_t{1}) * width);
}

/// @param add  add(first, last, sum): adds the terms of tokens [first, last) to sum [width].
/// @return The sums over all T tokens, [width], in `scratch`; zeros if T = 0.
/// @note  Each block of tokens is added by one thread and blocks in their order, in double: the same
///        bits for any number of threads.
template <class Add>
double* sum_tokens(cpu const& exec, std::int64_t T, std::int64_t width, memory& scratch,
                   char const* what, call_site site, Add const& add) {
  std::int64_t const blocks = std::max((T + tokens_per_sum - 1) / tokens_per_sum, std::int64_t{1});
  double* const sums = scratch.take<double>(blocks * width, what, site);  // [blocks, width]
  exec.split(blocks, 1, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t b = first; b < last; ++b) {
      double* const sum = sums + b * width;
      std::fill_n(sum, width, 0.0);
      add(b * tokens_per_sum, std::min((b + 1) * tokens_per_sum, T), sum);
    }
  });
  for (std::int64_t b = 1; b < blocks; ++b)
    for (std::int64_t i = 0; i < width; ++i) sums[i] += sums[b * width + i];
  return sums;
}

}  // namespace moe::inline MOE_ABI::detail
