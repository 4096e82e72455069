// What an executor of plans has to know of rows: their bytes, and how two are added.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

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
            for (std::size_t i = 0; i < bytes / sizeof(T); ++i) {
              if constexpr (scalar<T>)
                sum[i] = static_cast<T>(static_cast<accumulate_t<T>>(sum[i]) +
                                        static_cast<accumulate_t<T>>(more[i]));
              else
                sum[i] = static_cast<T>(sum[i] + more[i]);
            }
          }};
}

/// Where rows of a buffer lie, or a part of each.
struct buffer_part {
  std::byte* data = nullptr;
  std::size_t stride = 0;  // from one row to the next
  std::size_t bytes = 0;

  std::byte* row(std::int64_t r) const { return data + static_cast<std::size_t>(r) * stride; }
};
struct buffer_rows {
  buffer_part part[2];
};

/// What a slot of the count exchange holds: how many rows it will have.
struct row_count {
  std::int64_t rows = 0;
  std::uint64_t epoch = 0;
};

/// Sums of slots are of slots with the same number of rows.
inline void agree(std::byte* to, std::byte const* from, std::size_t bytes) {
  for (std::size_t at = 0; at < bytes; at += sizeof(row_count)) {
    row_count a, b;
    std::memcpy(&a, to + at, sizeof a);
    std::memcpy(&b, from + at, sizeof b);
    if (a.rows == b.rows && a.epoch == b.epoch) continue;
    a.rows = -1;
    std::memcpy(to + at, &a, sizeof a);
  }
}

}  // namespace detail

}  // namespace moe::inline MOE_ABI
