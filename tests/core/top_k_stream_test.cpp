// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <numeric>
#include <random>
#include <support/random.hpp>
#include <vector>

#include <moe/core/score_row.hpp>
#include <moe/core/top_k_stream.hpp>

namespace {

constexpr float none = moe::no_score<float>;
using ids = std::vector<int>;

ids of(moe::top_k_stream<16> const& stream) {
  ids list;
  for (int j = 0; j < stream.k(); ++j) list.push_back(stream[j]);
  return list;
}

ids streamed(std::vector<float> const& row, int k) {
  moe::top_k_stream<16> stream(k);
  stream.add(row.data(), static_cast<int>(row.size()), 0);
  return of(stream);
}

/// The row policy: k searches.
ids searched(std::vector<float>& row, int k) {
  moe::array_row<float> keys(row.data(), static_cast<int>(row.size()));
  ids list;
  for (int j = 0; j < k; ++j) list.push_back(keys.pop_max(0, keys.size()).expert);
  return list;
}

/// By sorting, for rows without NaN.
ids sorted(std::vector<float> const& row, int k) {
  ids all(row.size());
  std::iota(all.begin(), all.end(), 0);
  auto const at = [&](int e) { return row[static_cast<std::size_t>(e)]; };
  std::stable_sort(all.begin(), all.end(), [&](int a, int b) { return at(a) > at(b); });
  ids list;
  for (int j = 0; j < k; ++j) {
    bool const left =
        j < static_cast<int>(all.size()) && at(all[static_cast<std::size_t>(j)]) > none;
    list.push_back(left ? all[static_cast<std::size_t>(j)] : -1);
  }
  return list;
}

/// Rows of all kinds: smooth, with many ties, with few candidates, rising, falling, of one value.
std::vector<float> row_of_kind(int kind, int E, unsigned seed) {
  auto row = moe_test::normals<float>(E, seed);
  for (std::size_t e = 0; e < row.size(); ++e) {
    auto const place = static_cast<float>(e);
    switch (kind) {
      case 1:
        row[e] = std::round(2 * row[e]) / 2 * (e % 2 == 0 ? 1.0f : -1.0f);  // -0 and 0, too
        break;
      case 2:
        if ((e * 2654435761u + seed) % 97 > 2) row[e] = none;
        break;
      case 3:
        row[e] = place;
        break;
      case 4:
        row[e] = -place;
        break;
      case 5:
        row[e] = seed % 2 == 0 ? 0.25f : none;
        break;
      case 6:
        row[e] = row[e] * 1e-42f;  // denormal
        break;
      default:
        break;
    }
  }
  return row;
}

}  // namespace

TEST_CASE("core/top_k_stream: by hand") {
  std::vector<float> const first{1, 3}, second{3, 2};
  moe::top_k_stream<2> stream(2);
  CHECK(stream[0] == -1);
  stream.add(first.data(), 2, 0);
  CHECK(stream[0] == 1);
  CHECK(stream[1] == 0);
  stream.add(second.data(), 2, 2);
  CHECK(stream[0] == 1);
  CHECK(stream[1] == 2);
  CHECK(streamed({none, 5, none}, 2) == ids{1, -1});
  CHECK(streamed({0.0f, -0.0f, 0.0f}, 2) == ids{0, 1});
  CHECK(streamed({}, 1) == ids{-1});
}

TEST_CASE("core/packed_key: orders by score, then by the lower index") {
  using moe::packed_key;
  CHECK(packed_key(1, 5) > packed_key(0.5f, 0));
  CHECK(packed_key(1, 5) > packed_key(1, 6));
  CHECK(packed_key(-2, 0) < packed_key(-1, 9));
  CHECK(packed_key(0.0f, 3) == packed_key(-0.0f, 3));
  CHECK(packed_key(none, 0) < packed_key(std::numeric_limits<float>::lowest(), 1000));
  CHECK(packed_key(std::numeric_limits<float>::quiet_NaN(), 0) < packed_key(none, 4095));
}

TEST_CASE("core/top_k_stream: equals the row policy and sorting, bit by bit") {
  int rows = 0;
  for (int const E : {1, 2, 31, 32, 33, 63, 64, 65, 100, 256, 1000, 1024, 4096})
    for (int const k : {1, 2, 3, 8, 16})
      for (int kind = 0; kind < 7; ++kind)
        for (unsigned seed = 0; seed < 3; ++seed) {
          CAPTURE(E);
          CAPTURE(k);
          CAPTURE(kind);
          auto row = row_of_kind(kind, E, seed);
          auto const expected = sorted(row, k);
          REQUIRE(streamed(row, k) == expected);

          auto popped = row;
          int expert[16];
          moe::array_row<float>(popped.data(), E).pop_best(k, expert);
          REQUIRE(ids(expert, expert + k) == expected);
          REQUIRE(searched(row, k) == expected);
          REQUIRE(popped == row);  // what was chosen is gone, the rest is as it was
          ++rows;
        }
  CHECK(rows == 13 * 5 * 7 * 3);
}

TEST_CASE("core/top_k_stream: tiles may come in any size and order, and streams be merged") {
  std::mt19937 bits(3);
  for (unsigned seed = 0; seed < 300; ++seed) {
    CAPTURE(seed);
    int const E = 1 + static_cast<int>(bits() % 700), k = 1 + static_cast<int>(bits() % 16);
    auto const row = row_of_kind(static_cast<int>(seed % 7), E, seed);
    std::vector<std::pair<int, int>> tiles;  // first, count
    for (int first = 0; first < E;) {
      int const count = std::min(E - first, static_cast<int>(bits() % 150));
      tiles.emplace_back(first, count);
      first += count;
    }
    std::shuffle(tiles.begin(), tiles.end(), bits);
    moe::top_k_stream<16> one(k), two(k);
    for (std::size_t i = 0; i < tiles.size(); ++i) {
      auto const [first, count] = tiles[i];
      (i % 3 == 0 ? one : two).add(row.data() + first, count, first);
    }
    auto merged = one;
    merged.add(two);
    REQUIRE(of(merged) == sorted(row, k));
    two.add(one);
    REQUIRE(of(two) == of(merged));
  }
}

TEST_CASE("core/top_k_stream: NaN is no candidate, as for the row policy") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  for (int const E : {5, 40, 600}) {
    auto row = moe_test::normals<float>(E, 9);
    for (std::size_t e = 0; e < row.size(); e += 3) row[e] = e % 2 == 0 ? nan : -nan;
    auto copy = row;
    CHECK(streamed(row, 3) == searched(copy, 3));
  }
  CHECK(streamed(std::vector<float>(100, nan), 2) == ids{-1, -1});
}

static_assert([] {
  float const row[] = {1, 4, 2, 4};
  moe::top_k_stream<3> stream(3);
  stream.add(row, 4, 0);
  return stream[0] == 1 && stream[1] == 3 && stream[2] == 2;
}());
