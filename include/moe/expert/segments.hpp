// What a grouped product runs over: the rows of each expert, and one matrix for each expert.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// The rows of each expert: segment q = p * sources + s has used[q] rows from begin[q].
/// A routing table is one; a caller with counts of its own fills the arrays. Does not own them.
struct row_segments {
  int experts = 0;  ///< P
  int sources = 1;
  std::int32_t const* begin = nullptr;  ///< [P*sources]
  std::int32_t const* used = nullptr;   ///< [P*sources]

  constexpr row_segments() noexcept = default;
  constexpr row_segments(int P, std::int32_t const* first_row, std::int32_t const* rows_used,
                         int sources_each = 1) noexcept
      : experts(P), sources(sources_each), begin(first_row), used(rows_used) {}
  constexpr row_segments(routing_table const& table) noexcept
      : experts(table.P), sources(table.sources), begin(table.begin), used(table.used) {}

  /// Rows of expert p, from all sources.
  constexpr std::int64_t rows(int p) const noexcept {
    std::int64_t sum = 0;
    for (int s = 0; s < sources; ++s) sum += used[p * sources + s];
    return sum;
  }
};

/// All T rows of a matrix as the one segment of one expert. Owns its two numbers.
class all_rows {
 public:
  /// @throws precondition_error unless T fits 32-bit ids.
  explicit all_rows(std::int64_t T, call_site site = call_site::here())
      : used_(static_cast<std::int32_t>(T)) {
    expects(T >= 0 && T <= 0x7fffffff, "all_rows: 0 <= T < 2^31", site, {{"T", T}});
  }
  operator row_segments() const noexcept { return {1, &begin_, &used_}; }

 private:
  std::int32_t begin_ = 0;
  std::int32_t used_;
};

/// Walks the rows of one expert, from any of its sources, in order.
class row_cursor {
 public:
  /// At row `first` of expert p, counted over all its segments.
  constexpr row_cursor(row_segments const& segments, int p, std::int64_t first) noexcept
      : segments_(segments), segment_(p * segments.sources) {
    while (first > 0 && first >= segments.used[segment_]) first -= segments.used[segment_++];
    offset_ = first;
  }

  /// The current row; then moves on. @pre There is one.
  constexpr std::int64_t next() noexcept {
    while (offset_ >= segments_.used[segment_]) {
      ++segment_;
      offset_ = 0;
    }
    return segments_.begin[segment_] + offset_++;
  }

 private:
  row_segments const& segments_;
  int segment_;
  std::int64_t offset_ = 0;
};

/// One matrix [rows, cols] for each of `count` experts: weights, or their gradients. Row-major with a
/// leading dimension, matrix e starting at data + e * stride. Does not own the elements.
template <class T>
class stacked_view {
 public:
  using value_type = std::remove_const_t<T>;

  constexpr stacked_view() noexcept = default;

  /// [count, rows, cols], one after another.
  constexpr stacked_view(T* data, std::int64_t count, std::int64_t rows, std::int64_t cols) noexcept
      : stacked_view(data, count, rows, cols, cols, rows * cols) {}

  /// @param ld      Elements from one row to the next.
  /// @param stride  Elements from one matrix to the next.
  constexpr stacked_view(T* data, std::int64_t count, std::int64_t rows, std::int64_t cols,
                         std::int64_t ld, std::int64_t stride) noexcept
      : data_(data), count_(count), rows_(rows), cols_(cols), ld_(ld), stride_(stride) {}

  /// A matrix as a stack of one.
  explicit constexpr stacked_view(matrix_view<T> const& matrix) noexcept
      : stacked_view(matrix.data(), 1, matrix.rows(), matrix.cols(), matrix.ld(),
                     matrix.rows() * matrix.ld()) {}

  /// The first count * rows * cols elements of anything with `data()` and `size()`.
  /// @throws precondition_error if it is smaller than that.
  template <contiguous_storage<T> Storage>
  constexpr stacked_view(Storage&& storage, std::int64_t count, std::int64_t rows,
                         std::int64_t cols, call_site site = call_site::here())
      : stacked_view(storage.data(), count, rows, cols) {
    expects(count >= 0 && rows >= 0 && cols >= 0 &&
                count * rows * cols <= static_cast<std::int64_t>(storage.size()),
            "stacked_view: count * rows * cols <= size of the storage", site,
            {{"count", count}, {"rows", rows}, {"cols", cols}, {"size", storage.size()}});
  }

  /// A view of mutable elements is a view of constant ones.
  template <class U>
    requires std::is_same_v<U const, T> && (!std::is_const_v<U>)
  constexpr stacked_view(stacked_view<U> const& other) noexcept
      : stacked_view(other.data(), other.count(), other.rows(), other.cols(), other.ld(),
                     other.stride()) {}

  constexpr T* data() const noexcept { return data_; }
  constexpr std::int64_t count() const noexcept { return count_; }
  constexpr std::int64_t rows() const noexcept { return rows_; }
  constexpr std::int64_t cols() const noexcept { return cols_; }
  constexpr std::int64_t ld() const noexcept { return ld_; }
  constexpr std::int64_t stride() const noexcept { return stride_; }
  /// True for a default-constructed view: an optional argument that was not given.
  constexpr bool absent() const noexcept { return data_ == nullptr; }
  /// Whether nothing lies between the elements: [count * rows * cols] can be walked as a vector.
  constexpr bool contiguous() const noexcept { return ld_ == cols_ && stride_ == rows_ * cols_; }

  constexpr matrix_view<T> operator[](std::int64_t e) const noexcept {
    return {data_ + e * stride_, rows_, cols_, ld_};
  }

 private:
  T* data_ = nullptr;
  std::int64_t count_ = 0, rows_ = 0, cols_ = 0, ld_ = 0, stride_ = 0;
};

template <class T>
stacked_view(T*, std::int64_t, std::int64_t, std::int64_t) -> stacked_view<T>;

}  // namespace moe::inline MOE_ABI
