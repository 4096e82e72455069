// SPDX-License-Identifier: MIT
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <string>
#include <support/disturbed.hpp>
#include <support/exchanged_rows.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/coordinated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>

namespace {

using moe::exchange_plan;
using moe::exchange_status;
using moe::outcome;
using moe::topology;
using moe_test::append_rows;
using moe_test::at;
using moe_test::counts;
using moe_test::exchange_both_ways;
using moe_test::exchange_coordinated;
using moe_test::late;
using moe_test::M;
using moe_test::random_counts;
using moe_test::skew;
using namespace std::chrono_literals;
using disturbed = moe_test::disturbed<moe::thread_communicator>;

std::vector<exchange_plan> plans_of(int strategy, topology const& ranks) {
  switch (strategy) {
    case 0:
      return moe::make_plans(moe::flat{}, ranks);
    case 1:
      return moe::make_plans(moe::two_hop{}, ranks);
    case 2:
      return moe::make_plans(moe::two_hop{moe::first_hop::intra}, ranks);
    default:
      return moe::make_plans(moe::leader{}, ranks);
  }
}
constexpr int strategies = 4;

template <class F>
std::vector<char> on_ranks(int R, F const& f) {
  std::vector<char> right(at(R));
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) { right[at(comm.rank())] = f(comm); });
  return right;
}

}  // namespace

TEST_CASE(
    "comm/rank_exchange: 1 to 16 ranks, every strategy, any counts: rows as a direct exchange") {
  unsigned seed = 0;
  for (int R = 1; R <= 16; ++R) {
    // Nodes of 3, the last one smaller; R of 7 and 11 leave a node of 1, or of 2.
    topology const ranks = topology::even(1, R).grouped(3);
    for (int strategy = 0; strategy < strategies; ++strategy) {
      CAPTURE(R);
      CAPTURE(strategy);
      auto const plans = plans_of(strategy, ranks);
      counts const n = random_counts(R, static_cast<skew>(seed % 4), seed);
      ++seed;
      if (strategy == R % strategies) ++seed;  // each strategy meets each skew
      auto const right = on_ranks(R, [&](moe::thread_communicator& comm) {
        return exchange_both_ways(comm, plans[at(comm.rank())], n);
      });
      CHECK(right == std::vector<char>(at(R), true));
    }
  }
}

TEST_CASE("comm/rank_exchange: delays and reorderings change nothing") {
  for (unsigned seed = 0; seed < 12; ++seed) {
    topology const ranks = topology::of_nodes(std::vector{2, 3, 1});
    auto const plans = plans_of(static_cast<int>(seed) % strategies, ranks);
    counts const n = random_counts(6, seed % 2 == 0 ? skew::none : skew::zeros, seed);
    auto const right = on_ranks(6, [&](moe::thread_communicator& inner) {
      disturbed comm(inner, 100 * seed + static_cast<unsigned>(inner.rank()) + 1);
      return exchange_both_ways(comm, plans[at(comm.rank())], n);
    });
    CHECK(right == std::vector<char>(6, true));
  }
}

TEST_CASE("comm/rank_exchange: three hops in a grid") {
  auto const plans = moe::make_plans(moe::grid<3>{{2, 3, 2}}, topology::even(6, 2));
  counts const n = random_counts(12, skew::zeros, 99);
  auto const right = on_ranks(12, [&](moe::thread_communicator& comm) {
    return exchange_both_ways(comm, plans[at(comm.rank())], n);
  });
  CHECK(right == std::vector<char>(12, true));
}

TEST_CASE("comm/rank_exchange: one rank by itself") {
  moe::self_communicator comm;
  for (int strategy = 0; strategy < strategies; ++strategy)
    CHECK(exchange_both_ways(comm, plans_of(strategy, topology::even(1, 1))[0], {{5}}));
}

TEST_CASE("comm/rank_exchange: the survivors exchange without the dead") {
  topology const ranks = topology::even(2, 3).surviving({.epoch = 4, .alive = {1, 1, 0, 0, 1, 1}});
  for (int strategy = 0; strategy < strategies; ++strategy) {
    auto const plans = plans_of(strategy, ranks);
    auto const right = on_ranks(6, [&](moe::thread_communicator& comm) {
      int const i = ranks.index_of(comm.rank());
      if (i < 0) return true;
      moe::bound_plan sizes(plans[at(i)]);
      moe::rank_exchange exchange(comm);
      std::vector<std::int64_t> const ones(4, 1);
      if (!exchange.bind(sizes, ones, late()) || sizes.output_rows() != 4) return false;
      std::vector<float> rows, expected, out(4 * M);
      for (int j = 0; j < 4; ++j) {
        append_rows(rows, i, j, 1);
        append_rows(expected, j, i, 1);
      }
      return exchange.run<float>(sizes, {rows, 4, M}, {out, 4, M}, late()) && out == expected;
    });
    CHECK(right == std::vector<char>(6, true));
  }
}

TEST_CASE(
    "comm/rank_exchange: all rows at all ranks, and their sums back, bitwise the same each time") {
  constexpr int R = 5;
  topology const ranks = topology::even(1, R);
  auto const run = [&](auto zero) {
    using T = decltype(zero);
    std::vector<std::vector<T>> sums(R);
    auto const right = on_ranks(R, [&](moe::thread_communicator& inner) {
      disturbed comm(inner, static_cast<unsigned>(inner.rank()) + 7);
      int const r = comm.rank();
      auto const plan = moe::make_sharded_plan(ranks, r);
      auto const back_plan = transpose(plan);
      moe::bound_plan there(plan), back(back_plan);
      moe::rank_exchange exchange(comm);
      std::array<std::int64_t, 1> const mine{r};  // rank r has r rows
      if (!exchange.bind(there, mine, late()) || there.output_rows() != 0 + 1 + 2 + 3 + 4)
        return false;
      back.bind_back(there);
      if (back.input_rows() != 10 || back.output_rows() != r) return false;
      std::vector<T> rows, all(10 * M), sum(at(r * M));
      for (int i = 0; i < r * M; ++i)
        rows.push_back(static_cast<T>(1.f + 0.1f * static_cast<float>(r * 20 + i)));
      if (!exchange.template run<T>(there, {rows, r, M}, {all, 10, M}, late())) return false;
      bool right_rows = true;
      int row = 0;
      for (int s = 0; s < R; ++s)
        for (int i = 0; i < s * M; ++i)
          right_rows =
              right_rows &&
              static_cast<float>(all[at(row++)]) ==
                  static_cast<float>(static_cast<T>(1.f + 0.1f * static_cast<float>(s * 20 + i)));
      // Each rank gives back (rank + 1) times what it got.
      for (T& x : all) x = static_cast<T>(static_cast<float>(r + 1) * static_cast<float>(x));
      if (!exchange.template run<T>(back, {all, 10, M}, {sum, r, M}, late())) return false;
      for (int i = 0; i < r * M; ++i) {
        float const x = static_cast<float>(rows[at(i)]);
        float const error = static_cast<float>(sum[at(i)]) - 15 * x;
        right_rows = right_rows && error < x / 4 && error > -x / 4;
      }
      sums[at(r)] = sum;
      return right_rows;
    });
    CHECK(right == std::vector<char>(R, true));
    return sums;
  };
  CHECK(run(0.f) == run(0.f));
  CHECK(run(0.) == run(0.));
  auto const a = run(moe::bf16{}), b = run(moe::bf16{});
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < r * M; ++i)
      CHECK(static_cast<float>(a[at(r)][at(i)]) == static_cast<float>(b[at(r)][at(i)]));
}

TEST_CASE("comm/rank_exchange: coordinated groups hold the same rows before and after") {
  constexpr int R = 6, L = 2;
  topology const ranks = topology::even(R / L, L);
  for (auto const form : {moe::shared_by::expert, moe::shared_by::expert_slice}) {
    auto const right = on_ranks(R, [&](moe::thread_communicator& comm) {
      return exchange_coordinated(comm, ranks, L, form);
    });
    CHECK(right == std::vector<char>(R, true));
  }
}

TEST_CASE("comm/rank_exchange: every expert of a rank has counts of its own") {
  constexpr int R = 5, experts = 3;
  auto const plans = plans_of(1, topology::of_nodes(std::vector{2, 3}));
  auto const n = [](int s, int d, int e) { return (s + 2 * d + 3 * e) % 4; };
  auto const right = on_ranks(R, [&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    exchange_plan const plan = split_slots(plans[at(r)], experts);
    moe::bound_plan sizes(plan);
    moe::rank_exchange exchange(comm);
    std::vector<std::int64_t> sent, received;
    std::vector<float> rows, expected;
    for (int i = 0; i < R; ++i)
      for (int e = 0; e < experts; ++e) {
        sent.push_back(n(r, i, e));
        received.push_back(n(i, r, e));
        for (int j = 0; j < n(r, i, e); ++j) rows.push_back(float(100 * r + 10 * i + e));
        for (int j = 0; j < n(i, r, e); ++j) expected.push_back(float(100 * i + 10 * r + e));
      }
    if (!exchange.bind(sizes, sent, late())) return false;
    auto const counts = sizes.output_counts();
    std::vector<float> out(expected.size());
    return std::vector<std::int64_t>(counts.begin(), counts.end()) == received &&
           exchange.run<float>(sizes, {rows, sizes.input_rows(), 1}, {out, sizes.output_rows(), 1},
                               late()) &&
           out == expected;
  });
  CHECK(right == std::vector<char>(R, true));
}

TEST_CASE("comm/rank_exchange: fixed sizes need no counts, and other executors may run meanwhile") {
  constexpr int R = 4, C = 2;
  // Ranks come to the second phases of two exchanges in any order: then each needs a communicator.
  for (int const strategy : {0, 1}) {
    auto const plans = plans_of(strategy, topology::even(2, 2));
    auto const right = on_ranks(R, [&](moe::thread_communicator& comm) {
      int const r = comm.rank();
      moe::thread_communicator second;
      if (!comm.split(0, 0, late(), second)) return false;
      moe::bound_plan sizes(plans[at(r)]);
      sizes.bind_equal(C);
      moe::rank_exchange a(comm), b(strategy == 0 ? comm : second);
      std::vector<float> rows, others, expected, out_a(R * C * M), out_b(R * C * M);
      for (int i = 0; i < R; ++i) {
        append_rows(rows, r, i, C);
        append_rows(expected, i, r, C);
      }
      for (float const x : rows) others.push_back(-x);
      // Two under way, begun in the same order everywhere and ended in the other one.
      if (!a.begin<float>(sizes, {rows, R * C, M}, {out_a, R * C, M})) return false;
      if (!b.begin<float>(sizes, {others, R * C, M}, {out_b, R * C, M})) return false;
      for (int i = 0; i < 100000; ++i) {
        outcome const done_b = b.poll(), done_a = a.poll();
        if (done_a && done_b) break;
        std::this_thread::yield();
      }
      bool same = b.finish(late()) && a.finish(late()) && out_a == expected;
      for (std::size_t i = 0; i < expected.size(); ++i) same = same && out_b[i] == -expected[i];
      return same;
    });
    CHECK(right == std::vector<char>(R, true));
  }
}

TEST_CASE(
    "comm/rank_exchange: a rank dies in any phase: outcomes that name a peer, no wrong rows") {
  topology const ranks = topology::even(2, 2);
  constexpr int R = 4;
  for (int strategy = 0; strategy < strategies; ++strategy) {
    auto const plans = plans_of(strategy, ranks);
    int const phases = static_cast<int>(plans[0].phases.size());
    for (int victim = 0; victim < R; ++victim)
      for (int lives = 0; lives < 2 * phases; ++lives)  // the counts' phases and the rows'
        for (bool const sends : {false, true}) {
          CAPTURE(strategy);
          CAPTURE(victim);
          CAPTURE(lives);
          std::vector<outcome> ends(R), later(R);
          std::vector<char> right_rows(R, true);
          auto const start = std::chrono::steady_clock::now();
          moe::thread_world world(R);
          CHECK_THROWS_AS(world.run([&](moe::thread_communicator& inner) {
            int const r = inner.rank();
            disturbed comm(inner, static_cast<unsigned>(r) + 1, r == victim ? lives : 1 << 30,
                           sends);
            moe::bound_plan sizes(plans[at(r)]);
            moe::rank_exchange exchange(comm);
            std::vector<std::int64_t> const ones(R, 1);
            std::vector<float> rows, expected, out(R * M);
            for (int i = 0; i < R; ++i) {
              append_rows(rows, r, i, 1);
              append_rows(expected, i, r, 1);
            }
            outcome end = exchange.bind(sizes, ones, late());
            if (end) end = exchange.run<float>(sizes, {rows, R, M}, {out, R, M}, late());
            ends[at(r)] = end;
            right_rows[at(r)] = !end || out == expected;
            if (!end) later[at(r)] = exchange.bind(sizes, ones, late());
          }),
                          moe_test::rank_died);
          CHECK(std::chrono::steady_clock::now() - start < 20s);
          bool somebody_noticed = false;
          for (int r = 0; r < R; ++r) {
            if (r == victim) continue;
            CHECK(right_rows[at(r)]);
            if (ends[at(r)]) continue;
            somebody_noticed = true;
            CHECK(ends[at(r)].status == exchange_status::peer_failed);
            CHECK(ends[at(r)].peer >= 0);
            CHECK(ends[at(r)].peer != r);
            CHECK(later[at(r)].status == exchange_status::aborted);
          }
          // In a flat exchange everybody waits for the dead itself, unless it has sent all it had to.
          if (strategy == 0 && !(sends && lives == 2 * phases - 1)) {
            CHECK(somebody_noticed);
          }
        }
  }
}

TEST_CASE("comm/rank_exchange: a peer that does nothing: a timeout that names it, in time") {
  constexpr int R = 3;
  auto const plans = plans_of(0, topology::even(1, R));
  std::vector<outcome> ends(R);
  std::atomic<int> ended{0};
  auto const start = std::chrono::steady_clock::now();
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    while (r == 2 && ended < 2) std::this_thread::sleep_for(1ms);
    if (r == 2) return;
    moe::bound_plan sizes(plans[at(r)]);
    moe::rank_exchange exchange(comm);
    ends[at(r)] = exchange.bind(sizes, std::vector<std::int64_t>(R, 1), moe::within(200ms));
    ++ended;
  });
  CHECK(std::chrono::steady_clock::now() - start < 20s);
  outcome const timeout{exchange_status::timeout, 2};
  for (int r = 0; r < 2; ++r) {  // or the other one has given up before it met this one
    bool const either =
        ends[at(r)] == timeout || ends[at(r)] == outcome{exchange_status::peer_failed, 1 - r};
    CHECK(either);
  }
  bool const any = ends[0] == timeout || ends[1] == timeout;
  CHECK(any);
}

TEST_CASE("comm/rank_exchange: plans of another epoch are refused") {
  constexpr int R = 3;
  auto plans = plans_of(0, topology::even(1, R));
  plans[1].epoch = 5;
  std::vector<outcome> ends(R);
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    moe::bound_plan sizes(plans[at(comm.rank())]);
    moe::rank_exchange exchange(comm);
    ends[at(comm.rank())] = exchange.bind(sizes, std::vector<std::int64_t>(R, 1), late());
  });
  CHECK(ends[0] == outcome{exchange_status::stale, 1});
  CHECK(ends[1].status == exchange_status::stale);
  CHECK(ends[2] == outcome{exchange_status::stale, 1});
}

TEST_CASE("comm/rank_exchange: ranks that disagree about fixed sizes") {
  constexpr int R = 2;
  auto const plans = plans_of(0, topology::even(1, R));
  std::vector<outcome> ends(R);
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    moe::bound_plan sizes(plans[at(r)]);
    moe::rank_exchange exchange(comm);
    sizes.bind_equal(1 + r);
    std::vector<float> in(at(R * (1 + r))), out(in.size());
    ends[at(r)] = exchange.run<float>(sizes, {in, R * (1 + r), 1}, {out, R * (1 + r), 1}, late());
  });
  for (int r = 0; r < R; ++r) {
    bool const either = ends[at(r)].status == exchange_status::wrong_length ||
                        ends[at(r)].status == exchange_status::peer_failed;
    CHECK(either);
    CHECK(ends[at(r)].peer == 1 - r);
  }
}

TEST_CASE("comm/rank_exchange: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  moe::self_communicator comm;
  auto const plan = moe::make_plan(moe::flat{}, topology::even(1, 1), 0);
  auto const other = moe::make_plan(moe::flat{}, topology::even(1, 2), 1);
  says(refusal([&] {
         moe::bound_plan of_other(other);
         of_other.bind_equal(1);
         moe::rank_exchange one(comm);
         (void)one.run<float>(of_other, {}, {}, late());
       }),
       "rank_exchange: the plan is of the communicator's rank; got plan.rank = 1");
  moe::bound_plan sizes(plan);
  moe::rank_exchange exchange(comm);
  std::vector<float> in(6), out(6);
  says(refusal([&] { (void)exchange.run<float>(sizes, {in, 2, 3}, {out, 2, 3}, late()); }),
       "rank_exchange::begin: bound to counts");
  says(refusal([&] { (void)exchange.bind(sizes, std::vector<std::int64_t>{1, 2}, late()); }),
       "bind: one count for each input slot; got counts = 2, input slots = 1");
  says(refusal([&] { (void)exchange.bind(sizes, std::vector<std::int64_t>{-1}, late()); }),
       "bind: counts >= 0; got count = -1");
  says(refusal([&] { sizes.bind_equal(-1); }),
       "bound_plan::bind_equal: there is a plan, rows >= 0");
  sizes.bind_equal(2);
  says(refusal([&] { (void)exchange.run<float>(sizes, {in, 1, 3}, {out, 2, 3}, late()); }),
       "rank_exchange::begin: in is [input_rows(), M]");
  says(refusal([&] { (void)exchange.run<float>(sizes, {in, 2, 3}, {out, 1, 3}, late()); }),
       "got in.rows() = 2, input_rows() = 2, out.rows() = 1, output_rows() = 2");
  says(refusal([&] { (void)exchange.run<float>(sizes, {in, 2, 3}, {in, 2, 3}, late()); }),
       "contiguous rows, in and out apart");
  says(
      refusal([&] { (void)exchange.run<float>(sizes, {in, 2, 2}, {out.data(), 2, 2, 3}, late()); }),
      "contiguous rows, in and out apart");
  auto const sharded = moe::make_sharded_plan(topology::even(1, 1), 0);
  moe::bound_plan unrelated(sharded);
  says(refusal([&] { unrelated.bind_back(sizes); }),
       "bound_plan::bind_back: the other is bound, and its plan the transposed one");
}
