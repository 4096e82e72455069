// Tests of moe/dispatch/dispatch.cuh and dispatch_kernel.hpp.
// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <vector>

#include <moe/routing/build_table.hpp>

#include "emulator/movement_cases.hpp"
#include "support/random.hpp"

using namespace moe_test;

namespace {

template <class S>
void check_dispatches(movement<S> const& m) {
  auto const expected = all_dispatches(cpu{}, m);
  on_emulator([&](emulated_gpu const& exec) { check_equal(all_dispatches(exec, m), expected); });
}

}  // namespace

TEST_CASE_TEMPLATE("dispatch/dispatch_kernel: bitwise as on the CPU where dot products are exact",
                   S, float, bf16, half) {
  for_emulated_cases([](table_case const& c, emulated_shape const& shape) {
    check_dispatches(movement<S>(c, shape.M, shape.at, numbers::exact));
  });
}

TEST_CASE_TEMPLATE("dispatch/dispatch_kernel: several slices of a row, several turns of a lane", S,
                   float, bf16) {
  // In vectors and element by element; so many tokens that slices are as long as they get.
  check_dispatches(movement<S>({.T = 3, .K = 2, .E = 3, .align = 16}, 1096, {}, numbers::exact));
  check_dispatches(movement<S>({.T = 2, .K = 3, .E = 3, .align = 2}, 395, {1, 3}, numbers::exact));
  if (has_thread_sanitizer || has_address_sanitizer) return;
  check_dispatches(movement<S>({.T = 70, .K = 2, .E = 3, .align = 8}, 600, {}, numbers::exact));
}

TEST_CASE("dispatch/dispatch_kernel: rows are summed in the order of the pairs, dots nearly so") {
  for (std::int64_t const M : {std::int64_t(41), std::int64_t(264)}) {
    movement<float> const m({.T = 5, .K = 12, .E = 13, .dropped = 0.2}, M, {});
    auto const expected = all_dispatches(cpu{}, m);
    on_emulator([&](emulated_gpu const& exec) {
      auto const found = all_dispatches(exec, m);
      check_equal<float>({found.matrices, {}}, {expected.matrices, {}});
      // M products of numbers below 1, rounded M times at most in either order.
      for (std::size_t v = 0; v < found.vectors.size(); ++v)
        for (std::size_t i = 0; i < m.weight.size(); ++i)
          CHECK(std::abs(found.vectors[v][i] - expected.vectors[v][i]) <
                2e-7f * static_cast<float>(M));
    });
  }
}

TEST_CASE("dispatch/dispatch_kernel: every layout that build_table makes") {
  std::int64_t const T = 7, M = 24;
  int const K = 2, E = 5;
  moe::routing_buffer routing(T, K, E);
  for (int i = 0; i < T * K; ++i) routing.expert[i] = i % 3 == 0 ? 1 : (i + 1) % E;
  matrix<bf16> tokens(T, M);
  tokens.fill(1);
  for (auto const rows : {moe::layout::packed, moe::layout::padded, moe::layout::aligned}) {
    moe::table_rules const rules{.rows = rows, .cap = moe::capacity::fixed(4), .align = 4};
    moe::table_shape shape{.T = T, .K = K, .E = E};
    shape.max_rows = moe::max_rows(rules, shape) + 2;
    moe::table_buffer table(shape);
    moe::buffer const scratch(moe::build_table_scratch(cpu{}, shape));
    moe::build_table(cpu{}, routing, rules, scratch, table);
    matrix<bf16> expected(shape.max_rows, M);
    moe::dispatch(cpu{}, tokens, table, expected.view());
    on_emulator([&](emulated_gpu const& exec) {
      matrix<bf16> found(shape.max_rows, M);
      moe::dispatch(exec, tokens, table, found.view());
      bool const same = found.same_bits(expected);
      CHECK(same);
    });
  }
}

TEST_CASE("dispatch/dispatch_kernel: no access out of bounds, whatever the arrays contain") {
  if (has_thread_sanitizer) return;  // tokens that share pairs do race
  std::int64_t const T = 6, M = 16;
  int const K = 3;
  constexpr auto most = std::numeric_limits<std::int32_t>::max();
  constexpr auto least = std::numeric_limits<std::int32_t>::min();
  for (std::vector<std::int32_t> const& begin :
       {std::vector<std::int32_t>{5, 1, 9, 2, most, least, 7},
        {0, 1, 2, 3, 4, 5, 6},
        {0, most, most, most, most, most, most},
        {-9, -8, -7, -6, -5, -4, -3},
        {18, 18, 18, 18, 18, 18, 18}}) {
    std::vector<std::int32_t> row_of{0,  1, 2,    5,     most, least, -1, -2, -3,
                                     -4, 4, most, least, 9,    3,     -7, 5,  100};
    std::vector<std::int32_t> pair_of{0, -1, 2, -1, -1};
    moe::table_counts counts{.rows = 1000, .kept = 3};
    moe::routing_table table{.T = T, .max_rows = 5, .K = K};
    table.row_of = row_of.data();
    table.token_begin = begin.data();
    table.pair_of = pair_of.data();
    table.counts = &counts;
    on_emulator([&](emulated_gpu const& exec) {
      for (std::size_t const pairs : {std::size_t(1), std::size_t(7), row_of.size()}) {
        matrix<float> tokens(T, M), rows(5, M);
        std::vector<float> const weight(pairs, 1.0f);
        std::vector<float> dweight(pairs);
        moe::dispatch(exec, tokens, table, rows.view());
        moe::dispatch(exec, tokens, table, weight, rows.view());
        moe::dispatch_backward(exec, rows, table, tokens.view());
        moe::dispatch_backward(exec, rows, matrix<float>(T, M), table, weight, tokens.view(),
                               dweight);
        moe::combine(exec, rows, table, weight, matrix<float>(T, M), tokens.view());
        moe::combine_backward(exec, matrix<float>(T, M), matrix<float>(5, M), table, weight,
                              rows.view(), dweight);
        CHECK(rows.gaps_untouched());
      }
    });
  }
}

TEST_CASE("dispatch/dispatch_kernel: offsets beyond 2^31 elements") {
  std::int64_t const ld = (std::int64_t(1) << 33) + 8;
  moe::matrix_view<float const> const rows(reinterpret_cast<float const*>(std::uintptr_t{4096}),
                                           100, 8, ld);
  std::int32_t const row_of[] = {99};
  moe::routing_table table{.T = 1, .max_rows = 100, .K = 1};
  table.row_of = const_cast<std::int32_t*>(row_of);
  moe::detail::lane_pair<float> const pair(0, moe::detail::token_pairs(table, 1), 0, nullptr);
  auto const address = reinterpret_cast<std::uintptr_t>(pair.addend(rows, {}, 0));
  CHECK(address == 4096 + 4 * 99 * static_cast<std::uintptr_t>(ld));

  // Pairs of the last of 2^27 tokens of 15 choices.
  table.T = std::int64_t(1) << 27;
  table.K = 15;
  auto const last = moe::detail::token_pairs(table, table.T * 15).of(table.T - 1);
  CHECK(last.first == (table.T - 1) * 15);
  CHECK(last.count == 15);

  // Units beyond 2^31.
  std::int64_t const M = 1 << 20;
  moe::detail::slices const cut{512, static_cast<std::int32_t>(M / 512)};
  auto const unit = cut.of(0xfffffffeu, M);
  CHECK(unit.row == 0xfffffffe / 2048);
  CHECK(unit.first == M - 1024);
  CHECK(unit.last == M - 512);
}

TEST_CASE("dispatch/dispatch_kernel: slices cover every column once") {
  for (std::int64_t const rows : {1, 3, 50, 1000})
    for (std::int64_t const M : {1, 31, 32, 33, 127, 128, 129, 700, 4097})
      for (int const step : {32, 128, 256}) {
        auto const cut = moe::detail::slice(rows, M, step, 64);
        std::vector<int> seen(static_cast<std::size_t>(M));
        for (int u = 0; u < cut.of_row; ++u) {
          auto const range = cut.of(static_cast<std::uint32_t>(cut.of_row * 2 + u), M);
          CHECK(range.row == 2);
          for (std::int64_t c = range.first; c < range.last; ++c)
            ++seen[static_cast<std::size_t>(c)];
        }
        bool const once = seen == std::vector<int>(seen.size(), 1);
        CHECK(once);
        bool const busy = cut.columns == step || rows * cut.of_row >= 64;
        CHECK(busy);
      }
}

TEST_CASE("dispatch/dispatch_kernel: bad input is refused with the rule and the values") {
  movement<float> m({.T = 4, .K = 2, .E = 3}, 6, {}, numbers::exact, 0);
  moe::routing_table table = m.s.table;
  emulated_gpu const exec;
  matrix<float> rows(8, 6), few(7, 6), tokens(4, 6), narrow(4, 5);
  std::vector<float> weight(8), dweight(8), short_weight(7), none;
  auto const check = [](std::string const& message, char const* rule) {
    says(message, rule);
    says(message, "dispatch_kernel_test.cpp");
  };
  check(refusal([&] { moe::dispatch(exec, tokens, table, few.view()); }),
        "dispatch: rows has table.max_rows rows or more of M columns, ld >= M; "
        "got rows = 7, cols = 6, ld = 6, table.max_rows = 8, M = 6");
  check(refusal([&] { moe::dispatch(exec, tokens, table, short_weight, rows.view()); }),
        "dispatch: weight has a value for each pair: T * K; got size = 7, T * K = 8");
  check(refusal([&] { moe::dispatch(exec, narrow, table, rows.view()); }),
        "dispatch: tokens is [T,M] with ld >= M; got rows = 4, cols = 5");
  check(refusal([&] { moe::dispatch(exec, matrix_view(&rows(4, 0), 4, 6), table, rows.view()); }),
        "dispatch: tokens and rows do not overlap");
  check(refusal([&] { moe::dispatch_backward(exec, few, table, tokens.view()); }),
        "dispatch_backward: drows has table.max_rows rows");
  check(refusal([&] {
          moe::dispatch_backward(exec, rows, tokens, table, weight, matrix<float>(4, 6).view(),
                                 short_weight);
        }),
        "dispatch_backward: dweight has a value for each pair");
  table.token_begin = m.s.token_begin.data();
  check(refusal([&] { moe::dispatch(exec, tokens, table, none, rows.view()); }),
        "dispatch: weight has a value for each pair, 1 to T * K of them; got size = 0");
  CHECK_NOTHROW(moe::dispatch(exec, tokens, table, weight, rows.view()));
  table.K = 17;
  check(refusal([&] { moe::dispatch(exec, tokens, table, rows.view()); }),
        "dispatch: 1 <= table.K <= 16, table.max_rows >= 0; got table.K = 17");
  table.K = 2;
  table.counts = nullptr;
  check(refusal([&] { moe::dispatch(exec, tokens, table, rows.view()); }),
        "dispatch: table was filled by build_table");
}
