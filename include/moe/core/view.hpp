// Non-owning views: a pointer and extents, row-major with a leading dimension.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// Elements [size], contiguous. Does not own them.
template <class T>
class vector_view {
 public:
  using value_type = std::remove_const_t<T>;

  constexpr vector_view() noexcept = default;

  MOE_HOST_DEVICE constexpr vector_view(T* data, std::int64_t size) noexcept
      : data_(data), size_(size) {}

  /// All elements of anything with `data()` and `size()`; so a view of mutable elements is one of
  /// constant ones, too.
  MOE_NO_EXEC_CHECK
  template <contiguous_storage<T> Storage>
  MOE_HOST_DEVICE constexpr vector_view(Storage&& storage) noexcept
      : data_(storage.data()), size_(static_cast<std::int64_t>(storage.size())) {}

  MOE_HOST_DEVICE constexpr T* data() const noexcept { return data_; }
  MOE_HOST_DEVICE constexpr std::int64_t size() const noexcept { return size_; }
  MOE_HOST_DEVICE constexpr bool empty() const noexcept { return size_ == 0; }
  MOE_HOST_DEVICE constexpr T& operator[](std::int64_t i) const noexcept { return data_[i]; }
  MOE_HOST_DEVICE constexpr T* begin() const noexcept { return data_; }
  MOE_HOST_DEVICE constexpr T* end() const noexcept { return data_ + size_; }

 private:
  T* data_ = nullptr;
  std::int64_t size_ = 0;
};

/// Elements [rows, cols], row-major; row r starts at data + r * ld. Does not own them.
template <class T>
class matrix_view {
 public:
  using value_type = std::remove_const_t<T>;

  constexpr matrix_view() noexcept = default;

  MOE_HOST_DEVICE constexpr matrix_view(T* data, std::int64_t rows, std::int64_t cols) noexcept
      : data_(data), rows_(rows), cols_(cols), ld_(cols) {}

  /// @param ld  Elements from one row to the next; at least `cols`, which functions that take the
  ///            view check (rows that overlap are refused).
  MOE_HOST_DEVICE constexpr matrix_view(T* data, std::int64_t rows, std::int64_t cols,
                                        std::int64_t ld) noexcept
      : data_(data), rows_(rows), cols_(cols), ld_(ld) {}

  /// The first rows * cols elements of anything with `data()` and `size()`.
  /// @throws precondition_error if it is smaller than that.
  template <contiguous_storage<T> Storage>
  constexpr matrix_view(Storage&& storage, std::int64_t rows, std::int64_t cols,
                        call_site site = call_site::here())
      : data_(storage.data()), rows_(rows), cols_(cols), ld_(cols) {
    auto const size = static_cast<std::int64_t>(storage.size());
    expects(rows >= 0 && cols >= 0 && (cols == 0 || rows <= size / cols),
            "matrix_view: rows >= 0, cols >= 0, rows * cols <= size of the storage", site,
            {{"rows", rows}, {"cols", cols}, {"size", size}});
  }

  /// A view of mutable elements is a view of constant ones.
  template <std::same_as<value_type> U>
  MOE_HOST_DEVICE constexpr matrix_view(matrix_view<U> const& other) noexcept
      : data_(other.data()), rows_(other.rows()), cols_(other.cols()), ld_(other.ld()) {}

  MOE_HOST_DEVICE constexpr T* data() const noexcept { return data_; }
  MOE_HOST_DEVICE constexpr std::int64_t rows() const noexcept { return rows_; }
  MOE_HOST_DEVICE constexpr std::int64_t cols() const noexcept { return cols_; }
  MOE_HOST_DEVICE constexpr std::int64_t ld() const noexcept { return ld_; }
  MOE_HOST_DEVICE constexpr T* row(std::int64_t r) const noexcept { return data_ + r * ld_; }
  MOE_HOST_DEVICE constexpr T& operator()(std::int64_t r, std::int64_t c) const noexcept {
    return data_[r * ld_ + c];
  }
  /// True for a default-constructed view: an optional argument that was not given.
  MOE_HOST_DEVICE constexpr bool absent() const noexcept { return data_ == nullptr; }
  /// Elements from the first of row 0 to the last of the last row.
  MOE_HOST_DEVICE constexpr std::int64_t span() const noexcept {
    return rows_ == 0 || cols_ == 0 ? 0 : (rows_ - 1) * ld_ + cols_;
  }

 private:
  T* data_ = nullptr;
  std::int64_t rows_ = 0;
  std::int64_t cols_ = 0;
  std::int64_t ld_ = 0;
};

template <class T>
vector_view(T*, std::int64_t) -> vector_view<T>;
template <class Storage>
vector_view(Storage&&)
    -> vector_view<std::remove_pointer_t<decltype(std::declval<Storage&>().data())>>;
template <class T>
matrix_view(T*, std::int64_t, std::int64_t) -> matrix_view<T>;
template <class T>
matrix_view(T*, std::int64_t, std::int64_t, std::int64_t) -> matrix_view<T>;
template <class Storage>
matrix_view(Storage&&, std::int64_t, std::int64_t)
    -> matrix_view<std::remove_pointer_t<decltype(std::declval<Storage&>().data())>>;

/// Whether two views share a byte between their first and last elements, the gaps between the rows
/// of one (ld > cols) included. A view without elements overlaps nothing. O(1).
template <class A, class B>
bool overlap(matrix_view<A> a, matrix_view<B> b) noexcept {
  auto const a0 = reinterpret_cast<std::uintptr_t>(a.data());
  auto const b0 = reinterpret_cast<std::uintptr_t>(b.data());
  auto const a1 = a0 + static_cast<std::size_t>(a.span()) * sizeof(A);
  auto const b1 = b0 + static_cast<std::size_t>(b.span()) * sizeof(B);
  return a0 < a1 && b0 < b1 && a0 < b1 && b0 < a1;
}

}  // namespace moe::inline MOE_ABI
