// build_table: worked examples, a slow reference on random cases, laws, edges and bad input.
// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <string>
#include <support/instrumented.hpp>
#include <support/reference_table.hpp>
#include <support/table_case.hpp>
#include <vector>

#include <moe/routing/build_table.hpp>

namespace {

using moe_test::table_case;
using moe_test::table_case_limits;

struct draw {
  std::mt19937 random;
  std::uint32_t operator()(std::size_t n) { return static_cast<std::uint32_t>(random() % n); }
};

std::vector<std::int32_t> list(std::int32_t const* first, std::int64_t n) {
  return {first, first + n};
}

/// The same result bit for bit?
void check_equal(moe::routing_table const& table, moe_test::reference_table const& want) {
  CHECK(list(table.row_of, table.pairs()) == want.row_of);
  CHECK(list(table.pair_of, table.max_rows) == want.pair_of);
  CHECK(list(table.begin, table.segments() + 1) == want.begin);
  CHECK(list(table.used, table.segments()) == want.used);
  CHECK(list(table.wanted, table.E) == want.wanted);
  CHECK(*table.counts == want.counts);
}

/// A table full of what an earlier batch may have left there.
moe::table_buffer used_table(moe::table_shape const& shape) {
  moe::table_buffer table(shape);
  moe::table_shape const& room = table.room;
  std::int64_t const segments = static_cast<std::int64_t>(room.P) * room.sources;
  std::fill_n(table.row_of, room.T * room.K, 12345);
  std::fill_n(table.pair_of, room.max_rows, 12345);
  std::fill_n(table.begin, segments + 1, 12345);
  std::fill_n(table.used, segments, 12345);
  std::fill_n(table.wanted, room.E, 12345);
  table.counts->kept = table.counts->rows = 12345;
  return table;
}

template <class V>
void check_against_reference(moe::cpu const& exec, table_case<V> const& c) {
  moe::table_buffer table = used_table(c.shape);
  moe::buffer scratch(build_table_scratch(exec, c.shape));
  build_table(exec, c.routing, c.rules, c.map, scratch, table);
  CHECK(moe_test::broken_law(c.routing, c.rules, c.map, table) == "");
  check_equal(table, moe_test::make_reference_table(c.routing, c.rules, c.map, table.sources,
                                                    table.max_rows));
}

/// A routing of given ids, K each.
moe::routing_buffer routing_of(int E, int K, std::vector<std::int32_t> const& ids,
                               std::vector<float> const& scores = {}) {
  moe::routing_buffer r(static_cast<std::int64_t>(ids.size()) / K, K, E);
  std::copy(ids.begin(), ids.end(), r.expert);
  std::copy(scores.begin(), scores.end(), r.score);
  return r;
}

moe::table_buffer table_of(moe::routing const& r, moe::table_rules const& rules,
                           moe::expert_map const& map = {}, int sources = 1) {
  moe::table_shape shape{.T = r.T, .K = r.K, .E = r.E, .P = map.P, .sources = sources};
  shape.max_rows = max_rows(rules, shape);
  moe::table_buffer table(shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, shape));
  build_table(moe::cpu{}, r, rules, map, scratch, table);
  return table;
}

using ids = std::vector<std::int32_t>;

}  // namespace

TEST_CASE("routing/build_table: packed rows, token-major and choice-major") {
  auto const r = routing_of(3, 2, {0, 1, 1, 0, 0, 2});
  auto table = table_of(r, {});
  CHECK(list(table.row_of, 6) == ids{0, 3, 4, 1, 2, 5});
  CHECK(list(table.pair_of, 6) == ids{0, 3, 4, 1, 2, 5});
  CHECK(list(table.begin, 4) == ids{0, 3, 5, 6});
  CHECK(list(table.wanted, 3) == ids{3, 2, 1});
  CHECK(*table.counts == moe::table_counts{.rows = 6, .capacity = 3, .kept = 6});

  // First choices of all tokens go ahead of second ones.
  table = table_of(r, {.rank = moe::order::choice_major});
  CHECK(list(table.pair_of, 6) == ids{0, 4, 3, 2, 1, 5});
}

TEST_CASE("routing/build_table: padded rows drop what is over the capacity") {
  auto const r = routing_of(3, 2, {0, 1, 1, 0, 0, 2});
  auto const table = table_of(r, {.rows = moe::layout::padded, .cap = moe::capacity::fixed(2)});
  CHECK(list(table.row_of, 6) == ids{0, 2, 3, 1, -1, 4});
  CHECK(list(table.pair_of, 6) == ids{0, 3, 1, 2, 5, -1});
  CHECK(list(table.begin, 4) == ids{0, 2, 4, 6});
  CHECK(list(table.used, 3) == ids{2, 2, 1});
  CHECK(list(table.wanted, 3) == ids{3, 2, 1});
  CHECK(*table.counts == moe::table_counts{.rows = 6, .capacity = 2, .kept = 5, .dropped = 1});
}

TEST_CASE("routing/build_table: aligned segments start at multiples") {
  auto const r = routing_of(3, 2, {0, 1, 1, 0, 0, 2});
  auto const table = table_of(r, {.rows = moe::layout::aligned, .align = 4});
  CHECK(list(table.begin, 4) == ids{0, 4, 8, 12});
  CHECK(list(table.row_of, 6) == ids{0, 4, 5, 1, 2, 8});
  CHECK(table.counts->rows == 12);
}

TEST_CASE(
    "routing/build_table: overflow by score keeps the best, in rank order, ties to lower rank") {
  float const nan = std::numeric_limits<float>::quiet_NaN();
  moe::table_rules const rules{.cap = moe::capacity::fixed(2), .when_full = moe::overflow::score};
  auto table = table_of(routing_of(1, 1, {0, 0, 0, 0}, {0.1f, 0.9f, 0.2f, 0.9f}), rules);
  CHECK(list(table.row_of, 4) == ids{-1, 0, -1, 1});
  table = table_of(routing_of(1, 1, {0, 0, 0, 0}, {0.5f, 0.5f, 0.5f, 0.5f}), rules);
  CHECK(list(table.row_of, 4) == ids{0, 1, -1, -1});
  table = table_of(routing_of(1, 1, {0, 0, 0, 0}, {nan, -1.0f, nan, -2.0f}), rules);
  CHECK(list(table.row_of, 4) == ids{-1, 0, -1, 1});
  table = table_of(routing_of(1, 1, {0, 0, 0, 0}, {-0.0f, 0.0f, -0.0f, 0.0f}), rules);
  CHECK(list(table.row_of, 4) == ids{0, 1, -1, -1});
}

TEST_CASE("routing/build_table: batch priority ranks tokens by their best score") {
  moe::table_rules rules{.cap = moe::capacity::fixed(2),
                         .when_full = moe::overflow::batch_prioritised};
  // Best scores 0.3, 0.9, 0.9, 0.5: tokens 1, 2, 3, 0.
  auto const r =
      routing_of(2, 2, {0, 1, 0, 1, 1, 0, 0, 1}, {0.3f, 0.1f, 0.9f, 0.1f, 0.1f, 0.9f, 0.5f, 0.2f});
  auto table = table_of(r, rules);
  CHECK(list(table.pair_of, 4) == ids{2, 5, 3, 4});
  // First choices 1, 3, 0 of expert 0 and 2 of expert 1; then second ones.
  rules.rank = moe::order::choice_major;
  table = table_of(r, rules);
  CHECK(list(table.pair_of, 4) == ids{2, 6, 4, 3});
}

TEST_CASE("routing/build_table: batch priority without a capacity drops nothing") {
  // Tutel computed the capacity from the wrong row here, and dropped a fifth of the pairs.
  draw random{std::mt19937(3)};
  for (double factor : {0.0, -4.0}) {
    moe::routing_buffer r(4096, 2, 16);
    for (std::int64_t i = 0; i < r.pairs(); ++i) {
      r.expert[i] = static_cast<std::int32_t>(std::min(random(16), random(16)));
      r.score[i] = static_cast<float>(random(1000));
    }
    auto const table = table_of(r, {.rows = moe::layout::padded,
                                    .rank = moe::order::choice_major,
                                    .cap = moe::capacity::tutel(factor),
                                    .when_full = moe::overflow::batch_prioritised});
    CHECK(table.counts->kept == 8192);
    CHECK(table.counts->capacity == *std::max_element(table.wanted, table.wanted + 16));
  }
}

TEST_CASE("routing/build_table: only visible computed experts take rows") {
  std::uint8_t const visible[] = {1, 1, 0, 1};
  moe::expert_kind const kind[] = {moe::expert_kind::computed, moe::expert_kind::copy,
                                   moe::expert_kind::computed, moe::expert_kind::zero};
  std::int32_t const physical_begin[] = {0, 1, 1, 1, 1}, physical[] = {0};
  moe::expert_map const map{.physical_begin = physical_begin,
                            .physical = physical,
                            .P = 1,
                            .visible = visible,
                            .kind = kind};
  auto const table =
      table_of(routing_of(4, 2, {0, 1, 2, 0, 3, -1}), {.cap = moe::capacity::fixed(1)}, map);
  CHECK(list(table.row_of, 6) == ids{0, moe::no_row(moe::expert_kind::copy), -1, -1,
                                     moe::no_row(moe::expert_kind::zero), -1});
  CHECK(list(table.wanted, 4) == ids{2, 1, 0, 1});
  CHECK(*table.counts == moe::table_counts{.rows = 1,
                                           .capacity = 1,
                                           .kept = 1,
                                           .uncomputed = 2,
                                           .dropped = 1,
                                           .hidden = 1,
                                           .missing = 1});
}

TEST_CASE("routing/build_table: replicas take pairs in turn, and C each") {
  std::int32_t const physical_begin[] = {0, 2, 3}, physical[] = {2, 0, 1};
  moe::expert_map const map{.physical_begin = physical_begin, .physical = physical, .P = 3};
  auto const r = routing_of(2, 1, {0, 0, 1, 0, 0, 0});
  auto table = table_of(r, {}, map);
  CHECK(table.counts->capacity == 3);  // of 5 pairs for 2 replicas
  CHECK(list(table.begin, 4) == ids{0, 2, 3, 6});
  CHECK(list(table.pair_of, 6) == ids{1, 4, 2, 0, 3, 5});
  table = table_of(r, {.cap = moe::capacity::fixed(2)}, map);
  CHECK(list(table.pair_of, 5) == ids{1, 4, 2, 0, 3});
  CHECK(table.counts->dropped == 1);
}

TEST_CASE("routing/build_table: more physical experts than logical ones stay empty without a map") {
  auto const r = routing_of(2, 1, {1, 0, 1});
  moe::table_rules const rules{.rows = moe::layout::aligned, .align = 2};
  moe::table_shape const shape{.T = 3, .K = 1, .E = 2, .P = 4, .max_rows = 6};
  moe::table_buffer table = used_table(shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, shape));
  build_table(moe::cpu{}, r, rules, {.P = 4}, scratch, table);
  CHECK(list(table.begin, 5) == ids{0, 2, 4, 4, 4});
  CHECK(list(table.used, 4) == ids{1, 2, 0, 0});
  CHECK(list(table.pair_of, 6) == ids{1, -1, 0, 2, -1, -1});
}

TEST_CASE("routing/build_table: each source has its own segments and capacity") {
  auto r = routing_of(2, 1, {0, 0, 0, 1, 0});
  std::int32_t const source[] = {1, 0, 1, 1, 2};
  r.tokens.source = source;
  auto const table = table_of(r, {.cap = moe::capacity::fixed(1)}, {}, 2);
  CHECK(list(table.begin, 5) == ids{0, 1, 2, 2, 3});
  CHECK(list(table.row_of, 5) == ids{1, 0, -1, 2, -1});
  CHECK(table.counts->dropped == 1);
  CHECK(table.counts->out_of_range == 1);
  CHECK(list(table.wanted, 2) == ids{3, 1});
}

TEST_CASE("routing/build_table: masked and invalid tokens, and ids that are none, go nowhere") {
  auto r = routing_of(2, 2, {0, 1, -2, 1, 1, -2, 7, 0});
  std::uint8_t const live[] = {0, 1, 1, 1};
  r.tokens.live = live;
  auto const table = table_of(r, {});
  CHECK(list(table.row_of, 8) == ids{-1, -1, -1, -1, 1, -1, -1, 0});
  CHECK(*table.counts == moe::table_counts{.rows = 2,
                                           .capacity = 1,
                                           .kept = 2,
                                           .out_of_range = 2,
                                           .masked_tokens = 1,
                                           .invalid_tokens = 1});
}

TEST_CASE("routing/build_table: what does not fit max_rows is counted") {
  auto const r = routing_of(2, 1, {0, 1, 0, 1, 1});
  moe::table_buffer table({.T = 5, .K = 1, .E = 2, .max_rows = 3});
  moe::buffer scratch(build_table_scratch(moe::cpu{}, table.room));
  build_table(moe::cpu{}, r, moe::table_rules{}, scratch, table);
  CHECK(list(table.row_of, 5) == ids{0, 2, 1, -1, -1});
  CHECK(list(table.begin, 3) == ids{0, 2, 3});
  CHECK(table.counts->beyond_max_rows == 2);
  CHECK(table.counts->kept == 3);
}

TEST_CASE("routing/build_table: DeepSpeed's golden cases of random token selection and of top-3") {
  // The inputs of tests/data/deepspeed_golden.json, written as formulas.
  auto const logit = [](int s, int e) {
    return ((7 * s + 13 * e + 3 * s * e + 3) % 29) / 8.0 - 1.5;
  };
  auto const by_logit = [&](int s) {
    std::array<int, 4> order{0, 1, 2, 3};
    std::sort(order.begin(), order.end(), [&](int a, int b) { return logit(s, a) > logit(s, b); });
    return order;
  };
  moe::routing_buffer top1(8, 1, 4), top3(8, 3, 4);
  for (int s = 0; s < 8; ++s) {
    double sum = 0;
    for (int e = 0; e < 4; ++e) sum += std::exp(logit(s, e));
    for (int j = 0; j < 3; ++j) {
      int const e = by_logit(s)[static_cast<std::size_t>(j)];
      top3.expert[3 * s + j] = e;
      top3.score[3 * s + j] = static_cast<float>(std::exp(logit(s, e)) / sum);
    }
    top1.expert[s] = top3.expert[3 * s];
  }
  moe::table_shape const shape{.T = 8, .K = 3, .E = 4, .max_rows = 24};
  moe::table_buffer table(shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, shape));

  auto const u = [](moe::routed_pair<float> const& p) {
    return static_cast<float>((11 * p.token.row + 17 * p.expert + 1) % 31 + 1) / 33;
  };
  moe::table_rules rules{.rows = moe::layout::padded,
                         .cap = moe::capacity::deepspeed({.eval_factor = 1, .min_capacity = 0})};
  build_table(moe::cpu{}, top1, rules, u, scratch, table);
  CHECK(table.counts->capacity == 2);
  CHECK(list(table.wanted, 4) == ids{2, 4, 1, 1});
  CHECK(list(table.row_of, 8) == ids{2, 3, 4, 0, -1, 1, 6, -1});  // expert * C + loc

  auto const dropped_experts = [&] {
    ids kept;
    for (int j = 0; j < 3; ++j)
      for (int s = 0; s < 8; ++s)
        kept.push_back(table.row_of[3 * s + j] < 0 ? -1 : top3.expert[3 * s + j]);
    return kept;
  };
  rules.cap = moe::capacity::deepspeed({.eval_factor = 0.5, .min_capacity = 0});
  rules.when_full = moe::overflow::score;
  build_table(moe::cpu{}, top3, rules, scratch, table);
  CHECK(table.counts->capacity == 3);
  CHECK(list(table.wanted, 4) == ids{6, 7, 6, 5});
  CHECK(dropped_experts() ==
        ids{-1, 1, 2, 0, 1, 0, 3, 1, 3, -1, -1, -1, 2, -1, 2, 0, -1, -1, -1, -1, 3, -1, -1, -1});
  rules.when_full = moe::overflow::position;
  build_table(moe::cpu{}, top3, rules, scratch, table);
  CHECK(dropped_experts() ==
        ids{1, 1, 2, -1, -1, -1, -1, -1, 3, 2, 0, 1, -1, -1, -1, -1, 0, 0, 3, 2, 3, -1, -1, -1});
}

TEST_CASE("routing/build_table: random overflow keeps other pairs in another step") {
  auto r = routing_of(1, 1, ids(64, 0));
  moe::table_rules const rules{.cap = moe::capacity::fixed(16), .when_full = moe::overflow::random};
  auto const first = list(table_of(r, rules).row_of, 64);
  CHECK(first == list(table_of(r, rules).row_of, 64));
  CHECK(std::count(first.begin(), first.end(), moe::dropped_row) == 48);
  CHECK(first != list(table_of(r, {.cap = moe::capacity::fixed(16)}).row_of, 64));
  r.tokens.step = 1;
  CHECK(first != list(table_of(r, rules).row_of, 64));
}

TEST_CASE("routing/build_table: a user's rule sees the pair and decides") {
  auto r = routing_of(2, 2, {0, 1, 0, 1, 0, 1}, {1, 2, 3, 4, 5, 6});
  for (int i = 0; i < 6; ++i) r.weight[i] = static_cast<float>(10 + i);
  r.tokens.first_id = 100;
  moe::table_shape const shape{.T = 3, .K = 2, .E = 2, .max_rows = 6};
  moe::table_buffer table(shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, shape));
  moe::table_rules const rules{.cap = moe::capacity::fixed(2)};
  bool right = true;
  auto const last_tokens = [&](moe::routed_pair<float> const& p) {
    auto const i = static_cast<float>(2 * p.token.row + p.choice);
    right = right && p.token.id == 100 + p.token.row && p.expert == p.choice &&
            p.weight == 10 + i && p.score == 1 + i;
    return static_cast<float>(p.token.row);
  };
  build_table(moe::cpu{}, r, rules, last_tokens, scratch, table);
  CHECK(right);
  CHECK(list(table.row_of, 6) == ids{-1, -1, 0, 2, 1, 3});
  auto const nan = [](moe::routed_pair<float> const&) { return std::nanf(""); };
  build_table(moe::cpu{}, r, rules, nan, moe::expert_map{}, scratch, table);
  CHECK(list(table.row_of, 6) == ids{0, 2, 1, 3, -1, -1});
}

TEST_CASE("routing/build_table: a user's rule equals the slow reference on random cases") {
  draw random{std::mt19937(2)};
  moe::cpu const exec;
  for (int n = 0; n < moe_test::cases(500); ++n) {
    CAPTURE(n);
    table_case<float> c;
    fill(c, random);
    if (c.rules.when_full == moe::overflow::batch_prioritised)
      c.rules.when_full = moe::overflow::position;
    moe::table_buffer table(c.shape);
    moe::buffer scratch(build_table_scratch(exec, c.shape));
    auto const user = [](moe::routed_pair<float> const& p) {
      return p.choice == 1 ? std::nanf("") : static_cast<float>((p.token.id + p.expert) % 3);
    };
    build_table(exec, c.routing, c.rules, user, c.map, scratch, table);
    CHECK(moe_test::broken_law(c.routing, c.rules, c.map, table) == "");
    check_equal(table, moe_test::make_reference_table<float>(
                           c.routing, c.rules, c.map, table.sources, table.max_rows,
                           [](auto const& in, std::int64_t t, int j, int e) {
                             return j == 1 ? std::nanf("")
                                           : static_cast<float>((in.tokens.at(t).id + e) % 3);
                           }));
  }
}

TEST_CASE("routing/build_table: the result does not depend on the number of threads") {
  moe::thread_team two(2), three(3), seven(7);
  draw random{std::mt19937(5)};
  for (int n = 0; n < 60; ++n) {
    CAPTURE(n);
    table_case<float> c;
    fill(c, random, {.T = 12000, .K = 4, .E = 40, .hostile = n % 2 == 0});
    moe::table_buffer one_table(c.shape);
    moe::buffer one_scratch(build_table_scratch(moe::cpu{}, c.shape));
    build_table(moe::cpu{}, c.routing, c.rules, c.map, one_scratch, one_table);
    CHECK(moe_test::broken_law(c.routing, c.rules, c.map, one_table) == "");
    for (moe::cpu const& exec : {moe::cpu(two), moe::cpu(three), moe::cpu(seven)}) {
      moe::table_buffer table(c.shape);
      moe::buffer scratch(build_table_scratch(exec, c.shape));
      build_table(exec, c.routing, c.rules, c.map, scratch, table);
      CHECK(list(table.row_of, table.pairs()) == list(one_table.row_of, table.pairs()));
      CHECK(list(table.pair_of, table.max_rows) == list(one_table.pair_of, table.max_rows));
      CHECK(list(table.begin, table.segments() + 1) == list(one_table.begin, table.segments() + 1));
      CHECK(list(table.used, table.segments()) == list(one_table.used, table.segments()));
      CHECK(list(table.wanted, table.E) == list(one_table.wanted, table.E));
      CHECK(*table.counts == *one_table.counts);
    }
  }
}

TEST_CASE("routing/build_table: no tokens; one table serves smaller batches") {
  moe::table_rules const padded{.rows = moe::layout::padded, .cap = moe::capacity::deepspeed()};
  moe::table_shape shape{.T = 6, .K = 2, .E = 3};
  shape.max_rows = max_rows(padded, shape);
  moe::table_buffer table(shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, shape));
  moe::routing_buffer const none(0, 2, 3);
  build_table(moe::cpu{}, none, padded, scratch, table);
  CHECK(*table.counts == moe::table_counts{.rows = 12, .capacity = 4});
  CHECK(list(table.pair_of, 12) == ids(12, -1));
  build_table(moe::cpu{}, moe::routing{.K = 1, .E = 1}, moe::table_rules{}, scratch, table);
  CHECK(table.T == 0);
  CHECK(table.E == 1);
  CHECK(table.counts->rows == 0);

  build_table(moe::cpu{}, routing_of(3, 1, {2, 2}), moe::table_rules{}, scratch, table);
  CHECK(table.T == 2);
  CHECK(table.K == 1);
  CHECK(list(table.row_of, table.pairs()) == ids{0, 1});
  build_table(moe::cpu{}, routing_of(3, 2, ids(12, 1)), moe::table_rules{}, scratch, table);
  CHECK(table.counts->kept == 12);
}

TEST_CASE("routing/build_table: a capacity that comes out as 0 drops all pairs and counts them") {
  auto const table = table_of(routing_of(2, 1, {0, 1, 1}),
                              {.rows = moe::layout::padded, .cap = moe::capacity::tutel(0.1)});
  CHECK(*table.counts == moe::table_counts{.dropped = 3});
}

TEST_CASE("routing/build_table: max_rows bounds all routings that choose no expert twice") {
  draw random{std::mt19937(6)};
  for (int n = 0; n < moe_test::cases(2000); ++n) {
    CAPTURE(n);
    table_case<float> c;
    fill(c, random, {.hostile = false});
    moe::table_buffer table(c.shape);
    moe::buffer scratch(build_table_scratch(moe::cpu{}, c.shape));
    build_table(moe::cpu{}, c.routing, c.rules, c.map, scratch, table);
    CHECK(table.counts->beyond_max_rows == 0);
  }
  // And no more than needed where that is easy to say.
  moe::table_shape const shape{.T = 8, .K = 2, .E = 4, .sources = 2};
  CHECK(max_rows({}, shape) == 16);
  CHECK(max_rows({.cap = moe::capacity::fixed(1)}, shape) == 8);
  CHECK(max_rows({.rows = moe::layout::padded, .cap = moe::capacity::fixed(3)}, shape) == 24);
  CHECK(max_rows({.rows = moe::layout::padded}, shape) == 64);
  CHECK(max_rows({.rows = moe::layout::aligned, .align = 4}, shape) == 16 + 8 * 3);
}

TEST_CASE("routing/build_table: bad input is refused with the rule and the values") {
  moe::table_shape const shape{.T = 3, .K = 2, .E = 2, .max_rows = 6};
  moe::table_buffer table(shape);
  moe::buffer scratch(build_table_scratch(moe::cpu{}, shape));
  auto r = routing_of(2, 1, {0, 1, 0});
  auto const message = [&](moe::routing const& in, moe::table_rules const& rules = {},
                           moe::expert_map const& map = {}) -> std::string {
    try {
      build_table(moe::cpu{}, in, rules, map, scratch, table);
    } catch (moe::precondition_error const& e) {
      return e.what();
    }
    return "accepted";
  };
  auto const has = [](std::string const& text, char const* part) {
    CAPTURE(text);
    CHECK(text.find(part) != std::string::npos);
  };
  CHECK(message(r) == "accepted");
  has(message(routing_of(2, 1, {0, 0, 0, 0})), "T = 4, room for T = 3");
  has(message(routing_of(3, 1, {0})), "E = 3, room for E = 2");
  has(message(moe::routing{.T = 1, .K = 3, .E = 2}), "K = 3, room for K = 2");
  has(message(moe::routing{.T = 1, .K = 17, .E = 2}),
      "1 <= K <= 16 (or K <= E with token_begin), E >= 1; got T = 1, K = 17");
  has(message(moe::routing{.T = -1, .K = 1, .E = 2}), "got T = -1");
  has(message(moe::routing{.T = 1, .K = 1, .E = 2}), "the routing's expert and all arrays");
  has(message(r, {.rows = moe::layout::aligned, .align = 0}), "align >= 1; got align = 0");
  has(message(r, {.cap = {.rule = moe::capacity_rule::kind::fixed, .rows = 0}}), "rows = 0");
  has(message(r, {.cap = {.multiple = 0}}), "multiple = 0");
  has(message(r, {.cap = {.rule = moe::capacity_rule::kind::gshard, .factor = std::nan("")}}),
      "factor");
  auto no_scores = routing_of(2, 1, {0});
  no_scores.score = no_scores.weight = nullptr;
  CHECK(message(no_scores) == "accepted");
  has(message(no_scores, {.when_full = moe::overflow::score}),
      "needs the routing's score or weight");

  // Maps.
  std::int32_t const begin[] = {0, 1, 2}, twice[] = {0, 0}, right[] = {1, 0}, beyond[] = {0, 2};
  has(message(r, {}, {.physical_begin = begin, .physical = nullptr, .P = 2}),
      "both of physical_begin");
  has(message(r, {}, {.P = 1}), "P = 1, E = 2");
  has(message(r, {}, {.physical_begin = begin, .physical = right, .P = 3}), "room for P = 2");
  has(message(r, {}, {.physical_begin = begin, .physical = twice, .P = 2}), "named once");
  has(message(r, {}, {.physical_begin = begin, .physical = beyond, .P = 2}), "in [0, P)");
  CHECK(message(r, {}, {.physical_begin = begin, .physical = right, .P = 2}) == "accepted");
  std::int32_t const none_for_1[] = {0, 1, 1};
  std::uint8_t const only_0[] = {1, 0};
  has(message(r, {}, {.physical_begin = none_for_1, .physical = right, .P = 2}), "have one");
  CHECK(message(r, {},
                {.physical_begin = none_for_1, .physical = right, .P = 2, .visible = only_0}) ==
        "accepted");

  // token_begin.
  using begins = std::array<std::int32_t, 4>;
  for (auto const& wrong : {begins{0, 2, 1, 3}, begins{1, 1, 2, 3}, begins{0, 0, 3, 3},
                            begins{0, -1, 0, 1}, begins{0, 1, 2, 4}, begins{0, 9, 9, 3}})
    for (auto rule : {moe::overflow::position, moe::overflow::batch_prioritised}) {
      auto varied = routing_of(2, 1, {0, 1, 0});
      varied.K = 1;
      varied.token_begin = wrong.data();
      has(message(varied, {.when_full = rule}), "token_begin");
    }

  CHECK_THROWS_AS(moe::table_buffer({.T = 1, .K = 17, .E = 1}), moe::precondition_error);
  CHECK_THROWS_AS(moe::table_buffer({.T = std::int64_t{1} << 31, .K = 1, .E = 1}),
                  moe::precondition_error);
  CHECK_THROWS_AS(moe::table_buffer({.T = 1, .K = 1, .E = 1, .max_rows = std::int64_t{1} << 31}),
                  moe::precondition_error);
  CHECK_THROWS_AS(moe::table_buffer({.T = 1, .K = 1, .E = 1 << 20, .sources = 1 << 12}),
                  moe::precondition_error);

  moe::memory little(scratch.data(), 100);
  CHECK_THROWS_WITH_AS(build_table(moe::cpu{}, r, moe::table_rules{}, little, table),
                       doctest::Contains("build_table_scratch"), moe::precondition_error);
  table.counts = nullptr;
  has(message(r), "all arrays of the table are given");
}

TEST_CASE("routing/build_table: the scratch size is enough for every rule") {
  draw random{std::mt19937(8)};
  for (int n = 0; n < moe_test::cases(300); ++n) {
    table_case<double> c;
    fill(c, random);
    moe::buffer scratch(build_table_scratch(moe::cpu{}, c.shape) + 1);
    moe::memory const odd(scratch.data() + 1, scratch.size() - 1);  // misaligned: the worst case
    moe::table_buffer table(c.shape);
    CHECK_NOTHROW(build_table(moe::cpu{}, c.routing, c.rules, c.map, odd, table));
  }
}

TEST_CASE("routing/build_table: equals the slow reference on random cases") {
  draw random{std::mt19937(1)};
  for (int n = 0; n < moe_test::cases(4000); ++n) {
    CAPTURE(n);
    table_case<float> c;
    fill(c, random, {.hostile = n % 2 == 0});
    check_against_reference(moe::cpu{}, c);
  }
  for (int n = 0; n < moe_test::cases(500); ++n) {
    CAPTURE(n);
    table_case<double> c;
    fill(c, random);
    check_against_reference(moe::cpu{}, c);
  }
}
