// Build_table by its kernels, on the block emulator: the CPU's tables, index for index.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <moe/gate/gate.hpp>
#include <moe/gate/route.cuh>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.cuh>
#include <moe/routing/build_table.hpp>

#include "emulator/emulated_gpu.hpp"
#include "support/refusal.hpp"
#include "support/table_case.hpp"

namespace {

using moe_test::table_case;

/// With blocks enough for a chunk between two others.
template <int Processors>
struct executor_of : moe_test::emulated_gpu {
  using emulated_gpu::emulated_gpu;
  int processors() const { return Processors; }
};
using executor = executor_of<3>;

/// One launch of the 64 threads of a block holds twice as many pairs as it has registers for.
constexpr int one_block = 2 * 2 * 64;

struct draw {
  std::mt19937 random;
  std::uint32_t operator()(std::size_t n) { return static_cast<std::uint32_t>(random() % n); }
};

/// A table whose arrays are exactly as long as it says, full of what was left there.
struct exact_table {
  std::vector<std::int32_t> row_of, pair_of, begin, used, wanted;
  std::vector<moe::table_counts> counts{{.rows = 12345, .kept = 12345}};
  moe::routing_table table;

  exact_table(moe::table_shape const& shape, std::int64_t pairs, int E, int P) {
    auto const array = [](std::vector<std::int32_t>& v, std::int64_t n) {
      v.assign(static_cast<std::size_t>(n), 12345);
      if (n == 0) v.reserve(1);  // not null: the host does not know that there are none
      return v.data();
    };
    table.row_of = array(row_of, pairs);
    table.pair_of = array(pair_of, shape.max_rows);
    table.begin = array(begin, std::int64_t{P} * shape.sources + 1);
    table.used = array(used, std::int64_t{P} * shape.sources);
    table.wanted = array(wanted, E);
    table.counts = counts.data();
    table.max_rows = shape.max_rows;
    table.sources = shape.sources;
    table.room = shape;
    if (table.room.P == 0) table.room.P = shape.E;
  }

  bool operator==(exact_table const& other) const {
    return row_of == other.row_of && pair_of == other.pair_of && begin == other.begin &&
           used == other.used && wanted == other.wanted && counts == other.counts &&
           table.T == other.table.T && table.K == other.table.K && table.E == other.table.E &&
           table.P == other.table.P && table.token_begin == other.table.token_begin &&
           table.computed_only == other.table.computed_only;
  }
};

/// Builds the table of a case by build(exec, scratch, table).
template <class V, class X, class Build>
exact_table table_by(X const& exec, table_case<V> const& c, Build const& build) {
  int const P = c.map.P == 0 ? c.routing.E : c.map.P;
  exact_table out(c.shape, c.routing.pairs(), c.routing.E, P);
  std::size_t const bytes = moe::build_table_scratch(exec, c.shape);
  std::unique_ptr<std::byte[]> const scratch(new std::byte[bytes]);
  build(exec, moe::memory(scratch.get(), bytes), out.table);
  return out;
}

/// Not null where there are no pairs.
template <class V>
void give_arrays(table_case<V>& c) {
  c.expert.reserve(1);
  c.weight.reserve(1);
  c.routing.expert = c.expert.data();
  c.routing.weight = c.weight.data();
}

/// What differs, or nothing.
std::string difference(exact_table const& found, exact_table const& want) {
  auto const first = [](char const* name, auto const& a, auto const& b) -> std::string {
    for (std::size_t i = 0; i < a.size(); ++i)
      if (a[i] != b[i])
        return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(a[i]) +
               ", not " + std::to_string(b[i]) + "; ";
    return {};
  };
  if (found == want) return {};
  return "different: " + first("row_of", found.row_of, want.row_of) +
         first("pair_of", found.pair_of, want.pair_of) + first("begin", found.begin, want.begin) +
         first("used", found.used, want.used) + first("wanted", found.wanted, want.wanted);
}

template <class V, class X, class Build>
void check_builds(X const& exec, table_case<V> const& c, Build const& build) {
  exact_table const want = table_by(moe::cpu{}, c, build);
  exact_table const found = table_by(exec, c, build);
  CHECK(difference(found, want) == "");
  CHECK(moe_test::broken_law(c.routing, c.rules, c.map, found.table) == "");
}

template <class V, class X>
void check(X const& exec, table_case<V> const& c) {
  check_builds(exec, c, [&](auto const& on, moe::memory scratch, moe::routing_table& table) {
    moe::build_table(on, c.routing, c.rules, c.map, scratch, table);
  });
}

template <class F>
void on_executors(F const& f) {
  for (auto const order : moe_test::schedules) {
    if (moe_test::has_thread_sanitizer && order != moe_test::schedule::shuffled) continue;
    f(executor(order));
  }
}

/// T tokens of K choices of E experts, drawn; capacity as given.
struct drawn_case : table_case<float> {
  drawn_case(int T, int K, int E, moe::table_rules const& by = {}, int sources = 1) {
    draw random{std::mt19937(static_cast<unsigned>(T + K + E))};
    for (int i = 0; i < T * K; ++i) {
      expert.push_back(static_cast<std::int32_t>(random(static_cast<std::size_t>(E))));
      weight.push_back(static_cast<float>(random(50)));
    }
    for (int t = 0; t < T; ++t)
      source.push_back(static_cast<std::int32_t>(random(static_cast<std::size_t>(sources))));
    routing.T = T;
    routing.K = K;
    routing.E = E;
    routing.expert = expert.data();
    routing.weight = weight.data();
    if (sources > 1) routing.tokens.source = source.data();
    rules = by;
    shape = {.T = T, .K = K, .E = E, .P = E, .sources = sources};
    shape.max_rows = moe::max_rows(rules, shape);
  }
};

/// What a gate counts of chunks of `chunk` tokens.
std::vector<std::int32_t> counts_of(moe::routing const& in, std::int64_t chunk) {
  std::int64_t const chunks = (in.T + chunk - 1) / chunk, stride = in.E + 4;
  std::vector<std::int32_t> counts(static_cast<std::size_t>(chunks * stride));
  for (std::int64_t t = 0; t < in.T; ++t) {
    std::int32_t* const own = counts.data() + t / chunk * stride;
    if (!in.tokens.is_live(t)) {
      ++own[in.E + 2];
    } else if (in.expert[t * in.K] == moe::invalid_token) {
      ++own[in.E + 3];
    } else {
      for (int j = 0; j < in.K; ++j) {
        int const e = in.expert[t * in.K + j];
        ++own[e >= 0 && e < in.E ? e : e == moe::no_candidate ? in.E : in.E + 1];
      }
    }
  }
  return counts;
}

moe::table_rules const some_rules[] = {
    {},
    {.rank = moe::order::choice_major},
    {.rows = moe::layout::padded, .cap = moe::capacity::tutel(0)},
    {.rows = moe::layout::aligned, .cap = moe::capacity::fixed(5), .align = 8},
    {.cap = moe::capacity::fixed(5), .when_full = moe::overflow::score},
    {.rank = moe::order::choice_major,
     .cap = moe::capacity::fixed(4),
     .when_full = moe::overflow::random},
    {.cap = moe::capacity::fixed(4), .when_full = moe::overflow::batch_prioritised},
};

}  // namespace

TEST_CASE("emulator/build_table: random cases over all rules, as the CPU builds them") {
  int const cases = moe_test::has_thread_sanitizer ? 16 : 500;
  draw random{std::mt19937(7)};
  for (int n = 0; n < cases; ++n) {
    CAPTURE(n);
    table_case<float> c;
    bool const large = n % 4 == 0;  // more than one block has
    moe_test::fill(c, random, {.T = large ? 150u : 40u, .hostile = n % 3 != 0});
    give_arrays(c);
    check(executor(moe_test::schedules[n % 3], static_cast<unsigned>(n)), c);
  }
}

TEST_CASE("emulator/build_table: random cases in double") {
  int const cases = moe_test::has_thread_sanitizer ? 3 : 60;
  draw random{std::mt19937(8)};
  for (int n = 0; n < cases; ++n) {
    CAPTURE(n);
    table_case<double> c;
    moe_test::fill(c, random, {.T = n % 4 == 0 ? 150u : 40u});
    give_arrays(c);
    check(executor(moe_test::schedule::shuffled, static_cast<unsigned>(n)), c);
  }
}

TEST_CASE("emulator/build_table: no tokens, one token, one expert, all to one expert") {
  on_executors([](executor const& exec) {
    for (std::size_t r = 0; r < std::size(some_rules); ++r) {
      if (moe_test::has_thread_sanitizer && r % 3 != 0) continue;
      moe::table_rules const& rules = some_rules[r];
      check(exec, drawn_case(0, 2, 5, rules));
      check(exec, drawn_case(1, 3, 5, rules));
      check(exec, drawn_case(21, 2, 1, rules));
      drawn_case c(17, 4, 9, rules);
      std::fill(c.expert.begin(), c.expert.end(), 8);
      check(exec, c);
    }
  });
}

TEST_CASE("emulator/build_table: no pair of a warp, or of all, has an expert") {
  for (int const T : {150, 400})
    for (std::int32_t const id : {-1, 5, -2, 0}) {
      if (moe_test::has_thread_sanitizer && T == 400) continue;
      drawn_case c(T, 1, 5);
      std::fill(c.expert.begin(), c.expert.end() - 3, id);
      c.live.assign(static_cast<std::size_t>(T), id == 0 ? 0 : 1);
      c.routing.tokens.live = c.live.data();
      check(executor(), c);
    }
}

TEST_CASE("emulator/build_table: pairs about those of one block, of one tile, of one warp") {
  int const pairs[] = {31,
                       32,
                       33,
                       63,
                       64,
                       65,
                       127,
                       128,
                       129,
                       one_block - 1,
                       one_block,
                       one_block + 1,
                       3 * one_block / 2,
                       3 * one_block + 5};
  for (int const n : pairs)
    for (std::size_t r = 0; r < std::size(some_rules); ++r) {
      if (moe_test::has_thread_sanitizer &&
          (n < one_block || (r + static_cast<std::size_t>(n)) % 3 != 0))
        continue;
      CAPTURE(n);
      CAPTURE(r);
      check(executor(moe_test::schedule::one_warp_ahead), drawn_case(n, 1, 7, some_rules[r]));
    }
  for (moe::table_rules const& rules : some_rules)
    if (!moe_test::has_thread_sanitizer) check(executor(), drawn_case(111, 3, 7, rules));
}

TEST_CASE("emulator/build_table: many blocks, some with several tiles, one with fewer pairs") {
  for (std::size_t r = 0; r < std::size(some_rules) && !moe_test::has_thread_sanitizer; ++r) {
    CAPTURE(r);
    check(executor_of<40>(), drawn_case(1999, 3, 20, some_rules[r]));
    check(executor_of<17>(), drawn_case(2500, 2, 33, some_rules[r], 2));
  }
}

TEST_CASE("emulator/build_table: groups about the room that shared memory has") {
  for (int const E : {1021, 1023, 1024, 1025, 1500})
    for (int const T : {30, 200})
      for (std::size_t r = 0; r < std::size(some_rules); ++r) {
        if (r % 3 != static_cast<std::size_t>(E) % 3) continue;
        if (moe_test::has_thread_sanitizer && E != 1025) continue;
        CAPTURE(E);
        check(executor(), drawn_case(T, 2, E, some_rules[r]));
      }
  check(executor(), drawn_case(150, 2, 50, {}, 30));
  check(executor(), drawn_case(150, 2, 19, {.rank = moe::order::choice_major}, 54));
}

TEST_CASE("emulator/build_table: the counts of a gate spare a launch") {
  for (int const chunk : {1, 7, 64, 100, 500})
    for (std::size_t r = 0; r < std::size(some_rules); ++r) {
      if (moe_test::has_thread_sanitizer && (chunk != 7 || r % 3 != 0)) continue;
      drawn_case c(150, 2, 12, some_rules[r]);
      for (std::size_t i = 0; i < c.expert.size(); i += 13) c.expert[i] = moe::no_candidate;
      for (std::size_t i = 5; i < c.expert.size(); i += 17) c.expert[i] = 12;
      for (std::size_t i = 0; i < c.expert.size(); i += 22) c.expert[i] = moe::invalid_token;
      for (int t = 0; t < 150; ++t) c.live.push_back(t % 9 != 2);
      c.routing.tokens.live = c.live.data();
      auto counts = counts_of(c.routing, chunk);
      c.routing.chunk_counts = {chunk, (150 + chunk - 1) / chunk, counts.data()};
      CAPTURE(chunk);
      CAPTURE(r);
      check(executor(), c);
    }
  // They are used: a count of what is not there makes another table.
  drawn_case c(150, 2, 12);
  auto counts = counts_of(c.routing, 10);
  c.routing.chunk_counts = {10, 15, counts.data()};
  ++counts[0];
  exact_table const found =
      table_by(executor(), c, [&](auto const& on, moe::memory scratch, moe::routing_table& table) {
        moe::build_table(on, c.routing, c.rules, scratch, table);
      });
  CHECK(found.wanted[0] == counts_of(c.routing, 150)[0] + 1);
  // Unless their rows are not aligned: E is no multiple of four.
  drawn_case odd(150, 2, 11);
  counts.assign(counts.size(), 99);
  odd.routing.chunk_counts = {10, 15, counts.data()};
  check(executor(), odd);
}

TEST_CASE("emulator/build_table: what a gate counts is what a table needs") {
  constexpr int T = 180, E = 12, K = 2;
  moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised> const gate;
  draw random{std::mt19937(11)};
  std::vector<float> logits;
  std::vector<std::uint8_t> live;
  for (int i = 0; i < T * E; ++i) logits.push_back(static_cast<float>(random(1000)) / 100);
  for (int t = 0; t < T; ++t) live.push_back(t % 7 != 3);
  for (int e = 1; e < E; ++e) logits[static_cast<std::size_t>(5 * E + e)] = moe::no_score<float>;
  logits[8 * E] = std::numeric_limits<float>::quiet_NaN();
  moe::matrix_view<float const> const view(logits.data(), T, E);
  moe::batch const tokens{.live = live.data()};
  on_executors([&](executor const& exec) {
    drawn_case c(T, K, E);
    std::vector<std::byte> room(moe::gate_sums_bytes(T, E));
    moe::memory from(room.data(), room.size());
    auto const sums = moe::carve_gate_sums(from, T, E);
    moe::route(exec, gate, view, tokens, {}, c.routing, {}, sums);
    CHECK(c.routing.chunk_counts.counts == sums.pairs);
    check(exec, c);
  });
}

TEST_CASE("emulator/build_table: a user's rule for full experts") {
  auto const by_weight = [](moe::routed_pair<float> const& pair) {
    return pair.weight - static_cast<float>(pair.choice + pair.token.id % 3) +
           static_cast<float>(pair.expert);
  };
  int const cases = moe_test::has_thread_sanitizer ? 3 : 60;
  draw random{std::mt19937(9)};
  for (int n = 0; n < cases; ++n) {
    CAPTURE(n);
    table_case<float> c;
    moe_test::fill(c, random, {.T = n % 3 == 0 ? 150u : 40u});
    give_arrays(c);
    check_builds(executor(), c,
                 [&](auto const& on, moe::memory scratch, moe::routing_table& table) {
                   moe::build_table(on, c.routing, c.rules, by_weight, c.map, scratch, table);
                 });
  }
}

TEST_CASE("emulator/build_table: positions far from zero are divided rightly") {
  std::mt19937 random(10);
  constexpr std::uint32_t end = 0x80000000u;
  std::vector<std::uint32_t> numbers{1, 2, 3, 7, 8, 9, 0x40000000u, 0x40000001u, end - 2, end - 1};
  for (int i = 0; i < 300; ++i)
    numbers.push_back(1 + (static_cast<std::uint32_t>(random()) >> (1 + i % 31)) % (end - 1));
  bool right = true;
  for (std::uint32_t const by : numbers) {
    moe::detail::divisor const d(by);
    for (std::uint32_t const n : numbers)
      for (std::uint32_t const x : {n - 1, n, n / by * by, n / by * by - (n >= by ? 1 : 0)})
        right = right && d.quotient(x) == x / by;
  }
  CHECK(right);
}

TEST_CASE("emulator/build_table: a device knows the capacity that the CPU does") {
  using namespace moe::capacity;
  for (auto const& rule : {dropless(), dropless(7), fixed(9), tutel(0, 4), tutel(-1.5, 3), tutel(2),
                           gshard(), deepspeed(), switch_transformer()})
    for (std::int64_t const load : {0, 1, 6, 20, 1000, 2147483647})
      for (bool const training : {false, true})
        CHECK(moe::detail::capacity_on_device(rule, 100, 9, 2, training)
                  .of(static_cast<std::uint32_t>(load)) ==
              rows_of(rule, 100, 9, 2, training, load));
}

TEST_CASE("emulator/build_table: a capacity of nothing drops all, by any rule") {
  for (auto const when_full : {moe::overflow::position, moe::overflow::score})
    check(executor(), drawn_case(40, 2, 50,
                                 {.cap = moe::capacity::gshard({.factor = 0.1, .eval_factor = 0.1}),
                                  .when_full = when_full}));
}

namespace {

/// All pairs are refused, and nothing else is said.
void check_refused(table_case<float> const& c, std::int64_t pairs, std::int64_t refused) {
  static int calls = 0;
  for (auto const when_full :
       {moe::overflow::position, moe::overflow::score, moe::overflow::batch_prioritised}) {
    if (moe_test::has_thread_sanitizer && calls++ % 7 != 0) continue;
    moe::table_rules rules = c.rules;
    rules.when_full = when_full;
    int const P = c.map.P == 0 ? c.routing.E : c.map.P;
    exact_table found(c.shape, pairs, c.routing.E, P);
    executor const exec;
    moe::buffer const scratch(moe::build_table_scratch(exec, c.shape));
    moe::build_table(exec, c.routing, rules, c.map, scratch, found.table);
    auto const all = [](std::vector<std::int32_t> const& v, std::int32_t value) {
      return std::all_of(v.begin(), v.end(), [&](std::int32_t x) { return x == value; });
    };
    for (std::int64_t i = 0; i < pairs; ++i)
      CHECK(found.row_of[static_cast<std::size_t>(i)] == (i < refused ? -1 : 12345));
    CHECK(all(found.pair_of, -1));
    CHECK(all(found.begin, 0));
    CHECK(all(found.used, 0));
    CHECK(all(found.wanted, 0));
    CHECK(found.counts[0] == moe::table_counts{.refused = refused});
  }
}

}  // namespace

TEST_CASE("emulator/build_table: token_begin that does not rise as it has to refuses all pairs") {
  for (int const T : {30, 200})
    for (moe::layout const rows : {moe::layout::packed, moe::layout::padded}) {
      drawn_case c(T, 2, 5, {.rows = rows, .cap = moe::capacity::fixed(7)});
      auto& begin = c.token_begin;
      auto const set = [&](int t, std::int32_t value) {
        begin.clear();
        for (int i = 0; i <= T; ++i) begin.push_back(2 * i);
        begin[static_cast<std::size_t>(t)] = value;
        c.routing.token_begin = begin.data();
      };
      if (moe_test::has_thread_sanitizer && (T == 30) == (rows == moe::layout::packed)) continue;
      std::int32_t const wrong[] = {-5, 2 * T, 2147483647, -2147483647};
      for (std::int32_t const value : wrong) {
        set(T / 2, value);
        check_refused(c, 2 * T, 2 * T);
      }
      set(0, 1);
      check_refused(c, 2 * T, 2 * T);
      set(T, 2 * T + 1);  // all but the last one could be right
      check_refused(c, 2 * T, 2 * T);
      set(T, -1);
      check_refused(c, 2 * T, 0);
      set(T, 7);
      check_refused(c, 2 * T, 7);
    }
}

TEST_CASE("emulator/build_table: an expert map that is not one refuses all pairs") {
  using ids = std::vector<std::int32_t>;
  for (int const T : {30, 200}) {
    auto const refused = [&](ids const& begin, ids const& physical, int kind_of_2 = 0) {
      drawn_case c(T, 2, 3, {.rows = moe::layout::padded, .cap = moe::capacity::fixed(7)});
      c.physical_begin = begin;
      c.physical = physical;
      c.kind.assign(3, moe::expert_kind::computed);
      c.kind[2] = static_cast<moe::expert_kind>(kind_of_2);
      c.map = {.physical_begin = c.physical_begin.data(),
               .physical = c.physical.data(),
               .P = 4,
               .kind = c.kind.data()};
      c.shape.P = 4;
      c.shape.max_rows = moe::max_rows(c.rules, c.shape);
      check_refused(c, 2 * T, 2 * T);
    };
    refused({0, 1, 2, 4}, {0, 1, 2, 0});   // one id twice
    refused({0, 1, 2, 4}, {0, 1, 2, 4});   // no id
    refused({0, 1, 2, 4}, {0, 1, -1, 3});  // no id
    refused({0, 1, 2, 2}, {0, 1, 2, 3});   // none for expert 2
    refused({1, 2, 3, 4}, {0, 1, 2, 3});   // does not start at 0
    refused({0, 2, 1, 4}, {0, 1, 2, 3});   // falls
    refused({0, 1, 2, 5}, {0, 1, 2, 3});   // beyond P
    refused({0, -9, 2147483647, 4}, {0, 1, 2, 3});
    refused({0, 1, 2, -2147483647}, {0, 1, 2, 3}, 1);
  }
  // Without rows, an expert needs no physical one.
  drawn_case c(30, 2, 3);
  c.physical_begin = {0, 1, 2, 2};
  c.physical = {1, 0};
  c.kind = {moe::expert_kind::computed, moe::expert_kind::computed, moe::expert_kind::zero};
  c.map = {.physical_begin = c.physical_begin.data(),
           .physical = c.physical.data(),
           .P = 2,
           .kind = c.kind.data()};
  check(executor(), c);
}

TEST_CASE("emulator/build_table: what the host can see is refused as on the CPU") {
  executor const exec;
  drawn_case c(10, 2, 4, {.cap = moe::capacity::fixed(2), .when_full = moe::overflow::score});
  exact_table t(c.shape, 20, 4, 4);
  moe::buffer const scratch(moe::build_table_scratch(exec, c.shape));
  auto const text = [&](auto const& change) {
    moe::routing in = c.routing;
    moe::table_rules rules = c.rules;
    moe::memory room = scratch;
    moe::routing_table table = t.table;
    change(in, rules, room, table);
    return moe_test::refusal([&] { moe::build_table(exec, in, rules, room, table); });
  };
  using moe_test::says;
  says(text([](auto& in, auto&, auto&, auto&) { in.K = 17; }),
       "build_table: K <= 16 on a GPU; got K = 17");
  says(text([](auto& in, auto&, auto&, auto&) { in.T = 11; }), "room for T = 10");
  says(text([](auto& in, auto&, auto&, auto&) { in.expert = nullptr; }), "expert and all arrays");
  says(text([](auto& in, auto&, auto&, auto&) { in.weight = nullptr; }), "score or weight");
  says(text([](auto&, auto& rules, auto&, auto&) { rules.align = 0; }), "align = 0");
  says(text([](auto&, auto&, auto&, auto& table) { table.pair_of = nullptr; }), "all arrays");
  says(text([](auto&, auto&, auto& room, auto&) { room = moe::memory(room.data(), 100); }),
       "build_table: scratch of build_table_scratch");
  says(text([](auto&, auto&, auto&, auto&) {}), "nothing was thrown");
}
