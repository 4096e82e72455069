#include <array>
#include <cstdint>
#include <doctest/doctest.h>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/view.hpp>

using moe::matrix_view;
using moe::vector_view;

namespace {

struct base {
  int a = 0;
};
struct derived : base {
  int b = 0;
};

double sum(vector_view<float const> v) {
  double total = 0;
  for (float const x : v) total += static_cast<double>(x);
  return total;
}

double corner(matrix_view<float const> m) {
  return static_cast<double>(m(m.rows() - 1, m.cols() - 1));
}

}  // namespace

TEST_CASE("core/view: a vector from containers, spans, pointers") {
  std::vector<float> values{1, 2, 3};
  std::array<float, 3> const fixed{1, 2, 3};
  CHECK(sum(values) == 6);
  CHECK(sum(fixed) == 6);
  CHECK(sum(std::span<float>(values)) == 6);
  CHECK(sum(std::span<float const>(values).first(2)) == 3);
  CHECK(sum({values.data(), 2}) == 3);
  CHECK(sum(std::vector<float>{4, 5}) == 9);
  CHECK(sum({}) == 0);

  vector_view const deduced(values);
  static_assert(std::is_same_v<decltype(deduced), vector_view<float> const>);
  static_assert(std::is_same_v<decltype(vector_view(fixed)), vector_view<float const>>);
  deduced[1] = 7;
  CHECK(values[1] == 7);
  CHECK(deduced.size() == 3);
  CHECK_FALSE(deduced.empty());
  CHECK(vector_view<float>().empty());
  CHECK(deduced.end() - deduced.begin() == 3);
}

TEST_CASE("core/view: mutable converts to constant, never back") {
  std::vector<float> values{1, 2, 3, 4};
  vector_view<float> v(values);
  vector_view<float> const cv(values);
  vector_view<float const> const a = v, b = cv, c = vector_view<float>(values);
  CHECK(a.data() == values.data());
  CHECK(b.size() == 4);
  CHECK(c.size() == 4);
  CHECK(sum(v) == 10);
  CHECK(sum(cv) == 10);
  matrix_view<float> m(values, 2, 2);
  CHECK(corner(m) == 4);
  CHECK(corner(matrix_view<float>(values, 1, 2)) == 2);

  static_assert(!std::is_convertible_v<vector_view<float const>, vector_view<float>>);
  static_assert(!std::is_convertible_v<matrix_view<float const>, matrix_view<float>>);
  static_assert(!std::is_constructible_v<vector_view<float>, std::vector<float> const&>);
  static_assert(!std::is_constructible_v<vector_view<float>, std::vector<double>&>);
  // A pointer to a derived class converts, but steps by another size.
  static_assert(!std::is_constructible_v<vector_view<base>, std::vector<derived>&>);
  static_assert(std::is_trivially_copyable_v<vector_view<float>>);
  static_assert(std::is_trivially_copyable_v<matrix_view<float>>);
}

TEST_CASE("core/view: a matrix is row-major with a leading dimension") {
  std::vector<int> values(14);
  for (int i = 0; i < 14; ++i) values[static_cast<std::size_t>(i)] = i;
  matrix_view const m(values.data(), 3, 4, 5);
  static_assert(std::is_same_v<decltype(m), matrix_view<int> const>);
  CHECK(m.rows() == 3);
  CHECK(m.cols() == 4);
  CHECK(m.ld() == 5);
  CHECK(m(0, 0) == 0);
  CHECK(m(1, 0) == 5);
  CHECK(m(2, 3) == 13);
  CHECK(m.row(2) == values.data() + 10);
  CHECK(m.span() == 14);
  CHECK_FALSE(m.absent());
  matrix_view<int const> const c = m;
  CHECK(c.ld() == 5);
  CHECK(matrix_view(values.data(), 2, 4).ld() == 4);
  CHECK(matrix_view<int>().absent());
  CHECK(matrix_view<int>().span() == 0);
  CHECK(matrix_view(values.data(), 0, 4).span() == 0);
  CHECK(matrix_view(values.data(), 3, 0, 5).span() == 0);
}

TEST_CASE("core/view: a leading dimension of 2^20 is addressed in 64 bits") {
  matrix_view<char> const m(nullptr, std::int64_t{1} << 20, 1, std::int64_t{1} << 20);
  CHECK(m.span() == ((std::int64_t{1} << 40) - (std::int64_t{1} << 20) + 1));
}

TEST_CASE("core/view: a container that is too small is refused with its numbers") {
  std::vector<float> values(11);
  auto const text_of = [&](std::int64_t rows, std::int64_t cols) -> std::string {
    try {
      (void)matrix_view<float>(values, rows, cols);
    } catch (moe::precondition_error const& e) {
      return e.what();
    }
    return "accepted";
  };
  std::string const text = text_of(3, 4);
  CHECK(text.find("matrix_view: rows >= 0, cols >= 0, rows * cols <= size of the storage; got "
                  "rows = 3, cols = 4, size = 11 (called at ") == 0);
  CHECK(text.find("view_test.cpp:") != std::string::npos);
  CHECK(text_of(-1, 4).find("rows = -1") != std::string::npos);
  CHECK(text_of(4, -1).find("cols = -1") != std::string::npos);
  CHECK(text_of(std::int64_t{1} << 62, 4).find("size = 11") != std::string::npos);  // no overflow
  CHECK(text_of(11, 1) == "accepted");
  CHECK(text_of(2, 5) == "accepted");
  CHECK(text_of(5, 0) == "accepted");
  CHECK(text_of(0, 5) == "accepted");
  static_assert(std::is_same_v<decltype(matrix_view(values, 1, 1)), matrix_view<float>>);
}

TEST_CASE("core/view: overlap counts bytes from the first to the last element") {
  std::vector<float> values(20);
  float* const p = values.data();
  matrix_view<float> const m(p, 2, 4, 5);  // bytes of elements [0, 9)
  CHECK(overlap(m, m));
  CHECK(overlap(m, matrix_view<float const>(p + 8, 1, 4)));
  CHECK_FALSE(overlap(m, matrix_view<float>(p + 9, 2, 4)));
  CHECK_FALSE(overlap(matrix_view<float>(p + 9, 2, 4), m));
  CHECK(overlap(m, matrix_view<float>(p + 4, 1, 1)));  // the gap between two rows counts
  CHECK(overlap(m, matrix_view<char>(reinterpret_cast<char*>(p) + 35, 1, 1)));
  CHECK_FALSE(overlap(m, matrix_view<char>(reinterpret_cast<char*>(p) + 36, 1, 1)));
  CHECK_FALSE(overlap(m, matrix_view<float>(p + 2, 0, 4)));
  CHECK_FALSE(overlap(m, matrix_view<float>(p + 2, 3, 0, 4)));
  CHECK_FALSE(overlap(matrix_view<float>(), m));
}

TEST_CASE("core/view: usable in constant expressions") {
  static_assert([] {
    int values[] = {1, 2, 3, 4, 5, 6};
    return matrix_view<int>(values, 2, 2, 3)(1, 1) + vector_view<int>(values, 6)[5];
  }() == 11);
}
