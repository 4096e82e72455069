// build_table: worked examples, a slow reference on random cases, laws, edges and bad input.
// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <string>
#include <vector>

#include <moe/routing/build_table.hpp>

#include "../support/reference_table.hpp"
#include "../support/table_case.hpp"

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

template <class V>
void check_against_reference(moe::cpu const& exec, table_case<V> const& c) {
  moe::table_buffer table(c.shape);
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

TEST_CASE("routing/build_table: equals the slow reference on random cases") {
  draw random{std::mt19937(1)};
  for (int n = 0; n < 4000; ++n) {
    CAPTURE(n);
    table_case<float> c;
    fill(c, random, {.hostile = n % 2 == 0});
    check_against_reference(moe::cpu{}, c);
  }
  for (int n = 0; n < 500; ++n) {
    CAPTURE(n);
    table_case<double> c;
    fill(c, random);
    check_against_reference(moe::cpu{}, c);
  }
}
