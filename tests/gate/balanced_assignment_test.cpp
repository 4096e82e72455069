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
#include <vector>

#include <moe/expert/ffn.hpp>
#include <moe/gate/balanced_assignment.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.hpp>

namespace {

constexpr double none = moe::no_score<double>;
using ids = std::vector<std::int32_t>;
using base_gate = moe::gate<moe::sigmoid, moe::replayed<1>, moe::as_scored>;

struct assigned {
  ids expert;
  moe::auction_result result;

  template <class V>
  assigned(std::vector<V> const& logits, int E, moe::batch const& tokens = {.training = true})
      : expert(logits.size() / static_cast<std::size_t>(E), 99) {
    auto const T = static_cast<std::int64_t>(expert.size());
    moe::buffer const scratch(moe::auction_scratch(T, E));
    result = moe::assign_balanced(moe::cpu{}, moe::matrix_view(logits, T, E), tokens, scratch,
                                  moe::matrix_view(expert, T, 1));
  }
};

double value(std::vector<double> const& logits, int E, ids const& expert) {
  double sum = 0;
  for (std::size_t t = 0; t < expert.size(); ++t)
    sum += logits[t * static_cast<std::size_t>(E) + static_cast<std::size_t>(expert[t])];
  return sum;
}

std::vector<int> loads(ids const& expert, int E) {
  std::vector<int> load(static_cast<std::size_t>(E));
  for (std::int32_t const e : expert) ++load[static_cast<std::size_t>(e)];
  return load;
}

/// The best of all assignments in which no expert has more than C tokens.
double best_value(std::vector<double> const& logits, int E, int C) {
  std::size_t const T = logits.size() / static_cast<std::size_t>(E);
  double best = none;
  ids expert(T, 0);
  for (;;) {
    auto const load = loads(expert, E);
    if (*std::max_element(load.begin(), load.end()) <= C)
      best = std::max(best, value(logits, E, expert));
    std::size_t t = 0;
    while (t < T && ++expert[t] == E) expert[t++] = 0;
    if (t == T) return best;
  }
}

}  // namespace

TEST_CASE("gate/balanced_assignment: two tokens and two experts by hand") {
  // Both like expert 0; token 0 would lose 3 by leaving it, token 1 only 1.
  std::vector<double> const z{4, 1, 5, 4};
  CHECK(assigned(z, 2).expert == ids{0, 1});
  CHECK(assigned(z, 2).result.eps == doctest::Approx(4.0 / 50).epsilon(1e-12));
  CHECK(assigned(z, 2, {}).expert == ids{0, 0});  // evaluation: the highest logit
  CHECK(assigned(z, 2, {}).result.bids == 0);
  CHECK(assigned(std::vector<float>(4, 1.0f), 2).result.eps == doctest::Approx(1e-4));
}

TEST_CASE("gate/balanced_assignment: within tokens * eps of the best of all assignments") {
  int better_than_greedy = 0;
  double worst = 0;
  for (unsigned seed = 0; seed < 120; ++seed) {
    CAPTURE(seed);
    int const E = 1 + static_cast<int>(seed % 4);
    auto const T = static_cast<std::int64_t>(1 + seed % (E == 4 ? 7 : 9));
    auto z = moe_test::normals(T * E, seed);
    for (std::size_t i = 0; i < z.size(); i += static_cast<std::size_t>(E)) z[i] += 1.5;
    if (seed % 5 == 0)
      for (double& l : z) l = std::round(l);
    assigned const a(z, E);
    REQUIRE(a.result.unassigned == 0);
    int const C = static_cast<int>((T + E - 1) / E);
    auto const load = loads(a.expert, E);
    CHECK(*std::max_element(load.begin(), load.end()) <= C);
    double const best = best_value(z, E, C), got = value(z, E, a.expert);
    CHECK(got <= best + 1e-12);
    CHECK(got >= best - static_cast<double>(T) * a.result.eps);
    worst = std::max(worst, (best - got) / (static_cast<double>(T) * a.result.eps));
    better_than_greedy += assigned(z, E, {}).expert != a.expert;
  }
  CHECK(better_than_greedy > 50);
  CHECK(worst > 0);  // eps is felt: the bound is no accident of exact solutions
}

TEST_CASE("gate/balanced_assignment: all experts have the same load, with few bids") {
  int const E = 16;
  auto z = moe_test::normals(1600 * E, 1);
  for (std::size_t i = 0; i < z.size(); ++i) z[i] -= 0.3 * static_cast<double>(i % E);
  assigned const a(z, E);
  CHECK(loads(a.expert, E) == std::vector<int>(E, 100));
  CHECK(a.result.unassigned == 0);
  CHECK(a.result.bids < 50 * 1600);
  auto const greedy = loads(assigned(z, E, {}).expert, E);
  CHECK(*std::max_element(greedy.begin(), greedy.end()) > 300);
  // T that is no multiple of E: at most the quotient, rounded up.
  assigned const odd(moe_test::normals(101 * 7, 2), 7);
  auto const load = loads(odd.expert, 7);
  CHECK(*std::max_element(load.begin(), load.end()) <= 15);
  CHECK(*std::min_element(load.begin(), load.end()) >= 0);
}

TEST_CASE("gate/balanced_assignment: equal logits go to the lower id") {
  CHECK(assigned(std::vector<float>{2, 2, 2, 1, 2, 2}, 3, {}).expert == ids{0, 1});
  CHECK(assigned(std::vector<double>(3, 0.0), 3).expert == ids{0});
}

TEST_CASE("gate/balanced_assignment: masked, invalid and hidden take no part") {
  auto const nan = std::numeric_limits<double>::quiet_NaN();
  std::vector<double> const z{1, 0, nan, 9, 1, 0.5, 7, 7, none, none, none, 2};
  std::vector<std::uint8_t> const live{1, 1, 1, 0, 1, 1};
  // Tokens 0, 2 and 5 are left: two places each.
  assigned const a(z, 2, {.training = true, .live = live.data()});
  CHECK(a.expert == ids{0, -1, 0, -1, -1, 1});
  CHECK(a.result.eps == doctest::Approx(2.0 / 50));
  CHECK(assigned(z, 2, {.live = live.data()}).expert == ids{0, -1, 0, -1, -1, 1});
  CHECK(assigned(std::vector<double>{}, 3).expert.empty());

  // Three tokens that all have one candidate: two have to stay without, and nothing hangs.
  assigned const tight(std::vector<double>{1, none, 2, none, 3, none}, 2);
  CHECK(tight.result.unassigned == 1);
  CHECK(std::count(tight.expert.begin(), tight.expert.end(), 0) == 2);
  CHECK(std::count(tight.expert.begin(), tight.expert.end(), -1) == 1);
  CHECK(tight.result.bids <= 600);
}

TEST_CASE("gate/balanced_assignment: gives a FFN(x) + (1 - a) x, with its gradient") {
  std::int64_t const T = 10, M = 4, H = 5;
  int const E = 3;
  moe::cpu const exec;
  moe::ffn<moe::gelu> const experts;
  moe::ffn_shape const shape{E, M, H};
  auto values = moe_test::normals(experts.parameter_elements(shape, true), 1, 0, 0.5);
  auto const parameters = experts.carve(values.data(), shape, true);
  auto const z = moe_test::normals(T * E, 2);
  auto const x = moe_test::normals(T * M, 3), dout = moe_test::normals(T * M, 4);
  std::vector<std::uint8_t> live(static_cast<std::size_t>(T), 1);
  live[4] = 0;
  moe::batch const tokens{.training = true, .live = live.data()};
  assigned const a(z, E, tokens);
  base_gate const gate{{}, moe::replayed<1>(a.expert.data(), 1, 1), {}};

  // Expert E is the token itself and holds no weights.
  std::int32_t const begin[] = {0, 1, 2, 3, 3}, physical[] = {0, 1, 2};
  moe::expert_kind const kind[] = {moe::expert_kind::computed, moe::expert_kind::computed,
                                   moe::expert_kind::computed, moe::expert_kind::copy};
  moe::expert_map const map{.physical_begin = begin, .physical = physical, .P = 3, .kind = kind};
  moe::basic_routing_buffer<double> one(T, 1, E), two(T, 2, E + 1);
  moe::table_buffer table({.T = T, .K = 2, .E = E + 1, .P = E, .max_rows = T});
  moe::buffer const room(moe::build_table_scratch(exec, table.room));
  moe::buffer const route_room(moe::route_scratch<base_gate, double>(exec, E));
  moe::buffer const saved(experts.saved_bytes<double>(shape, T));
  moe::buffer const scratch(experts.backward_scratch_bytes<double>(exec, shape, T));
  std::vector<double> out(x.size());
  auto const forward = [&](std::vector<double> const& l) {
    moe::route(exec, gate, moe::matrix_view(l, T, E), tokens, route_room, one);
    moe::mix_with_token(one, two);
    moe::build_table(exec, two, {}, map, room, table);
    experts.forward<double>(exec, experts.prepare(parameters), {x, T, M}, table,
                            {two.weight, 2 * T}, {out, T, M}, saved, scratch);
    double sum = 0;
    for (std::size_t i = 0; i < out.size(); ++i) sum += dout[i] * out[i];
    return sum;
  };
  forward(z);
  CHECK(table.counts->kept == T - 1);
  CHECK(table.counts->uncomputed == T - 1);
  std::vector<double> row(static_cast<std::size_t>(M));
  for (std::int64_t t = 0; t < T; ++t) {
    int const e = a.expert[static_cast<std::size_t>(t)];
    double const alpha = e < 0 ? 0 : 1 / (1 + std::exp(-z[static_cast<std::size_t>(t * E + e)]));
    std::int32_t const first[] = {0, 0, 0};
    std::int32_t used[] = {0, 0, 0};
    if (e >= 0) used[e] = 1;
    experts.forward_rows<double>(exec, experts.prepare(parameters), {x.data() + t * M, 1, M},
                                 {E, first, used}, {row.data(), 1, M}, saved, scratch);
    for (std::int64_t m = 0; m < M; ++m) {
      auto const i = static_cast<std::size_t>(t * M + m);
      double const expected =
          e < 0 ? 0 : alpha * row[static_cast<std::size_t>(m)] + (1 - alpha) * x[i];
      CHECK(out[i] == doctest::Approx(expected).epsilon(1e-12));
    }
  }

  forward(z);
  std::vector<double> dx(x.size()), dtwo(static_cast<std::size_t>(2 * T)),
      dweight(static_cast<std::size_t>(T)), dz(z.size()), gradients(values.size());
  experts.backward<double>(
      exec, experts.prepare(parameters), {dout, T, M}, {x, T, M}, table, {two.weight, 2 * T}, saved,
      {dx, T, M}, dtwo, experts.carve(gradients.data(), shape, true), moe::update::assign, scratch);
  moe::mix_with_token_backward<double>(two, dtwo, dweight);
  moe::route_backward(exec, gate, moe::matrix_view(z, T, E), one, {dweight, T, 1}, {}, route_room,
                      moe::matrix_view(dz, T, E));
  moe_test::check_gradient(forward, z, dz);
}

TEST_CASE("gate/balanced_assignment: bad input is refused") {
  moe::cpu const exec;
  std::vector<float> const logits(12);
  ids expert(8);
  moe::buffer const scratch(moe::auction_scratch(4, 3));
  auto const text = [&](std::int64_t rows, std::int64_t cols, moe::memory room) {
    return moe_test::refusal([&] {
      moe::assign_balanced(exec, moe::matrix_view(logits, 4, 3), {.training = true}, room,
                           moe::matrix_view(expert.data(), rows, cols));
    });
  };
  using moe_test::says;
  CHECK(text(4, 1, scratch) == "nothing was thrown");
  says(text(4, 2, scratch), "assign_balanced: ids are [T,1]");
  says(text(3, 1, scratch), "rows = 3");
  says(text(4, 1, {scratch.data(), 16}), "scratch has auction_scratch");
  moe::routing_buffer one(4, 1, 3), two(4, 2, 4), wrong(4, 2, 3);
  says(moe_test::refusal([&] { moe::mix_with_token<float>(one, wrong); }),
       "mix_with_token: one has K = 1");
  says(moe_test::refusal([&] { moe::mix_with_token<float>(two, two); }), "one.K = 2");
  std::vector<float> d(8);
  says(moe_test::refusal(
           [&] { moe::mix_with_token_backward<float>(two, {d.data(), 7}, {d.data(), 4}); }),
       "dtwo = 7");
}
