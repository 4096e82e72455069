// Rows that lie in two places: what an exchange takes and gives where tokens are.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Row r is row r of `first`, followed by row r of `second`, if there is one: tokens and the weights of
/// their choices, say, which travel as one row. A matrix_view is one of one part.
template <class T>
struct row_parts {
  matrix_view<T> first;
  matrix_view<T> second{};

  constexpr row_parts() noexcept = default;
  constexpr row_parts(matrix_view<T> const& only) noexcept : first(only) {}
  /// @pre  As many rows in both.
  constexpr row_parts(matrix_view<T> const& one, matrix_view<T> const& two) noexcept
      : first(one), second(two) {}
  template <class U>
    requires std::is_same_v<U const, T> && (!std::is_const_v<U>)
  constexpr row_parts(row_parts<U> const& other) noexcept
      : first(other.first), second(other.second) {}
  /// What a matrix_view can be made of.
  template <class... Args>
    requires std::is_constructible_v<matrix_view<T>, Args...>
  constexpr row_parts(Args&&... args) : first(static_cast<Args&&>(args)...) {}

  constexpr std::int64_t rows() const noexcept { return first.rows(); }
  constexpr std::int64_t cols() const noexcept { return first.cols() + second.cols(); }
  constexpr bool is_contiguous() const noexcept {
    return second.cols() == 0 && first.ld() == first.cols();
  }
};

template <class T, class U>
constexpr bool overlap(row_parts<T> const& a, row_parts<U> const& b) noexcept {
  return overlap(a.first, b.first) || overlap(a.first, b.second) || overlap(a.second, b.first) ||
         overlap(a.second, b.second);
}

}  // namespace moe::inline MOE_ABI
