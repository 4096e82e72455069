// ffn: forward and backward against loops in double, gradients by differences, edges, bad input.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <string>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/slice.hpp>

#include "case.hpp"

namespace {

using moe::update;
using moe_test::owned_weights;
using moe_test::random_values;
using moe_test::table_of;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

/// A layer with everything that forward and backward read and write.
template <class V, class Activation>
struct layer {
  moe::ffn<Activation> experts;
  table_of routed;
  std::int64_t T, M;
  owned_weights<V> w, dw;
  std::vector<V> x, weight, dout, out, dx, dweight;
  moe::buffer saved, forward_scratch, backward_scratch;

  moe::routing_table const& table() const { return routed.table; }
  moe::matrix_view<V const> tokens() const { return {x.data(), T, M}; }

  layer(moe::ffn<Activation> const& e, std::int64_t tokens, int K, moe::ffn_shape const& shape,
        bool bias, moe::table_rules const& rules, std::mt19937& random, bool idle = false,
        int sources = 1, moe::expert_map const& map = {})
      : experts(e),
        routed(tokens, K, static_cast<int>(shape.P), rules, random, idle, sources, map),
        T(tokens),
        M(shape.M),
        w(shape, Activation::gated, bias, random, 0.6),
        dw(shape, Activation::gated, bias, V(7)),
        x(random_values<V>(T * M, random)),
        weight(routed.routing.weight, routed.routing.weight + T * K),
        dout(random_values<V>(T * M, random)),
        out(x.size(), V(7)),
        dx(x.size(), V(7)),
        dweight(weight.size(), V(7)) {}

  void run(moe::cpu const& exec, update how = update::assign, bool backward = true) {
    auto const shape = w.view.shape();
    auto const rows = table().max_rows;
    saved = moe::buffer(experts.template saved_bytes<V>(shape, rows));
    forward_scratch = moe::buffer(experts.template forward_scratch_bytes<V>(exec, shape, rows));
    backward_scratch = moe::buffer(experts.template backward_scratch_bytes<V>(exec, shape, rows));
    auto const handle = experts.prepare(w.view);
    experts.forward(exec, handle, tokens(), table(), weight, moe::matrix_view<V>(out, T, M), saved,
                    forward_scratch);
    if (backward)
      experts.backward(exec, handle, moe::matrix_view<V const>(dout, T, M), tokens(), table(),
                       weight, saved, moe::matrix_view<V>(dx, T, M), moe::vector_view<V>(dweight),
                       dw.view, how, backward_scratch);
  }

  /// The output by the definition, in double.
  std::vector<double> expected() const {
    std::vector<double> y(at(T * M));
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t i = table().first_pair(t); i < table().first_pair(t + 1); ++i) {
        std::int32_t const r = table().row_of[i];
        std::vector<double> in(at(M)), one;
        double const wt = weight[at(i)];
        for (std::int64_t j = 0; j < M; ++j)
          in[at(j)] = x[at(t * M + j)] * (experts.weights_before ? wt : 1.0);
        if (r >= 0) {
          int q = 0;
          while (r < table().begin[q] || r >= table().begin[q] + table().used[q]) ++q;
          one = moe_test::apply_expert(experts.act, w.view, q / table().sources, in);
        } else if (r == moe::no_row(moe::expert_kind::copy)) {
          one = in;
        } else {
          continue;
        }
        for (std::int64_t j = 0; j < M; ++j)
          y[at(t * M + j)] += one[at(j)] * (experts.weights_before ? 1.0 : wt);
      }
    return y;
  }

  double loss() {
    run(moe::cpu{}, update::assign, false);
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += double(out[i]) * dout[i];
    return sum;
  }

  /// Compares some elements of a gradient with central differences.
  void check_gradient(std::vector<V>& values, std::vector<V> const& gradient, char const* name,
                      std::mt19937& random) {
    CAPTURE(name);
    double const step = 1e-5;
    for (std::size_t n = 0; n < std::min<std::size_t>(values.size(), 60); ++n) {
      std::size_t const i = values.size() <= 60 ? n : random() % values.size();
      V const old = values[i];
      values[i] = old + step;
      double const above = loss();
      values[i] = old - step;
      double const below = loss();
      values[i] = old;
      double const want = (above - below) / (2 * step);
      CHECK(std::fabs(gradient[i] - want) < 1e-7 * (1 + std::fabs(want)));
    }
  }
};

template <class Activation>
void check_activation(Activation const& act) {
  std::mt19937 random(11);
  moe::cpu const exec;
  int number = 0;
  for (auto const& rules : moe_test::all_layouts())
    for (bool bias : {false, true})
      for (bool before : {false, true})
        for (bool recompute : {false, true}) {
          CAPTURE(number++);
          CAPTURE(bias);
          CAPTURE(before);
          moe::ffn<Activation> const experts{
              .act = act, .weights_before = before, .recompute = recompute};
          layer<double, Activation> exact(experts, 17, 2, {4, 6, 10}, bias, rules, random, true,
                                          1 + number % 3);
          exact.run(exec);
          auto const want = exact.expected();
          for (std::size_t i = 0; i < want.size(); ++i)
            CHECK(std::fabs(exact.out[i] - want[i]) < 1e-13);
          auto const dx = exact.dx, dweight = exact.dweight;
          auto const dw = exact.dw.values;
          exact.check_gradient(exact.x, dx, "tokens", random);
          exact.check_gradient(exact.weight, dweight, "router weights", random);
          exact.check_gradient(exact.w.values, dw, "parameters", random);
          // Nobody chose the last expert: its gradient is zero, not what was there.
          auto const last = exact.dw.view.expert(3);
          for (std::int64_t i = 0; i < 6; ++i)
            for (std::int64_t j = 0; j < 10; ++j) {
              CHECK(last.up[0](i, j) == 0.0);
              CHECK(last.down[0](j, i) == 0.0);
            }
          if (bias) CHECK(last.down_bias(0, 5) == 0.0);

          layer<float, Activation> single(experts, 60, 2, {3, 40, 50}, bias, rules, random, false,
                                          2);
          single.run(exec);
          auto const close = single.expected();
          for (std::size_t i = 0; i < close.size(); ++i)
            CHECK(std::fabs(single.out[i] - close[i]) < 4e-5);
        }
}

void refuse(auto&& f, char const* text) {
  try {
    f();
    FAIL("not refused: " << text);
  } catch (moe::precondition_error const& e) {
    INFO(e.what());
    CHECK(std::string(e.what()).find(text) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("expert/ffn: relu, every layout, forward and gradients") {
  check_activation(moe::relu{});
}
TEST_CASE("expert/ffn: clamped_swiglu, every layout, forward and gradients") {
  check_activation(moe::clamped_swiglu{.limit = 0.5f});
}
#if !defined(MOE_TEST_INSTRUMENTED)  // the same code but for the function, and slow to compile
TEST_CASE("expert/ffn: silu, every layout, forward and gradients") {
  check_activation(moe::silu{});
}
TEST_CASE("expert/ffn: gelu, every layout, forward and gradients") {
  check_activation(moe::gelu{});
}
TEST_CASE("expert/ffn: gelu_tanh, every layout, forward and gradients") {
  check_activation(moe::gelu_tanh{});
}
TEST_CASE("expert/ffn: swiglu, every layout, forward and gradients") {
  check_activation(moe::swiglu{});
}
TEST_CASE("expert/ffn: geglu, every layout, forward and gradients") {
  check_activation(moe::geglu{});
}
#endif

TEST_CASE("expert/ffn: equal experts with weights that sum to one are one dense network") {
  std::mt19937 random(12);
  moe::ffn_shape const shape{5, 8, 12};
  layer<double, moe::swiglu> l({}, 30, 3, shape, true, {}, random);
  auto const first = l.w.view.expert(0);
  for (std::int64_t p = 1; p < 5; ++p) {
    auto const other = l.w.view.expert(p);
    moe::for_each_parameter(first, other, [](char const*, auto from, auto to) {
      std::copy_n(from.data(), from.size(), to.data());
    });
  }
  for (std::int64_t t = 0; t < 30; ++t) {
    l.weight[at(t * 3)] = 0.5;
    l.weight[at(t * 3 + 1)] = 0.25;
    l.weight[at(t * 3 + 2)] = 0.25;
  }
  l.run(moe::cpu{});
  for (std::int64_t t = 0; t < 30; ++t) {
    std::vector<double> const x(l.x.begin() + t * 8, l.x.begin() + (t + 1) * 8);
    auto const want = moe_test::apply_expert(moe::swiglu{}, l.w.view, 0, x);
    for (std::int64_t j = 0; j < 8; ++j)
      CHECK(l.out[at(t * 8 + j)] == doctest::Approx(want[at(j)]).epsilon(1e-12));
  }
}

TEST_CASE("expert/ffn: bitwise equal for any number of threads; recomputing changes nothing") {
  std::mt19937 random(13);
  layer<float, moe::swiglu> l({}, 150, 2, {5, 70, 90}, true, {}, random);
  l.run(moe::cpu{});
  auto const out = l.out, dx = l.dx, dweight = l.dweight, dw = l.dw.values;
  auto const same = [&] {
    CHECK(l.out == out);
    CHECK(l.dx == dx);
    CHECK(l.dweight == dweight);
    CHECK(l.dw.values == dw);
  };
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    l.run(team);
    same();
  }
  l.experts.recompute = true;
  CHECK(l.experts.saved_bytes<float>({5, 70, 90}, 300) == 0);
  l.run(moe::cpu{});
  same();
}

TEST_CASE(
    "expert/ffn: gradients accumulate, and an optimiser step is seen without preparing again") {
  std::mt19937 random(14);
  layer<double, moe::geglu> l({}, 20, 2, {3, 6, 7}, true, {}, random, true);
  l.run(moe::cpu{});
  auto const once = l.dw.values;
  l.run(moe::cpu{}, update::add);
  for (std::size_t i = 0; i < once.size(); ++i)
    CHECK(l.dw.values[i] == doctest::Approx(2 * once[i]).epsilon(1e-13));

  auto const handle = l.experts.prepare(l.w.view);
  std::int64_t seen = 0;
  moe::for_each_parameter(l.w.view, l.dw.view, [&](char const*, auto value, auto gradient) {
    seen += value.size();
    for (std::int64_t i = 0; i < value.size(); ++i) value[i] -= 0.01 * gradient[i];
  });
  CHECK(seen == moe::ffn_elements({3, 6, 7}, true, true));
  l.experts.forward(moe::cpu{}, handle, l.tokens(), l.table(), l.weight,
                    moe::matrix_view<double>(l.out, 20, 6), l.saved, l.forward_scratch);
  auto const want = l.expected();
  for (std::size_t i = 0; i < want.size(); ++i)
    CHECK(l.out[i] == doctest::Approx(want[i]).epsilon(1e-12));
}

TEST_CASE("expert/ffn: copy experts pass through, forward and backward") {
  std::mt19937 random(15);
  moe::expert_kind const kinds[] = {moe::expert_kind::computed, moe::expert_kind::copy,
                                    moe::expert_kind::zero, moe::expert_kind::computed};
  moe::expert_map map;
  map.kind = kinds;
  layer<double, moe::silu> l({}, 16, 3, {4, 5, 6}, true, {}, random, false, 1, map);
  REQUIRE(l.table().counts->uncomputed > 0);
  l.run(moe::cpu{});
  auto const want = l.expected();
  for (std::size_t i = 0; i < want.size(); ++i) CHECK(std::fabs(l.out[i] - want[i]) < 1e-13);
  auto const dx = l.dx, dweight = l.dweight, dw = l.dw.values;
  l.check_gradient(l.x, dx, "tokens", random);
  l.check_gradient(l.weight, dweight, "router weights", random);
  l.check_gradient(l.w.values, dw, "parameters", random);
}

TEST_CASE("expert/ffn: no tokens") {
  std::mt19937 random(16);
  layer<float, moe::swiglu> l({}, 0, 2, {3, 4, 5}, true, {}, random);
  l.run(moe::cpu{});
  CHECK(std::count(l.dw.values.begin(), l.dw.values.end(), 0.0f) ==
        static_cast<std::ptrdiff_t>(l.dw.values.size()));
}

TEST_CASE("expert/ffn: slices add up to the whole") {
  std::mt19937 random(17);
  layer<double, moe::swiglu> whole({}, 25, 2, {3, 6, 11}, true, {}, random);
  whole.run(moe::cpu{});
  for (std::int64_t slices : {1, 3, 11}) {
    CAPTURE(slices);
    std::vector<double> out(whole.out.size()), dx(out.size()), dweight(whole.dweight.size());
    owned_weights<double> dw({3, 6, 11}, true, true, 7.0);
    for (std::int64_t s = 0; s < slices; ++s) {
      auto const part = moe::slice(whole.w.view, s, slices, moe::slice_width::uneven);
      auto const dpart = moe::slice(dw.view, s, slices, moe::slice_width::uneven);
      auto const handle = whole.experts.prepare(part);
      std::vector<double> o(out.size()), d(out.size()), dwt(dweight.size());
      moe::matrix_view<double> const o_view(o, 25, 6), d_view(d, 25, 6);
      whole.experts.forward(moe::cpu{}, handle, whole.tokens(), whole.table(), whole.weight, o_view,
                            whole.saved, whole.forward_scratch);
      whole.experts.backward(moe::cpu{}, handle, moe::matrix_view<double const>(whole.dout, 25, 6),
                             whole.tokens(), whole.table(), whole.weight, whole.saved, d_view,
                             moe::vector_view<double>(dwt), dpart, update::assign,
                             whole.backward_scratch);
      for (std::size_t i = 0; i < o.size(); ++i) out[i] += o[i];
      for (std::size_t i = 0; i < o.size(); ++i) dx[i] += d[i];
      for (std::size_t i = 0; i < dwt.size(); ++i) dweight[i] += dwt[i];
    }
    for (std::size_t i = 0; i < out.size(); ++i) {
      CHECK(std::fabs(out[i] - whole.out[i]) < 1e-13);
      CHECK(std::fabs(dx[i] - whole.dx[i]) < 1e-13);
    }
    for (std::size_t i = 0; i < dweight.size(); ++i)
      CHECK(std::fabs(dweight[i] - whole.dweight[i]) < 1e-13);
    for (std::size_t i = 0; i < dw.values.size(); ++i)
      CHECK(std::fabs(dw.values[i] - whole.dw.values[i]) < 1e-13);
  }
  refuse([&] { moe::slice(whole.w.view, 0, 2); }, "slice: slices divide H; got H = 11, slices = 2");
  refuse([&] { moe::slice(whole.w.view, 2, 2, moe::slice_width::uneven); },
         "slice: 0 <= index < slices; got index = 2, slices = 2");
}

TEST_CASE("expert/ffn: bad input is refused with the values") {
  std::mt19937 random(18);
  layer<float, moe::swiglu> l({}, 8, 2, {3, 4, 5}, true, {}, random);
  l.run(moe::cpu{});
  moe::cpu const exec;
  auto const handle = l.experts.prepare(l.w.view);
  moe::matrix_view<float> const out(l.out, 8, 4);
  moe::vector_view<float const> const weight(l.weight);

  auto no_gate = l.w.view;
  no_gate.gate = {};
  refuse([&] { l.experts.prepare(no_gate); }, "ffn: gate is [P,M,H] for a gated activation");
  refuse([&] { moe::ffn<moe::relu>{}.prepare(l.w.view); }, "ffn: no gate unless");
  auto wrong = l.w.view;
  wrong.down = wrong.up;
  refuse([&] { l.experts.prepare(wrong); },
         "ffn: down is [P,H,M]; got count = 3, rows = 4, cols = 5");
  wrong = l.w.view;
  wrong.down_bias = wrong.up_bias;
  refuse([&] { l.experts.prepare(wrong); }, "ffn: down_bias is [P,M] or absent");

  auto const small = [](moe::buffer const& b) { return moe::memory(b.data(), b.size() / 2); };
  refuse(
      [&] {
        l.experts.forward(exec, handle, l.tokens(), l.table(), weight, out, small(l.saved),
                          l.forward_scratch);
      },
      "ffn: saved >= saved_bytes");
  refuse(
      [&] {
        l.experts.forward(exec, handle, l.tokens(), l.table(), weight, out, l.saved,
                          moe::memory(l.forward_scratch.data(), 700));
      },
      "ffn: scratch >= forward/backward_scratch_bytes");
  refuse(
      [&] {
        l.experts.forward(exec, handle, l.tokens(), l.table(), {weight.data(), 3}, out, l.saved,
                          l.forward_scratch);
      },
      "ffn: weight has a value for each pair; got weight = 3, pairs = 16");
  auto one = l.w.view.expert(0);
  refuse(
      [&] {
        l.experts.forward(exec, l.experts.prepare(one), l.tokens(), l.table(), weight, out, l.saved,
                          l.forward_scratch);
      },
      "ffn: the table has P experts, tokens are [T,M]; got table.P = 3, P = 1");
  auto no_bias = l.dw.view;
  no_bias.up_bias = {};
  refuse(
      [&] {
        l.experts.backward(exec, handle, out, l.tokens(), l.table(), weight, l.saved,
                           moe::matrix_view<float>(l.dx, 8, 4), moe::vector_view<float>(l.dweight),
                           no_bias, update::add, l.backward_scratch);
      },
      "ffn: gradients have the parts and shape of the weights");
  // A part of another extent would be written beyond its end.
  auto const refuse_gradients = [&](auto const& spoil, char const* text) {
    auto bad = l.dw.view;
    spoil(bad);
    refuse(
        [&] {
          l.experts.backward(exec, handle, out, l.tokens(), l.table(), weight, l.saved,
                             moe::matrix_view<float>(l.dx, 8, 4),
                             moe::vector_view<float>(l.dweight), bad, update::add,
                             l.backward_scratch);
        },
        text);
    refuse([&] { moe::for_each_parameter(l.w.view, bad, [](char const*, auto, auto) {}); }, text);
  };
  refuse_gradients([](auto& bad) { bad.up_bias = {bad.up_bias.data(), 2, 5}; },
                   "ffn: up_bias is [P,H] or absent");
  refuse_gradients([](auto& bad) { bad.down_bias = {bad.down_bias.data(), 3, 3}; },
                   "ffn: down_bias is [P,M] or absent");
  refuse_gradients([](auto& bad) { bad.down = moe::stacked_view(bad.down[0]); },
                   "ffn: down is [P,H,M]");
}
