// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <string>
#include <support/gradient.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <utility>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/gate/expert_choice.hpp>
#include <moe/routing/build_table.hpp>

namespace {

constexpr double none = moe::no_score<double>;
using moe_test::refusal;
using moe_test::says;

/// A batch that experts have chosen from.
template <class V, class Score>
struct chosen {
  std::int64_t T;
  int E;
  moe::expert_choice<Score> gate;
  std::vector<V> logits, scores;
  moe::cpu exec;
  moe::buffer scratch;
  moe::varying_routing_buffer<V> routed;

  chosen(moe::expert_choice<Score> const& g, std::vector<V> l, int experts,
         moe::batch const& tokens = {}, moe::cpu const& on = {})
      : T(static_cast<std::int64_t>(l.size()) / experts),
        E(experts),
        gate(g),
        logits(std::move(l)),
        scores(logits.size(), V(99)),
        exec(on),
        scratch(moe::route_scratch<V>(exec, g, T, E)),
        routed(T, E, g.pairs(T, E)) {
    moe::route(exec, gate, view(), tokens, scratch, routed, {scores, T, E});
  }
  moe::matrix_view<V const> view() const { return {logits, T, E}; }

  /// The tokens that expert e took, in order.
  std::vector<std::int64_t> tokens_of(int e) const {
    std::vector<std::int64_t> list;
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t i = routed.first_pair(t); i < routed.first_pair(t + 1); ++i)
        if (routed.expert[i] == e) list.push_back(t);
    return list;
  }

  std::vector<V> gradient(std::vector<V> const& dweight) const {
    std::vector<V> dlogits(logits.size(), V(99));
    moe::route_backward(exec, gate, view(), routed, dweight, scratch,
                        moe::matrix_view(dlogits, T, E));
    return dlogits;
  }
};

using list = std::vector<std::int64_t>;

/// By sorting whole columns, in double.
list slow_choice(std::vector<double> const& scores, std::int64_t T, int E, int e, std::int64_t S,
                 std::int64_t C, std::vector<std::uint8_t> const& live) {
  list all;
  for (std::int64_t s = 0; s < T; s += S) {
    std::vector<std::pair<double, std::int64_t>> column;
    for (std::int64_t t = s; t < s + S; ++t) {
      double const score = scores[static_cast<std::size_t>(t * E + e)];
      if (live[static_cast<std::size_t>(t)] != 0 && score > none) column.emplace_back(-score, t);
    }
    std::sort(column.begin(), column.end());
    if (static_cast<std::int64_t>(column.size()) > C) column.resize(static_cast<std::size_t>(C));
    for (auto const& [score, t] : column) all.push_back(t);
  }
  std::sort(all.begin(), all.end());
  return all;
}

}  // namespace

TEST_CASE("gate/expert_choice: three tokens and two experts by hand") {
  // Logits are logarithms of probabilities, so that softmax gives these back.
  std::vector<double> const p{0.9, 0.1, 0.6, 0.4, 0.2, 0.8};
  std::vector<double> l(p.size());
  for (std::size_t i = 0; i < l.size(); ++i) l[i] = std::log(p[i]);
  moe::expert_choice<> const gate{.capacity_factor = 1};
  CHECK(gate.C(3, 2) == 1);
  chosen const c(gate, l, 2);
  CHECK(list(c.routed.begin, c.routed.begin + 4) == list{0, 1, 1, 2});
  CHECK(list(c.routed.expert, c.routed.expert + 2) == list{0, 1});
  CHECK(c.routed.weight[0] == doctest::Approx(0.9).epsilon(1e-12));
  CHECK(c.routed.weight[1] == doctest::Approx(0.8).epsilon(1e-12));
  CHECK(c.routed.K == 1);

  chosen const twice(moe::expert_choice<>{.capacity_factor = 4.0 / 3}, l, 2);
  CHECK(twice.routed.K == 2);  // token 1 is the second best of both
  CHECK(list(twice.routed.begin, twice.routed.begin + 4) == list{0, 1, 3, 4});
  CHECK(list(twice.routed.expert, twice.routed.expert + 4) == list{0, 0, 1, 1});
  CHECK(twice.routed.weight[2] == doctest::Approx(0.4).epsilon(1e-12));
}

TEST_CASE("gate/expert_choice: equal scores go to the lower token") {
  chosen const c(moe::expert_choice<>{.capacity_factor = 1}, std::vector<float>(6 * 3, 0.5f), 3);
  for (int e = 0; e < 3; ++e) CHECK(c.tokens_of(e) == list{0, 1});
  chosen const zeros(moe::expert_choice<moe::identity>{.capacity_factor = 0.5},
                     std::vector<float>{-1, 0, -0.0f, 0}, 1);
  CHECK(zeros.tokens_of(0) == list{1, 2});
}

TEST_CASE("gate/expert_choice: C is factor S / E, rounded down, from 1 to S") {
  using gate = moe::expert_choice<>;
  CHECK(gate{}.C(64, 8) == 16);
  CHECK(gate{.capacity_factor = 1}.C(10, 4) == 2);
  CHECK(gate{.capacity_factor = 0.125}.C(4, 8) == 1);
  CHECK(gate{.capacity_factor = 9}.C(10, 4) == 10);
  CHECK(gate{.capacity_factor = 1, .sequence = 6}.C(60, 2) == 3);
  CHECK(gate{.capacity_factor = 1e9}.C(10, 4) == 10);
}

TEST_CASE("gate/expert_choice: agrees with sorted columns on random batches") {
  std::int64_t pairs = 0, absent = 0;
  for (unsigned seed = 0; seed < 60; ++seed) {
    CAPTURE(seed);
    int const E = 1 + static_cast<int>(seed % 7) * 5;  // up to 31: more than 16 choices
    std::int64_t const S = 1 + seed % 11, T = S * (seed % 4);
    auto logits = moe_test::normals(T * E, seed);
    // Coarse values make ties; some are no candidates.
    for (double& l : logits) l = l < -1.5 ? none : std::round(2 * l) / 2;
    std::vector<std::uint8_t> live(static_cast<std::size_t>(T), 1);
    for (std::size_t t = 0; t < live.size(); t += 5) live[t] = 0;
    double const factor = 0.3 + 0.4 * (seed % 9);
    auto const check = [&](auto gate) {
      chosen const c(gate, logits, E, {.live = live.data()});
      std::int64_t const C = c.gate.C(T, E);
      for (int e = 0; e < E; ++e)
        REQUIRE(c.tokens_of(e) == slow_choice(c.scores, T, E, e, S, C, live));
      int most = 1;
      for (std::int64_t t = 0; t < T; ++t) {
        std::int64_t const i0 = c.routed.first_pair(t), i1 = c.routed.first_pair(t + 1);
        most = std::max(most, static_cast<int>(i1 - i0));
        absent += i0 == i1;
        for (std::int64_t i = i0; i < i1; ++i) {
          CHECK(c.routed.weight[i] ==
                c.scores[static_cast<std::size_t>(t * E + c.routed.expert[i])]);
          CHECK((i == i0 || c.routed.expert[i - 1] < c.routed.expert[i]));
        }
      }
      CHECK(c.routed.K == most);
      CHECK(c.routed.pairs() <= c.gate.pairs(T, E));
      pairs += c.routed.pairs();
    };
    check(moe::expert_choice<>{.capacity_factor = factor, .sequence = S});
    check(moe::expert_choice<moe::sigmoid>{.capacity_factor = factor, .sequence = S});
  }
  CHECK(pairs > 2500);
  CHECK(absent > 100);
}

TEST_CASE("gate/expert_choice: invalid tokens are nobody's, and counted") {
  auto logits = moe_test::normals<float>(8 * 3, 5);
  logits[4] = std::numeric_limits<float>::quiet_NaN();
  logits[23] = std::numeric_limits<float>::infinity();
  std::vector<std::uint8_t> live(8, 1);
  live[7] = 0;  // masked and invalid: masked
  chosen const c(moe::expert_choice<>{.capacity_factor = 3}, logits, 3, {.live = live.data()});
  CHECK(list(c.routed.begin, c.routed.begin + 9) == list{0, 3, 4, 7, 10, 13, 16, 19, 19});
  CHECK(c.routed.expert[3] == moe::invalid_token);
  CHECK(c.routed.weight[3] == 0);
  moe::table_buffer table(c.gate.shape(8, 3));
  moe::buffer const scratch(moe::build_table_scratch(c.exec, table.room));
  moe::build_table(c.exec, c.routed, {}, scratch, table);
  CHECK(table.counts->invalid_tokens == 1);
  CHECK(table.counts->masked_tokens == 1);
  CHECK(table.counts->kept == 18);
  auto const d = c.gradient(std::vector<float>(19, 1.0f));
  for (int i = 3; i < 6; ++i) CHECK(d[static_cast<std::size_t>(i)] == 0);
  for (int i = 21; i < 24; ++i) CHECK(d[static_cast<std::size_t>(i)] == 0);
}

TEST_CASE("gate/expert_choice: every expert has C rows, and tokens may have more than 16") {
  // All experts take all tokens: K = E = 40.
  int const E = 40, M = 3;
  std::int64_t const T = 5;
  chosen const c(moe::expert_choice<>{.capacity_factor = 40}, moe_test::normals(T * E, 6), E);
  CHECK(c.routed.K == E);
  moe::table_buffer table(c.gate.shape(T, E));
  moe::buffer const scratch(moe::build_table_scratch(c.exec, table.room));
  moe::build_table(c.exec, c.routed, {}, scratch, table);
  for (int e = 0; e < E; ++e) CHECK(table.used[e] == T);
  // Experts that multiply by 1 + e / 10: out = x * sum of p (1 + e / 10).
  auto const x = moe_test::normals(T * M, 7);
  std::vector<double> rows(static_cast<std::size_t>(T * E * M)), out(x.size());
  moe::dispatch(c.exec, moe::matrix_view<double const>(x, T, M), table,
                moe::matrix_view(rows, T * E, M));
  for (int e = 0; e < E; ++e)
    for (int r = table.begin[e]; r < table.begin[e + 1]; ++r)
      for (int m = 0; m < M; ++m) rows[static_cast<std::size_t>(r * M + m)] *= 1 + e / 10.0;
  moe::combine(c.exec, moe::matrix_view<double const>(rows, T * E, M), table,
               moe::vector_view<double const>(c.routed.weight, T * E), moe::matrix_view(out, T, M));
  for (std::int64_t t = 0; t < T; ++t) {
    double factor = 0;
    for (int e = 0; e < E; ++e)
      factor += c.scores[static_cast<std::size_t>(t * E + e)] * (1 + e / 10.0);
    for (int m = 0; m < M; ++m) {
      auto const i = static_cast<std::size_t>(t * M + m);
      CHECK(out[i] == doctest::Approx(factor * x[i]).epsilon(1e-12));
    }
  }
}

TEST_CASE("gate/expert_choice: gradients agree with central differences") {
  auto const check = [](auto const& gate, std::vector<double> const& logits, int E,
                        moe::batch const& tokens = {}) {
    chosen const c(gate, logits, E, tokens);
    auto const dweight = moe_test::normals(c.routed.pairs(), 8);
    moe_test::check_gradient(
        [&](std::vector<double> const& l) {
          chosen const at(gate, l, E, tokens);
          REQUIRE(at.routed.pairs() == c.routed.pairs());
          double sum = 0;
          for (std::int64_t i = 0; i < c.routed.pairs(); ++i) {
            REQUIRE(at.routed.expert[i] == c.routed.expert[i]);
            sum += dweight[static_cast<std::size_t>(i)] * at.routed.weight[i];
          }
          return sum;
        },
        logits, c.gradient(dweight));
  };
  auto logits = moe_test::normals(12 * 5, 9);
  check(moe::expert_choice<>{}, logits, 5);
  check(moe::expert_choice<>{.capacity_factor = 1, .sequence = 4}, logits, 5);
  check(moe::expert_choice<moe::sigmoid>{.capacity_factor = 3}, logits, 5);
  check(moe::expert_choice<moe::identity>{.sequence = 6}, logits, 5);
  logits[3] = logits[17] = none;
  for (std::size_t i = 20; i < 25; ++i) logits[i] = none;
  std::vector<std::uint8_t> live(12, 1);
  live[1] = live[6] = 0;
  check(moe::expert_choice<>{}, logits, 5, {.live = live.data()});
}

TEST_CASE("gate/expert_choice: a layer's gradient reaches the logits") {
  std::int64_t const T = 9, M = 4, H = 5;
  int const E = 3;
  moe::cpu const exec;
  moe::ffn<moe::gelu> const experts;
  moe::ffn_shape const shape{E, M, H};
  auto values = moe_test::normals(experts.parameter_elements(shape, true), 1, 0, 0.5);
  auto const x = moe_test::normals(T * M, 2), dout = moe_test::normals(T * M, 3);
  moe::expert_choice<> const gate{.capacity_factor = 1.4};
  auto const parameters = experts.carve(values.data(), shape, true);
  moe::table_buffer table(gate.shape(T, E));
  moe::buffer const room(moe::build_table_scratch(exec, table.room));
  moe::buffer const saved(experts.saved_bytes<double>(shape, table.max_rows));
  moe::buffer const scratch(experts.backward_scratch_bytes<double>(exec, shape, table.max_rows) +
                            experts.forward_scratch_bytes<double>(exec, shape, table.max_rows));
  std::vector<double> out(x.size());
  auto const run = [&](chosen<double, moe::softmax> const& c) {
    moe::build_table(exec, c.routed, {}, room, table);
    experts.forward<double>(exec, experts.prepare(parameters), {x, T, M}, table,
                            {c.routed.weight, c.routed.pairs()}, {out, T, M}, saved, scratch);
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += dout[i] * out[i];
    return sum;
  };
  auto const logits = moe_test::normals(T * E, 4);
  chosen const c(gate, logits, E);  // outlives the table, which points at its token_begin
  run(c);
  std::vector<double> dx(x.size()), gradients(values.size());
  std::vector<double> dweight(static_cast<std::size_t>(c.routed.pairs()));
  experts.backward<double>(exec, experts.prepare(parameters), {dout, T, M}, {x, T, M}, table,
                           {c.routed.weight, c.routed.pairs()}, saved, {dx, T, M}, dweight,
                           experts.carve(gradients.data(), shape, true), moe::update::assign,
                           scratch);
  moe_test::check_gradient([&](std::vector<double> const& l) { return run(chosen(gate, l, E)); },
                           logits, c.gradient(dweight));
}

TEST_CASE("gate/expert_choice: threads change nothing; float agrees with double") {
  auto const logits = moe_test::normals<float>(300 * 24, 11);
  chosen const one(moe::expert_choice<>{.sequence = 100}, logits, 24);
  auto const dweight = moe_test::normals<float>(one.routed.pairs(), 12);
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    chosen const many(moe::expert_choice<>{.sequence = 100}, logits, 24, {}, moe::cpu(team));
    REQUIRE(many.routed.pairs() == one.routed.pairs());
    CHECK(
        std::equal(one.routed.expert, one.routed.expert + one.routed.pairs(), many.routed.expert));
    CHECK(
        std::equal(one.routed.weight, one.routed.weight + one.routed.pairs(), many.routed.weight));
    CHECK(many.gradient(dweight) == one.gradient(dweight));
  }
  chosen const exact(moe::expert_choice<>{.sequence = 100},
                     std::vector<double>(logits.begin(), logits.end()), 24);
  auto const d = exact.gradient(std::vector<double>(dweight.begin(), dweight.end()));
  auto const got = one.gradient(dweight);
  REQUIRE(exact.routed.pairs() == one.routed.pairs());
  for (std::size_t i = 0; i < d.size(); ++i) CHECK(std::abs(got[i] - d[i]) < 1e-5);
}

TEST_CASE("gate/expert_choice: is not causal: a later token takes the place of an earlier one") {
  std::vector<double> logits{1, 0, 2, 0};
  moe::expert_choice<moe::identity> const gate{.capacity_factor = 0.5};
  CHECK(chosen(gate, logits, 1).tokens_of(0) == list{0, 2});
  logits[3] = 3;  // the last token takes the place of the first
  CHECK(chosen(gate, logits, 1).tokens_of(0) == list{2, 3});
}

TEST_CASE("gate/mixture_of_depths: the best tokens of each sequence, by hand") {
  // Two sequences of four; half of each goes through the block.
  std::vector<double> const r{0.5, -1, 2, 0, -3, -2, -2, -4};
  chosen const c(moe::mixture_of_depths({.capacity = 0.5, .sequence = 4}), r, 1);
  CHECK(c.gate.C(8, 1) == 2);
  CHECK(c.tokens_of(0) == list{0, 2, 5, 6});
  CHECK(std::vector<double>(c.routed.weight, c.routed.weight + 4) ==
        std::vector<double>{0.5, 2, -2, -2});
  CHECK(moe::mixture_of_depths().C(64, 1) == 8);
  CHECK(c.gradient({1, 2, 3, 4}) == std::vector<double>{1, 0, 2, 0, 0, 3, 4, 0});
}

TEST_CASE("gate/mixture_of_depths: out = x + r f(x) for the tokens taken, x for the others") {
  std::int64_t const T = 12, M = 4, H = 5;
  moe::cpu const exec;
  moe::ffn<moe::gelu> const block;
  moe::ffn_shape const shape{1, M, H};
  auto values = moe_test::normals(block.parameter_elements(shape, true), 1, 0, 0.5);
  auto const parameters = block.carve(values.data(), shape, true);
  auto const x = moe_test::normals(T * M, 2), r = moe_test::normals(T, 3);
  auto const gate = moe::mixture_of_depths({.capacity = 0.5, .sequence = 6});
  chosen const c(gate, r, 1);
  moe::table_buffer table(gate.shape(T, 1));
  CHECK(table.max_rows == 6);
  moe::buffer const room(moe::build_table_scratch(exec, table.room));
  moe::build_table(exec, c.routed, {}, room, table);
  moe::buffer const saved(block.saved_bytes<double>(shape, T));
  moe::buffer const scratch(block.forward_scratch_bytes<double>(exec, shape, T));
  std::vector<double> out(x.size()), all(x.size());
  block.forward<double>(exec, block.prepare(parameters), {x, T, M}, table,
                        {c.routed.weight, c.routed.pairs()}, {out, T, M}, saved, scratch);
  block.forward_rows<double>(exec, block.prepare(parameters), {x, T, M}, moe::all_rows(T),
                             {all, T, M}, saved, scratch);
  int through = 0;
  for (std::int64_t t = 0; t < T; ++t) {
    bool const taken = c.routed.first_pair(t) < c.routed.first_pair(t + 1);
    through += taken;
    for (std::int64_t m = 0; m < M; ++m) {
      auto const i = static_cast<std::size_t>(t * M + m);
      double const expected = x[i] + (taken ? r[static_cast<std::size_t>(t)] * all[i] : 0);
      CHECK(x[i] + out[i] == doctest::Approx(expected).epsilon(1e-12));
    }
  }
  CHECK(through == 6);
}

TEST_CASE("gate/expert_choice: no tokens, another output type, leading dimensions") {
  chosen const nothing(moe::expert_choice<>{}, std::vector<float>{}, 3);
  CHECK(nothing.routed.pairs() == 0);
  CHECK(nothing.routed.K == 1);
  CHECK(nothing.gradient({}).empty());

  auto const logits = moe_test::normals(6 * 2, 1);
  chosen const c(moe::expert_choice<>{}, logits, 2);
  std::vector<double> wide(6 * 3, std::numeric_limits<double>::quiet_NaN());
  for (std::size_t i = 0; i < 12; ++i) wide[i / 2 * 3 + i % 2] = logits[i];
  moe::varying_routing_buffer<double> routed(6, 2, c.gate.pairs(6, 2));
  moe::route(c.exec, c.gate, moe::matrix_view(wide.data(), 6, 2, 3), {}, c.scratch, routed);
  CHECK(std::equal(routed.expert, routed.expert + routed.pairs(), c.routed.expert));
  std::vector<double> const dweight(static_cast<std::size_t>(routed.pairs()), 0.5);
  std::vector<float> d(6 * 4, 99.0f);
  moe::route_backward(c.exec, c.gate, moe::matrix_view(wide.data(), 6, 2, 3), routed, dweight,
                      c.scratch, moe::matrix_view(d.data(), 6, 2, 4));
  auto const expected = c.gradient(dweight);
  for (std::size_t i = 0; i < d.size(); ++i)
    CHECK(d[i] == (i % 4 < 2 ? static_cast<float>(expected[i / 4 * 2 + i % 4]) : 99.0f));
}

TEST_CASE("gate/expert_choice: bad input is refused") {
  std::vector<float> const logits(12);
  moe::cpu const exec;
  moe::buffer const scratch(1 << 14);
  auto const text = [&](moe::expert_choice<> const& g, std::int64_t T, int E, std::int64_t pairs,
                        moe::memory room) {
    return refusal([&] {
      moe::varying_routing_buffer<> routed(T, E, pairs);
      moe::route(exec, g, moe::matrix_view(logits, 4, 3), {}, room, routed);
    });
  };
  CHECK(text({}, 4, 3, 12, scratch) == "nothing was thrown");
  says(text({.capacity_factor = 0}, 4, 3, 12, scratch),
       "expert_choice: 0 < capacity_factor <= 1e9; got capacity_factor = 0");
  says(text({.sequence = 3}, 4, 3, 12, scratch), "T is a multiple of sequence");
  says(text({.sequence = -1}, 4, 3, 12, scratch), "T is a multiple of sequence");
  says(text({}, 3, 3, 12, scratch), "routing's T = 3, T = 4");
  says(text({}, 4, 2, 12, scratch), "routing's E = 2, E = 3");
  says(text({}, 4, 3, 9, scratch), "room = 9, pairs = 10");
  says(text({}, 4, 3, 12, {scratch.data(), 64}), "route: scratch has route_scratch");
  says(refusal([] { moe::varying_routing_buffer<>(-1, 2, 3); }), "varying_routing: T >= 0");
  says(refusal([] { moe::varying_routing_buffer<>(1 << 16, 1 << 16, 3); }), "T * E fit 32-bit ids");

  chosen const c(moe::expert_choice<>{}, logits, 3);
  std::vector<float> d(12);
  auto const backward = [&](std::int64_t pairs, moe::matrix_view<float> out, moe::memory room) {
    std::vector<float> const dweight(static_cast<std::size_t>(pairs));
    return refusal(
        [&] { moe::route_backward(exec, c.gate, c.view(), c.routed, dweight, room, out); });
  };
  std::int64_t const pairs = c.routed.pairs();
  CHECK(backward(pairs, {d.data(), 4, 3}, scratch) == "nothing was thrown");
  says(backward(pairs - 1, {d.data(), 4, 3}, scratch), "dweight has one value for each pair");
  says(backward(pairs, {d.data(), 3, 3}, scratch), "dlogits is [T,E]");
  says(backward(pairs, {}, scratch), "dlogits is given");
  says(backward(pairs, {d.data(), 4, 3}, {scratch.data(), 8}), "scratch has route_scratch");
}
