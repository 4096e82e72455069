// What a launch of dispatch or combine chooses: how a [T,M] matrix is shared out, and how it moves.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/chunk.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Slices of `columns` columns; the last one of a row may be shorter.
struct slices {
  std::int32_t columns;
  std::int32_t of_row;

  struct range {
    std::int64_t row, first, last;
  };

  /// Unit u of rows * of_row.
  MOE_HOST_DEVICE range of(std::uint32_t u, std::int64_t M) const noexcept {
    // 32 bits: a division of 64 takes a GPU 100 instructions. 2^32 slices are 1 TiB at least.
    std::uint32_t const row = u / static_cast<std::uint32_t>(of_row);
    std::int64_t const first = std::int64_t(u - row * static_cast<std::uint32_t>(of_row)) * columns;
    return {row, first, first + columns < M ? first + columns : M};
  }
};

/// Slices of as many steps as leave `warps` units of [rows,M], but 1 to 4.
inline slices slice(std::int64_t rows, std::int64_t M, int step, std::int64_t warps) noexcept {
  std::int64_t const steps = (M + step - 1) / step;
  int each = 4;
  while (each > 1 && rows * ((steps + each - 1) / each) < warps) each /= 2;
  return {step * each, static_cast<std::int32_t>((steps + each - 1) / each)};
}

/// Elements of S that a thread moves at once.
template <class S>
inline constexpr int vector_size = access_bytes / static_cast<int>(sizeof(S));

/// Whether all rows of these views can be moved in whole vectors. Absent ones do not matter.
template <class... Views>
bool in_vectors(Views const&... views) noexcept {
  auto const fits = [](auto const& view) {
    auto const size = static_cast<std::int64_t>(sizeof(*view.data()));
    return view.absent() ||
           (reinterpret_cast<std::uintptr_t>(view.data()) % access_bytes == 0 &&
            view.cols() * size % access_bytes == 0 && view.ld() * size % access_bytes == 0);
  };
  return (fits(views) && ...);
}

/// Calls f(integral constant): elements of S that a thread moves at once.
template <class S, class F>
void with_vector(bool whole, F const& f) {
  if (whole)
    f(std::integral_constant<int, vector_size<S>>{});
  else
    f(std::integral_constant<int, 1>{});
}

/// Warps that occupy a device: half of what fits. A guess, never timed.
template <kernel_executor X>
std::int64_t warps_of(X const& exec) noexcept {
  return 32 * std::int64_t(exec.processors());
}

/// Outputs of this many bytes are stored past the caches, as they are gone anyway when someone reads
/// them: the H200 has 60 MB of second-level cache. Never timed.
inline constexpr std::int64_t past_l2_bytes = std::int64_t{64} << 20;

template <class S>
bool is_past_l2(std::int64_t rows, matrix_view<S> out) noexcept {
  return rows * out.cols() * static_cast<std::int64_t>(sizeof(S)) >= past_l2_bytes;
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
