// Tokens of bf16 and half through packed experts: the results of the same numbers in float, rounded once.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_ffn.hpp>

#include "case.hpp"
#include "owned_packed.hpp"
#include "sets.hpp"
#include "support/refusal.hpp"
#include "support/same_bits.hpp"

namespace {

using moe_test::same_bits;

using moe_test::owned_packed;
using moe_test::random_values;
using moe_test::rounded;

template <class S>
std::vector<float> widened(std::vector<S> const& values) {
  std::vector<float> to(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) to[i] = static_cast<float>(values[i]);
  return to;
}
/// Half a unit in the last place of y, and what sums in another order differ by.
template <class S>
double half_unit(double y) {
  constexpr int digits = std::is_same_v<S, moe::bf16> ? 8 : 11;
  if (y == 0) return 0;
  return std::ldexp(1.0, std::ilogb(y) - digits) + 4e-7 * std::fabs(y) + 1e-7;
}

/// Weights of some experts, packed.
template <class W>
struct packed_model {
  moe::ffn_shape shape{5, 90, 70};
  std::mt19937 random{4};
  moe_test::owned_weights<float> weights{shape, true, true, random, 0.4};
  owned_packed<W> packed{shape, true};

  packed_model() {
    moe::pack(moe::cpu{}, weights.view, moe::orientation::in_out, packed.view);
    packed.view.up_bias = weights.view.up_bias;
    packed.view.gate_bias = weights.view.gate_bias;
    packed.view.down_bias = weights.view.down_bias;
  }
};

moe::expert_kind const kinds[] = {moe::expert_kind::computed, moe::expert_kind::copy,
                                  moe::expert_kind::computed, moe::expert_kind::zero,
                                  moe::expert_kind::computed};

}  // namespace

TEST_CASE_TEMPLATE("expert/packed_tokens: rows of 16 bits are those of float, rounded once", W,
                   moe::bf16, moe::int8_blocks) {
  packed_model<W> model;
  std::int64_t const M = model.shape.M, rows = 60;
  std::int32_t const begin[] = {1, 3, 4, 30, 45}, used[] = {2, 0, 25, 7, 13};
  moe::row_segments const segments(5, begin, used);
  auto const check = [&]<class S>(S) {
    auto x = rounded<S>(random_values<float>(rows * M, model.random));
    std::vector<S> want(x.size(), static_cast<S>(9.0f));
    std::vector<bool> live(static_cast<std::size_t>(rows));
    for (int p = 0; p < 5; ++p)
      for (int r = begin[p]; r < begin[p] + used[p]; ++r) live[static_cast<std::size_t>(r)] = true;
    for (std::int64_t r = 0; r < rows; ++r)
      if (!live[static_cast<std::size_t>(r)])
        std::fill_n(x.begin() + r * M, M, static_cast<S>(std::numeric_limits<float>::quiet_NaN()));
    auto const x_float = widened(x);
    moe_test::for_each_set([&]<class Set>(Set) {
      CAPTURE(Set::name);
      moe::packed_ffn<moe::swiglu, W, Set> const experts{};
      auto const handle = experts.prepare(model.packed.view);
      auto const run = [&]<class V>(moe::cpu const& exec, std::vector<V> const& in,
                                    std::vector<V> out) {
        moe::buffer const scratch(
            experts.template forward_scratch_bytes<V>(exec, model.shape, rows));
        std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN
        bool const in_place = out.empty();
        if (in_place) out = in;
        experts.template forward_rows<V>(exec, handle, {in_place ? out : in, rows, M}, segments,
                                         {out, rows, M}, {}, scratch);
        return out;
      };
      auto const of_float =
          run(moe::cpu{}, x_float, std::vector<float>(x.size(), static_cast<float>(9)));
      auto const out = run(moe::cpu{}, x, want);
      CHECK(same_bits(out, rounded<S>(of_float)));
      moe::thread_team team(3);
      CHECK(same_bits(run(team, x, want), out));
      auto const in_place = run(moe::cpu{}, x, {});
      bool same = true;
      for (std::int64_t r = 0; r < rows; ++r) {
        auto const& expected = live[static_cast<std::size_t>(r)] ? out : x;
        same = same && std::memcmp(in_place.data() + r * M, expected.data() + r * M,
                                   static_cast<std::size_t>(M) * sizeof(S)) == 0;
      }
      CHECK(same);
    });
  };
  check(moe::bf16{});
  check(moe::half{});
}

TEST_CASE_TEMPLATE("expert/packed_tokens: tokens of 16 bits through tables, rounded once", W,
                   moe::bf16, moe::int8_blocks) {
  packed_model<W> model;
  std::int64_t const M = model.shape.M, T = 41, K = 2;
  moe::expert_map map;
  map.kind = kinds;
  int runs = 0, copies = 0;
  auto const check = [&]<class S>(S, moe::table_rules const& rules, bool before, bool kinds_too) {
    moe_test::table_of routed(T, static_cast<int>(K), 5, rules, model.random, false, 1,
                              kinds_too ? map : moe::expert_map{});
    moe::routing_table const& table = routed.table;
    for (std::int64_t i = 0; i < T * K; ++i)
      copies += table.row_of[i] == moe::no_row(moe::expert_kind::copy) ? 1 : 0;
    auto const x = rounded<S>(random_values<float>(T * M, model.random));
    auto const x_float = widened(x);
    moe::vector_view<float const> const weight(routed.routing.weight, T * K);
    moe_test::for_each_set([&]<class Set>(Set) {
      CAPTURE(Set::name);
      moe::packed_ffn<moe::swiglu, W, Set> const experts{.weights_before = before};
      auto const handle = experts.prepare(model.packed.view);
      auto const run = [&]<class V>(moe::cpu const& exec, std::vector<V> const& in) {
        moe::buffer const scratch(
            experts.template forward_scratch_bytes<V>(exec, model.shape, table.max_rows));
        std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN
        std::vector<V> out(in.size(), static_cast<V>(5.0f));
        experts.template forward<V>(exec, handle, {in, T, M}, table, weight, {out, T, M}, {},
                                    scratch);
        return out;
      };
      auto const want = run(moe::cpu{}, x_float);
      auto const out = run(moe::cpu{}, x);
      int wrong = 0, inexact = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        double const off = std::fabs(static_cast<float>(out[i]) - static_cast<double>(want[i]));
        wrong += off <= half_unit<S>(want[i]) ? 0 : 1;  // NaN counts
        inexact += off > 0 ? 1 : 0;
      }
      CHECK(wrong == 0);
      CHECK(inexact > T);
      moe::thread_team team(3);
      CHECK(same_bits(run(team, x), out));
      ++runs;
    });
  };
  for (auto const& rules : moe_test::all_layouts()) {
    check(moe::bf16{}, rules, false, false);
    check(moe::bf16{}, rules, true, false);
    check(moe::bf16{}, rules, false, true);
    check(moe::half{}, rules, false, true);
  }
  CHECK(runs >= 16);
  CHECK(copies > T);
}

TEST_CASE("expert/packed_tokens: bad input is refused with the values") {
  packed_model<moe::bf16> model;
  std::int64_t const M = model.shape.M, T = 4;
  moe::packed_ffn<moe::swiglu, moe::bf16> const experts{};
  auto const handle = experts.prepare(model.packed.view);
  moe_test::table_of routed(T, 2, 5, {}, model.random);
  moe::vector_view<float const> const weight(routed.routing.weight, T * 2);
  std::vector<moe::bf16> x(static_cast<std::size_t>(T * M)), out(x);
  moe::buffer const scratch(
      experts.forward_scratch_bytes<moe::bf16>(moe::cpu{}, model.shape, routed.table.max_rows));
  auto const run = [&](moe::matrix_view<moe::bf16> to, moe::memory room) {
    experts.forward<moe::bf16>(moe::cpu{}, handle, {x, T, M}, routed.table, weight, to, {}, room);
  };
  using moe_test::refuse;
  refuse([&] { run({out, T - 1, M}, scratch); },
         "packed_ffn: out is [T,M] with ld >= M; got rows = 3");
  refuse([&] { run({x, T, M}, scratch); }, "packed_ffn: tokens and out do not overlap");
  // A float's room is too little: rows are widened in it.
  std::size_t const less =
      experts.forward_scratch_bytes<float>(moe::cpu{}, model.shape, routed.table.max_rows);
  CHECK(less < scratch.size());
  refuse([&] { run({out, T, M}, {scratch.data(), less}); },
         "scratch >= forward_scratch_bytes; got bytes needed");
  CHECK_NOTHROW(run({out, T, M}, scratch));
}
