// Fuzzing build_table: any routing, rules, map and sources; the laws and the slow reference hold.
// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <support/reference_table.hpp>
#include <support/table_case.hpp>

namespace {

/// Numbers from bytes; zeros when they are used up.
struct byte_draw {
  std::uint8_t const* next;
  std::uint8_t const* end;

  std::uint32_t operator()(std::size_t n) {
    std::uint32_t value = 0;
    for (int i = 0; i < (n > 256 ? 4 : 1) && next < end; ++i) value = value << 8 | *next++;
    return value % static_cast<std::uint32_t>(n);
  }
};

void fail(std::string const& what) {
  std::fprintf(stderr, "build_table_fuzz: %s\n", what.c_str());
  std::abort();
}

template <class A>
void expect_equal(A const& want, std::int32_t const* got, char const* what) {
  if (!std::equal(want.begin(), want.end(), got)) fail(what);
}

/// In three passes: as the rules say, over a table of arbitrary leftovers, and in many chunks.
template <class V>
void try_one(byte_draw draw) {
  static moe::thread_team team(3);
  moe_test::table_case<V> c;
  // Every so often enough tokens for several chunks.
  bool const large = draw(16) == 0;
  fill(c, draw, {.T = large ? 4000u : 40u});
  moe::cpu const exec = large ? moe::cpu(team) : moe::cpu{};
  moe::table_buffer table(c.shape);
  std::fill_n(table.pair_of, c.shape.max_rows, 12345);
  std::fill_n(table.row_of, c.shape.T * c.shape.K, 12345);
  moe::buffer scratch(build_table_scratch(exec, c.shape));
  build_table(exec, c.routing, c.rules, c.map, scratch, table);
  std::string const broken = moe_test::broken_law(c.routing, c.rules, c.map, table);
  if (!broken.empty()) fail(broken);
  auto const want =
      moe_test::make_reference_table(c.routing, c.rules, c.map, table.sources, table.max_rows);
  expect_equal(want.row_of, table.row_of, "row_of");
  expect_equal(want.pair_of, table.pair_of, "pair_of");
  expect_equal(want.begin, table.begin, "begin");
  expect_equal(want.used, table.used, "used");
  expect_equal(want.wanted, table.wanted, "wanted");
  if (!(want.counts == *table.counts)) fail("counts");
}

/// Arrays of a routing and a map that may be nonsense: a result whose laws hold, or an exception.
void try_nonsense(byte_draw draw) {
  moe_test::table_case<float> c;
  fill(c, draw);
  auto const damage = [&](std::vector<std::int32_t>& values) {
    if (values.empty()) return;
    for (std::uint32_t n = draw(4); n > 0; --n)
      values[draw(values.size())] =
          static_cast<std::int32_t>(draw(std::size_t{1} << 31)) - (1 << 30);
    for (std::uint32_t n = draw(4); n > 0; --n)
      values[draw(values.size())] = static_cast<std::int32_t>(draw(16)) - 2;
  };
  damage(c.token_begin);
  damage(c.physical_begin);
  damage(c.physical);
  damage(c.expert);
  damage(c.source);
  if (draw(3) == 0) c.rules.align = static_cast<int>(draw(1 << 20)) - 1;
  if (draw(3) == 0) c.rules.cap.rows = static_cast<std::int64_t>(draw(std::size_t{1} << 31)) << 20;
  if (draw(3) == 0) c.rules.cap.multiple = static_cast<int>(draw(std::size_t{1} << 31)) - 1;
  if (draw(3) == 0) c.rules.cap.factor = static_cast<double>(draw(std::size_t{1} << 31)) - 1e9;
  moe::table_buffer table(c.shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, c.shape));
  try {
    build_table(moe::cpu{}, c.routing, c.rules, c.map, scratch, table);
  } catch (moe::precondition_error const&) {
    return;
  }
  std::string const broken = moe_test::broken_law(c.routing, c.rules, c.map, table);
  if (!broken.empty()) fail(broken);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  byte_draw draw{data, data + size};
  switch (draw(3)) {
    case 0:
      try_one<float>(draw);
      break;
    case 1:
      try_one<double>(draw);
      break;
    default:
      try_nonsense(draw);
  }
  return 0;
}
