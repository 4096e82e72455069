// Tests of moe/comm/add_rows_kernel.hpp.
// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <vector>

#include <moe/comm/detail/row_format.hpp>
#include <moe/comm/device_exchange.cuh>
#include <moe/core/scalar.hpp>

#include "emulator/emulated_gpu.hpp"
#include "support/same_bits.hpp"

using moe_test::emulated_gpu;

namespace {

using moe_test::same_bits;

template <class T>
std::vector<T> numbers(std::int64_t n, int seed) {
  std::vector<T> all;
  for (int i = 0; i < n; ++i)
    all.push_back(static_cast<T>(static_cast<float>((i + seed) % 23) * 1.37f - 11.f));
  return all;
}

}  // namespace

TEST_CASE_TEMPLATE("comm/add_rows kernel: the sums of the host, and nothing else is touched", T,
                   float, double, moe::bf16, moe::half, int, short) {
  // Whole vectors and rests, more than all threads do in a turn, and starts that are not aligned.
  for (std::int64_t const n : {0, 1, 7, 8, 64, 1000, 9001, 40000})
    for (std::int64_t const first : {0, 1, 8}) {
      if ((n > 9001 || first == 1) && moe_test::has_thread_sanitizer && n > 1000) continue;
      auto const from = numbers<T>(n + 2 * first, 5);
      auto const before = numbers<T>(n + 2 * first, 0);
      auto expected = before;
      auto const row = moe::detail::format_of_rows<T>(n);
      if (n > 0)
        row.add(reinterpret_cast<std::byte*>(expected.data() + first),
                reinterpret_cast<std::byte const*>(from.data() + first), row.bytes);
      moe_test::on_emulator([&](emulated_gpu const& exec) {
        auto found = before;
        moe::detail::add_rows(exec, from.data() + first, n, found.data() + first, {});
        CHECK(same_bits(found, expected));
      });
    }
}

TEST_CASE("comm/add_rows kernel: counts agree, or there is none") {
  using moe::detail::row_count;
  std::vector<row_count> const from = {{3, 1}, {3, 1}, {4, 1}, {3, 2}, {-1, 1}};
  std::vector<row_count> const before(5, {3, 1});
  moe_test::on_emulator([&](emulated_gpu const& exec) {
    auto found = before;
    moe::detail::add_rows(exec, from.data(), 5, found.data(), {});
    std::vector<std::int64_t> rows;
    for (row_count const& c : found) rows.push_back(c.rows);
    CHECK(rows == std::vector<std::int64_t>{3, 3, -1, -1, -1});
  });
}
