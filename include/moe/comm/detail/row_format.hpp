// What an executor of plans has to know of rows: their bytes, and how two are added.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// The sum of two elements of rows, rounded once.
template <class T>
MOE_HOST_DEVICE constexpr T add_elements(T a, T b) {
  if constexpr (scalar<T>)
    return static_cast<T>(static_cast<accumulate_t<T>>(a) + static_cast<accumulate_t<T>>(b));
  else
    return static_cast<T>(a + b);
}

/// The rows of one exchange, whatever they are made of.
struct row_format {
  std::size_t bytes = 0;
  /// Adds as many bytes of rows to others.
  void (*add)(std::byte* to, std::byte const* from, std::size_t bytes) = nullptr;
};

template <class T>
row_format format_of_rows(std::int64_t columns) {
  return {static_cast<std::size_t>(columns) * sizeof(T),
          [](std::byte* to, std::byte const* from, std::size_t bytes) {
            T* const sum = reinterpret_cast<T*>(to);
            T const* const more = reinterpret_cast<T const*>(from);
            for (std::size_t i = 0; i < bytes / sizeof(T); ++i)
              sum[i] = add_elements(sum[i], more[i]);
          }};
}

/// What a slot of the count exchange holds: how many rows it will have.
struct row_count {
  std::int64_t rows = 0;
  std::uint64_t epoch = 0;

  /// Sums of slots are of slots with the same number of rows; of others there is none, which -1 says.
  MOE_HOST_DEVICE friend constexpr row_count operator+(row_count a, row_count b) {
    return a.rows == b.rows && a.epoch == b.epoch ? a : row_count{-1, a.epoch};
  }
};
static_assert(sizeof(row_count) % alignof(std::max_align_t) == 0,
              "buffers of counts follow one another");

}  // namespace detail

}  // namespace moe::inline MOE_ABI
