// packed_weights and packed_ffn: round trips, every instruction set and type of weights against loops in
// double, edges, determinism, layers, bad input.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_ffn.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

#include "case.hpp"
#include "owned_packed.hpp"
#include "sets.hpp"
#include "support/refusal.hpp"
#include "support/same_bits.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::same_bits;

using moe::orientation;
using moe_test::owned_packed;
using moe_test::random_values;
using moe_test::rounded;
using moe_test::table_of;

/// Row-major weights of type S in either orientation; `as_float` are the values in [in, out].
template <class S>
struct source {
  std::vector<S> values;
  moe_test::owned_weights<float> as_float;
  moe::ffn_weights<S> view;

  source(moe::ffn_shape const& shape, bool gated, bool bias, orientation order,
         std::mt19937& random)
      : as_float(shape, gated, bias, random, 0.6) {
    std::int64_t const P = shape.P;
    for (float& v : as_float.values) v = static_cast<float>(static_cast<S>(v));
    values.resize(as_float.values.size());
    S* next = values.data();
    auto const part = [&](moe::stacked_view<float> const& m) {
      if (m.absent()) return moe::stacked_view<S>();
      bool const turned = order == orientation::out_in;
      moe::stacked_view<S> const to(next, P, turned ? m.cols() : m.rows(),
                                    turned ? m.rows() : m.cols());
      next += P * m.rows() * m.cols();
      for (std::int64_t p = 0; p < P; ++p)
        for (std::int64_t k = 0; k < m.rows(); ++k)
          for (std::int64_t j = 0; j < m.cols(); ++j)
            (turned ? to[p](j, k) : to[p](k, j)) = static_cast<S>(m[p](k, j));
      return to;
    };
    view.up = part(as_float.view.up);
    view.gate = part(as_float.view.gate);
    view.down = part(as_float.view.down);
  }
};

/// Makes of what is padded with zeros what would be seen in every result.
struct infinite_at_zero {
  static constexpr bool gated = false;
  template <std::floating_point V>
  V operator()(V x) const noexcept {
    return x == V(0) ? std::numeric_limits<V>::infinity() : x;
  }
  template <std::floating_point V>
  V derivative(V) const noexcept {
    return V(1);
  }
};

moe::ffn_shape const shapes[] = {{3, 5, 7}, {2, 64, 64}, {4, 70, 129}, {2, 200, 40}, {1, 1, 1}};

}  // namespace

TEST_CASE_TEMPLATE("expert/packed_ffn: packing and unpacking give the same bits", W, float,
                   moe::bf16, moe::half) {
  std::mt19937 random(1);
  moe::thread_team team(3);
  for (auto const& shape : shapes)
    for (bool gated : {false, true})
      for (auto order : {orientation::in_out, orientation::out_in}) {
        CAPTURE(shape.M);
        CAPTURE(gated);
        source<W> const from(shape, gated, false, order, random);
        owned_packed<W> packed(shape, gated);
        moe::pack(team, from.view, order, packed.view);
        std::vector<W> back(from.values.size(), W(3.0f));
        auto to = moe::carve_ffn(back.data(), shape, gated, false);
        if (order == orientation::out_in)
          to = {{to.up.data(), shape.P, shape.H, shape.M},
                gated ? moe::stacked_view<W>(to.gate.data(), shape.P, shape.H, shape.M)
                      : moe::stacked_view<W>(),
                {to.down.data(), shape.P, shape.M, shape.H},
                {},
                {},
                {}};
        moe::unpack(team, packed.view, order, to);
        CHECK(same_bits(back, from.values));
        // One expert after another is the same as all at once, and so is the other orientation.
        owned_packed<W> one_by_one(shape, gated);
        for (std::int64_t p = 0; p < shape.P; ++p)
          moe::pack(moe::cpu{}, from.view.expert(p), order, one_by_one.view, p);
        moe::vector_view<std::byte const> const a(packed.bytes.data(),
                                                  static_cast<std::int64_t>(packed.bytes.size()));
        CHECK(std::equal(a.begin(), a.end(), one_by_one.bytes.data()));
        // What is no weight is 0, which weights are not: as many elements are not 0 as there are weights.
        W const* const first = packed.view.expert(0);
        auto const elements = static_cast<std::int64_t>(packed.bytes.size() / sizeof(W));
        auto const set = std::count_if(first, first + elements,
                                       [](W w) { return !(static_cast<float>(w) == 0.0f); });
        auto const zero = std::count_if(from.values.begin(), from.values.end(),
                                        [](W w) { return static_cast<float>(w) == 0.0f; });
        CHECK(set == static_cast<std::int64_t>(from.values.size()) - zero);
      }
}

TEST_CASE("expert/packed_ffn: the documented layout") {
  moe::ffn_shape const shape{2, 70, 20};  // padded to 96 and 32
  moe_test::owned_weights<float> w(shape, true, false);
  for (std::size_t i = 0; i < w.values.size(); ++i) w.values[i] = static_cast<float>(i % 251 + 1);
  owned_packed<float> plain(shape, true);
  owned_packed<moe::bf16> narrow(shape, true);
  moe::pack(moe::cpu{}, w.view, orientation::in_out, plain.view);
  moe::pack(moe::cpu{}, w.view, orientation::in_out, narrow.view);
  float const* const f = plain.view.expert(1);
  moe::bf16 const* const b = narrow.view.expert(1);
  CHECK(f - plain.view.expert(0) == 96 * 32 * 3);
  auto const expect = [&](std::int64_t at, std::int64_t bf16_at, float want) {
    CHECK(f[at] == want);
    CHECK(static_cast<float>(b[bf16_at]) == want);
  };
  // Row 69 of panel 1: gate columns 16 to 31, up columns 16 to 31.
  std::int64_t const row = (96 + 69) * 32, two = (96 + 68) * 32;
  expect(row + 3, two + 3 * 2 + 1, w.view.gate[1](69, 19));
  expect(row + 16 + 3, two + 19 * 2 + 1, w.view.up[1](69, 19));
  expect(row + 4, two + 4 * 2 + 1, 0.0f);                      // column 20
  std::int64_t const down = 96 * 32 * 2 + (2 * 32 + 18) * 32;  // row 18 of panel 2
  expect(down + 5, down + 10, w.view.down[1](18, 69));
  expect(down + 6, down + 12, 0.0f);
}

TEST_CASE_TEMPLATE("expert/packed_ffn: equals loops in double on every instruction set", W, float,
                   moe::bf16, moe::half) {
  std::mt19937 random(2);
  auto const check = [&]<class Activation>(Activation const& act, moe::ffn_shape const& shape,
                                           std::vector<int> const& m, int sources, bool bias) {
    source<W> const from(shape, Activation::gated, bias, orientation::out_in, random);
    owned_packed<W> packed(shape, Activation::gated);
    moe::pack(moe::cpu{}, from.view, orientation::out_in, packed.view);
    auto views = packed.view;
    views.up_bias = from.as_float.view.up_bias;
    views.gate_bias = from.as_float.view.gate_bias;
    views.down_bias = from.as_float.view.down_bias;
    std::vector<std::int32_t> begin, used;
    std::int32_t rows = 1;
    for (int u : m) {
      begin.push_back(rows);
      used.push_back(u);
      rows += u + 2;  // gaps
    }
    moe::row_segments const segments(static_cast<int>(shape.P), begin.data(), used.data(), sources);
    auto x = random_values<float>(rows * shape.M, random);
    std::vector<int> expert(static_cast<std::size_t>(rows), -1);
    for (std::size_t q = 0; q < m.size(); ++q)
      std::fill_n(expert.begin() + begin[q], used[q], static_cast<int>(q) / sources);
    std::vector<double> want;
    for (std::int64_t r = 0; r < rows; ++r) {
      if (expert[static_cast<std::size_t>(r)] < 0) {
        std::fill_n(x.begin() + r * shape.M, shape.M, std::numeric_limits<float>::quiet_NaN());
        want.insert(want.end(), static_cast<std::size_t>(shape.M), 9.0);
        continue;
      }
      std::vector<double> const in(x.begin() + r * shape.M, x.begin() + (r + 1) * shape.M);
      auto const y =
          moe_test::apply_expert(act, from.as_float.view, expert[static_cast<std::size_t>(r)], in);
      want.insert(want.end(), y.begin(), y.end());
    }
    moe_test::for_each_set([&]<class Set>(Set) {
      CAPTURE(Set::name);
      CAPTURE(shape.M);
      CAPTURE(shape.H);
      moe::packed_ffn<Activation, W, Set> const experts{act};
      moe::buffer const scratch(
          experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, rows));
      std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN
      std::vector<float> out(x.size(), 9.0f);
      experts.forward_rows(moe::cpu{}, experts.prepare(views), {x, rows, shape.M}, segments,
                           {out, rows, shape.M}, {}, scratch);
      double worst = 0, size = 1;
      for (std::size_t i = 0; i < out.size(); ++i) {
        double const off = std::fabs(out[i] - want[i]);
        worst = moe_test::worse(worst, off);
        size = std::max(size, std::fabs(want[i]));
      }
      CHECK(worst < 2e-6 * size * std::sqrt(static_cast<double>(shape.M + shape.H)));
    });
  };
  check(moe::swiglu{}, {3, 5, 7}, {1, 0, 2}, 1, true);
  check(moe::swiglu{}, {2, 64, 64}, {7, 12}, 1, false);
  check(moe::swiglu{}, {2, 70, 129}, {13, 6, 0, 25}, 2, true);
  check(moe::relu{}, {2, 200, 40}, {3, 11}, 1, true);
  check(moe::relu{}, {1, 1, 1}, {5}, 1, true);
  check(moe::relu{}, {2, 33, 100}, {300, 1}, 1, false);
  if constexpr (std::same_as<W, float>) {  // the activation does not see the weights' type
    check(moe::clamped_swiglu{}, {1, 30, 70}, {5}, 1, true);
    check(infinite_at_zero{}, {2, 33, 100}, {3, 14}, 1, false);
  }
  check(moe::swiglu{}, {9, 40, 48}, {1, 2, 3, 4, 5, 6, 8, 9, 10}, 1, true);
  check(moe::swiglu{}, {2, 600, 20}, {14, 3}, 1, false);
}

TEST_CASE("expert/packed_ffn: subnormal halves are numbers on every instruction set") {
  std::mt19937 random(8);
  moe::ffn_shape const shape{1, 70, 40};
  moe_test::owned_weights<float> w(shape, false, false, random, 5e-5);
  for (float& v : w.values) v = static_cast<float>(moe::half(v));
  owned_packed<moe::half> packed(shape, false);
  moe::pack(moe::cpu{}, w.view, orientation::in_out, packed.view);
  auto const x = random_values<float>(3 * shape.M, random, 1e5);
  std::int32_t const begin = 0, used = 3;
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<moe::relu, moe::half, Set> const experts{};
    moe::buffer const scratch(experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, 3));
    std::vector<float> out(x.size());
    experts.forward_rows(moe::cpu{}, experts.prepare(packed.view), {x, 3, shape.M},
                         {1, &begin, &used}, {out, 3, shape.M}, {}, scratch);
    double worst = 0, size = 0;
    for (std::int64_t r = 0; r < 3; ++r) {
      std::vector<double> const in(x.begin() + r * shape.M, x.begin() + (r + 1) * shape.M);
      auto const want = moe_test::apply_expert(moe::relu{}, w.view, 0, in);
      for (std::int64_t j = 0; j < shape.M; ++j) {
        double const y = want[static_cast<std::size_t>(j)];
        worst =
            moe_test::worse(worst, std::fabs(out[static_cast<std::size_t>(r * shape.M + j)] - y));
        size = std::max(size, std::fabs(y));
      }
    }
    CHECK(size > 1e-4);
    CHECK(worst < 1e-5 * size);
  });
}

namespace {

/// Tokens through tables of E experts, beside ffn, and by teams beside one thread.
template <class W>
void check_tables(std::int64_t E) {
  std::mt19937 random(4);
  moe::ffn_shape const shape{E, 90, 70};
  source<W> const from(shape, true, true, orientation::in_out, random);
  owned_packed<W> packed(shape, true);
  moe::pack(moe::cpu{}, from.view, orientation::in_out, packed.view);
  auto views = packed.view;
  views.up_bias = from.as_float.view.up_bias;
  views.gate_bias = from.as_float.view.gate_bias;
  views.down_bias = from.as_float.view.down_bias;
  for (auto const& rules : moe_test::all_layouts())
    for (bool before : {false, true}) {
      std::int64_t const T = 41;
      table_of routed(T, 2, static_cast<int>(E), rules, random, true);
      moe::routing_table const& table = routed.table;
      auto const x = random_values<float>(T * shape.M, random);
      std::vector<float> const weight(routed.routing.weight, routed.routing.weight + T * 2);
      moe::ffn<moe::swiglu> const reference{.weights_before = before};
      std::vector<float> want(x.size());
      moe::buffer const saved(reference.saved_bytes<float>(shape, table.max_rows));
      moe::buffer const room(
          reference.forward_scratch_bytes<float>(moe::cpu{}, shape, table.max_rows));
      reference.forward(moe::cpu{}, reference.prepare(from.as_float.view),
                        moe::matrix_view<float const>(x, T, shape.M), table,
                        moe::vector_view<float const>(weight),
                        moe::matrix_view<float>(want, T, shape.M), saved, room);
      moe_test::for_each_set([&]<class Set>(Set) {
        CAPTURE(Set::name);
        moe::packed_ffn<moe::swiglu, W, Set> const experts{.weights_before = before};
        auto const run = [&](moe::cpu const& exec) {
          moe::buffer const scratch(
              experts.template forward_scratch_bytes<float>(exec, shape, table.max_rows));
          std::vector<float> out(x.size(), 5.0f);
          experts.forward(exec, experts.prepare(views), {x, T, shape.M}, table, weight,
                          {out, T, shape.M}, {}, scratch);
          return out;
        };
        auto const out = run(moe::cpu{});
        double worst = 0;
        for (std::size_t i = 0; i < out.size(); ++i)
          worst = moe_test::worse(worst, std::fabs(static_cast<double>(out[i]) - want[i]));
        CHECK(worst < 1e-4);
        for (int threads : {2, 7}) {
          moe::thread_team team(threads);
          CHECK(same_bits(run(team), out));
        }
      });
    }
}

}  // namespace

TEST_CASE_TEMPLATE("expert/packed_ffn: tokens through tables, the same bits for any team", W, float,
                   moe::bf16) {
  check_tables<W>(5);
  // So many that one thread and two take an expert at a time, and seven all of them in passes.
  check_tables<W>(40);
}

TEST_CASE("expert/packed_ffn: experts without hidden columns give their bias") {
  moe::ffn_shape const shape{2, 40, 0};
  owned_packed<float> const packed(shape, true);
  std::vector<float> const bias(80, 3.0f), x(5 * 40, 1.0f);
  auto views = packed.view;
  views.down_bias = {bias, 2, 40};
  std::int32_t const begin[] = {0, 2}, used[] = {2, 3};
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<moe::swiglu, float, Set> const experts{};
    moe::buffer const scratch(experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, 5));
    std::vector<float> out(x.size(), 9.0f);
    experts.forward_rows(moe::cpu{}, experts.prepare(views), {x, 5, 40}, {2, begin, used},
                         {out, 5, 40}, {}, scratch);
    CHECK(out == std::vector<float>(out.size(), 3.0f));
  });
}

TEST_CASE("expert/packed_ffn: a row's result does not depend on the other rows") {
  std::mt19937 random(5);
  moe::ffn_shape const shape{1, 130, 2100};  // depth beyond one pass
  source<float> const from(shape, true, false, orientation::in_out, random);
  owned_packed<float> packed(shape, true);
  moe::pack(moe::cpu{}, from.view, orientation::in_out, packed.view);
  auto const x = random_values<float>(300 * shape.M, random);
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<moe::swiglu, float, Set> const experts{};
    moe::buffer const scratch(
        experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, 300));
    auto const run = [&](std::int32_t begin, std::int32_t used) {
      std::vector<float> out(x.size(), 5.0f);
      experts.forward_rows(moe::cpu{}, experts.prepare(packed.view), {x, 300, shape.M},
                           {1, &begin, &used}, {out, 300, shape.M}, {}, scratch);
      return std::vector<float>(out.begin() + 17 * shape.M, out.begin() + 18 * shape.M);
    };
    auto const want = run(0, 300);
    for (std::int32_t used : {1, 2, 3, 4, 6, 7, 12, 13, 25}) CHECK(same_bits(run(17, used), want));
  });
}

TEST_CASE("expert/packed_ffn: in a layer, like ffn with the same weights") {
  std::mt19937 random(6);
  moe::layer_shape const shape{.T = 30, .M = 40, .H = 56, .E = 6, .bias = true};
  auto const preset = moe::tutel_topk({.k = 2});
  moe::moe_layer const layer(preset, moe::packed_ffn<moe::swiglu, moe::bf16>{}, shape);
  moe::moe_layer const reference(preset, moe::ffn<moe::swiglu>{}, shape);
  auto values = random_values<float>(reference.parameter_elements(), random, 0.5);
  for (float& v : values) v = static_cast<float>(moe::bf16(v));
  auto const from = reference.carve(values.data());
  std::vector<float> packed_values(static_cast<std::size_t>(layer.parameter_elements()), 0.0f);
  auto const to = layer.carve(packed_values.data());
  for (std::int64_t k = 0; k < shape.M; ++k)
    std::copy_n(from.router.row(k), shape.E, to.router.row(k));
  moe::pack(moe::cpu{}, from.experts, orientation::in_out, to.experts);
  auto const copy = [](moe::matrix_view<float> a, moe::matrix_view<float const> b) {
    REQUIRE(a.rows() == b.rows());
    for (std::int64_t p = 0; p < a.rows(); ++p)
      std::copy_n(a.row(p), a.cols(), const_cast<float*>(b.row(p)));
  };
  copy(from.experts.up_bias, to.experts.up_bias);
  copy(from.experts.gate_bias, to.experts.gate_bias);
  copy(from.experts.down_bias, to.experts.down_bias);
  auto const x = random_values<float>(shape.T * shape.M, random);
  auto const run = [&](auto const& any, auto const& parameters) {
    moe::buffer const saved_bytes(any.template saved_bytes<float>());
    moe::buffer const scratch(any.template scratch_bytes<float>(moe::cpu{}));
    auto saved = any.template carve_saved<float>(saved_bytes);
    std::vector<float> out(x.size());
    any.template forward<float>(moe::cpu{}, parameters, {x, shape.T, shape.M}, {},
                                {out, shape.T, shape.M}, saved, scratch);
    return out;
  };
  auto const out = run(layer, to), want = run(reference, from);
  for (std::size_t i = 0; i < out.size(); ++i)
    CHECK(out[i] == doctest::Approx(want[i]).epsilon(1e-4));
}

TEST_CASE("expert/packed_ffn: bad input is refused with the values") {
  std::mt19937 random(7);
  moe::ffn_shape const shape{2, 8, 16};
  source<float> const from(shape, true, false, orientation::in_out, random);
  owned_packed<float> packed(shape, true);
  using moe_test::refuse;
  moe::cpu const exec;
  using weights = moe::packed_weights<float>;
  refuse([&] { weights(packed.bytes.data(), packed.bytes.size() - 1, shape, true); },
         "bytes >= packed_bytes(shape, gated); got bytes = ");
  refuse([&] { weights(packed.bytes.data() + 4, packed.bytes.size(), shape, true); },
         "aligned to 64 bytes; got modulo = 4");
  refuse([&] { weights(packed.bytes.data(), 0, {-1, 8, 16}, true); }, "P, M, H >= 0; got P = -1");
  refuse([&] { moe::pack(exec, from.view, orientation::out_in, packed.view); },
         "have the shapes of the packed weights in this orientation; got up.rows = 8");
  refuse([&] { moe::pack(exec, from.view, orientation::in_out, packed.view, 1); },
         "among P; got first = 1, experts = 2, P = 2");
  auto no_gate = from.view;
  no_gate.gate = {};
  refuse([&] { moe::pack(exec, no_gate, orientation::in_out, packed.view); }, "pack: up, gate");
  moe::packed_ffn<moe::swiglu> const experts{};
  moe::packed_ffn<moe::relu> const ungated{};
  refuse([&] { (void)ungated.prepare(packed.view); }, "got weights.gated = 1, gated = 0");
  auto biased = packed.view;
  std::vector<float> const bias(16);
  biased.up_bias = {bias, 2, 8};
  refuse([&] { (void)experts.prepare(biased); }, "up_bias is [P,H] or absent; got rows = 2");

  moe::pack(exec, from.view, orientation::in_out, packed.view);
  auto const handle = experts.prepare(packed.view);
  moe::buffer const scratch(experts.forward_scratch_bytes<float>(exec, shape, 4));
  std::vector<float> x(4 * 8), out(4 * 8);
  std::int32_t const begin[] = {0, 2}, used[] = {2, 2}, many[] = {4, 4};
  auto const run = [&](moe::matrix_view<float const> in, moe::row_segments const& segments,
                       moe::memory room) {
    experts.forward_rows(exec, handle, in, segments, {out, 4, 8}, {}, room);
  };
  refuse([&] { run({x, 4, 7}, {2, begin, used}, scratch); }, "rows and out are [N,M]");
  refuse([&] { run({x, 4, 8}, {1, begin, used}, scratch); }, "got rows.cols = 8, out.cols = 8");
  refuse([&] { run({x, 4, 8}, {2, begin, many}, scratch); }, "at most N rows; got rows = 8, N = 4");
  refuse([&] { run({x, 4, 8}, {2, begin, used}, {scratch.data(), scratch.size() / 2}); },
         "scratch >= forward_scratch_bytes; got bytes needed");
  CHECK_NOTHROW(run({x, 4, 8}, {2, begin, used}, scratch));
}
