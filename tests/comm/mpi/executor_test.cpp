// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <numeric>
#include <support/disturbed.hpp>
#include <support/exchanged_rows.hpp>
#include <support/over_ranks.hpp>
#include <thread>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/bound_plan.hpp>
#include <moe/comm/coordinated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/hierarchical_all_to_all.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/mpi.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>

#include "by_hand.hpp"
#include "counted_calls.hpp"
#include "ranks.hpp"

namespace {

using moe::exchange_plan;
using moe::exchange_status;
using moe::outcome;
using moe::topology;
using moe_test::all_ranks;
using moe_test::append_rows;
using moe_test::at;
using moe_test::calls;
using moe_test::counts;
using moe_test::exchange_both_ways;
using moe_test::exchange_coordinated;
using moe_test::late;
using moe_test::M;
using moe_test::on_all;
using moe_test::random_counts;
using moe_test::skew;
using moe_test::sum_over_ranks;
using namespace std::chrono_literals;

constexpr int strategies = 4;
exchange_plan plan_of(int strategy, topology const& ranks, int rank) {
  switch (strategy) {
    case 0:
      return moe::make_plan(moe::flat{}, ranks, rank);
    case 1:
      return moe::make_plan(moe::two_hop{}, ranks, rank);
    case 2:
      return moe::make_plan(moe::two_hop{moe::first_hop::intra}, ranks, rank);
    default:
      return moe::make_plan(moe::leader{}, ranks, rank);
  }
}

/// Rows that a run of a bound plan copies.
std::int64_t rows_copied(moe::bound_plan const& sizes) {
  std::int64_t sum = 0;
  auto const add = [&](std::vector<moe::row_move> const& moves) {
    for (moe::row_move const& m : moves)
      sum += sizes.rows_before(m.from, m.count) - sizes.rows_before(m.from);
  };
  for (moe::exchange_phase const& phase : sizes.plan().phases) add(phase.moves);
  add(sizes.plan().last);
  return sum;
}

}  // namespace

TEST_CASE("comm/mpi: every strategy and its transpose, any counts, whole messages and pieces") {
  moe::mpi_communicator whole = all_ranks(), pieces = all_ranks(5);
  int const R = whole.size();
  unsigned seed = 0;
  for (moe::mpi_communicator* comm : {&whole, &pieces})
    for (topology const& ranks : {topology::even(2, R / 2), topology::even(R / 2, 2),
                                  topology::of_nodes(std::vector{1, R - 1})})
      for (int strategy = 0; strategy < strategies; ++strategy)
        for (skew const kind : {skew::none, skew::zeros, skew::one_hot, skew::nothing}) {
          CAPTURE(strategy);
          CAPTURE(seed);
          counts const n = random_counts(R, kind, ++seed);
          exchange_plan const plan = plan_of(strategy, ranks, comm->rank());
          CHECK(on_all(exchange_both_ways(*comm, plan, n)));
        }
  auto const grid =
      moe::make_plan(moe::grid<2>{{R / 2, 2}}, topology::even(R / 2, 2), whole.rank());
  CHECK(on_all(exchange_both_ways(whole, grid, random_counts(R, skew::zeros, 77))));
  moe_test::disturbed late_one(whole, static_cast<unsigned>(whole.rank()) + 5);
  auto const leader = plan_of(3, topology::even(2, R / 2), whole.rank());
  CHECK(on_all(exchange_both_ways(late_one, leader, random_counts(R, skew::none, 78))));
}

TEST_CASE("comm/mpi: coordinated groups, both forms") {
  moe::mpi_communicator comm = all_ranks();
  topology const ranks = topology::even(comm.size() / 2, 2);
  for (auto const form : {moe::shared_by::expert, moe::shared_by::expert_slice})
    CHECK(on_all(exchange_coordinated(comm, ranks, 2, form)));
}

TEST_CASE("comm/mpi: all rows at all ranks, and their sums back") {
  moe::mpi_communicator comm = all_ranks();
  int const R = comm.size(), r = comm.rank(), all = R * (R - 1) / 2;
  auto const plan = moe::make_sharded_plan(topology::even(1, R), r);
  auto const back_plan = transpose(plan);
  moe::bound_plan there(plan), back(back_plan);
  moe::rank_exchange exchange(comm);
  std::vector<float> rows, expected, got(at(all * M)), sum(at(r * M)), expected_sum;
  append_rows(rows, r, 0, r);  // rank r has r rows
  for (int s = 0; s < R; ++s) append_rows(expected, s, 0, s);
  std::vector<std::int64_t> const mine{r};
  bool right = exchange.bind(there, mine, late()) && there.output_rows() == all;
  right = right && exchange.run<float>(there, {rows, r, M}, {got, all, M}, late());
  right = right && got == expected;
  for (float& x : got) x *= static_cast<float>(r + 1);
  for (float const x : rows) expected_sum.push_back(x * static_cast<float>(R * (R + 1) / 2));
  if (right) back.bind_back(there);
  right = right && exchange.run<float>(back, {got, all, M}, {sum, r, M}, late());
  CHECK(on_all(right && sum == expected_sum));
}

TEST_CASE("comm/mpi: functions without plans") {
  moe::mpi_communicator comm = all_ranks();
  int const R = comm.size(), r = comm.rank();
  counts const n = random_counts(R, skew::zeros, 5);
  std::vector<std::int64_t> received(at(R)), expected_counts;
  std::vector<float> rows, expected;
  for (int i = 0; i < R; ++i) {
    append_rows(rows, r, i, n[at(r)][at(i)]);
    append_rows(expected, i, r, n[at(i)][at(r)]);
    expected_counts.push_back(n[at(i)][at(r)]);
  }
  bool right = static_cast<bool>(moe::all_to_all<std::int64_t>(comm, n[at(r)], received, late()));
  CHECK(on_all(right && received == expected_counts));
  std::vector<float> out(expected.size());
  auto const N = [](std::vector<float> const& x) {
    return static_cast<std::int64_t>(x.size()) / M;
  };
  right = static_cast<bool>(moe::all_to_all_v<float>(comm, {rows.data(), N(rows), M}, n[at(r)],
                                                     {out.data(), N(out), M}, received, late()));
  CHECK(on_all(right && out == expected));

  // Twice all there is of a block: the blocks of hierarchical_all_to_all are the same for all.
  std::vector<int> in(at(2 * R)), blocks(at(2 * R)), expected_blocks;
  std::iota(in.begin(), in.end(), 100 * r);
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < 2; ++k) expected_blocks.push_back(100 * i + 2 * r + k);
  for (topology const& ranks : {topology::even(2, R / 2), topology::even(R / 2, 2)}) {
    right = moe::hierarchical_all_to_all<int>(comm, ranks, in, blocks, late()) &&
            blocks == expected_blocks;
    CHECK(on_all(right));
    right = moe::hierarchical_all_to_all<int>(comm, ranks, in, blocks, late(), moe::leader{}) &&
            blocks == expected_blocks;
    CHECK(on_all(right));
  }
}

TEST_CASE("comm/mpi: two exchanges under way, ended in the other order") {
  constexpr int C = 2;
  // Ranks come to the second phases of two exchanges in any order: then each needs a communicator.
  for (int const strategy : {0, 1}) {
    moe::mpi_communicator one = all_ranks(), two = all_ranks();
    int const R = one.size(), r = one.rank();
    exchange_plan const plan = plan_of(strategy, topology::even(2, R / 2), r);
    moe::bound_plan sizes(plan);
    sizes.bind_equal(C);
    moe::rank_exchange a(one), b(strategy == 0 ? one : two);
    std::vector<float> rows, other, expected, out_a(at(R * C * M)), out_b(at(R * C * M));
    for (int i = 0; i < R; ++i) {
      append_rows(rows, r, i, C);
      append_rows(expected, i, r, C);
    }
    for (float const x : rows) other.push_back(-x);
    bool right = static_cast<bool>(a.begin<float>(sizes, {rows, R * C, M}, {out_a, R * C, M}));
    right = b.begin<float>(sizes, {other, R * C, M}, {out_b, R * C, M}) && right;
    auto const until = late();
    while (!until.passed()) {
      outcome const done_b = b.poll(), done_a = a.poll();
      if (done_a && done_b) break;
      std::this_thread::yield();
    }
    right = b.finish(late()) && a.finish(late()) && right && out_a == expected;
    for (std::size_t i = 0; i < expected.size(); ++i) right = right && out_b[i] == -expected[i];
    CHECK(on_all(right));
  }
}

TEST_CASE("comm/mpi: no more calls and no more copies than by hand, and no allocations") {
  moe::mpi_communicator comm = all_ranks();
  int const R = comm.size(), r = comm.rank();
  unsigned seed = 300;
  for (int const G : {2, R / 2})
    for (int strategy = 0; strategy < 3; ++strategy)
      for (skew const kind : {skew::none, skew::zeros, skew::one_hot}) {
        CAPTURE(G);
        CAPTURE(strategy);
        CAPTURE(seed);
        counts const n = random_counts(R, kind, ++seed);
        std::vector<float> rows, expected;
        for (int i = 0; i < R; ++i) {
          append_rows(rows, r, i, n[at(r)][at(i)]);
          append_rows(expected, i, r, n[at(i)][at(r)]);
        }
        std::vector<float> by_hand(expected.size()), out(expected.size());
        moe_test::exchange_by_hand hand(n, r, G, rows.data(), by_hand.data());
        auto before = calls;
        strategy == 0 ? hand.flat() : strategy == 1 ? hand.inter_first() : hand.intra_first();
        auto const sends_by_hand = sum_over_ranks(calls.sends - before.sends);
        auto const receives_by_hand = sum_over_ranks(calls.receives - before.receives);
        CHECK(on_all(by_hand == expected));

        exchange_plan const plan = plan_of(strategy, topology::even(R / G, G), r);
        moe::bound_plan sizes(plan);
        moe::rank_exchange exchange(comm);
        bool right = static_cast<bool>(exchange.bind(sizes, n[at(r)], late()));
        moe::matrix_view<float const> const in(rows.data(), sizes.input_rows(), M);
        moe::matrix_view<float> const to(out.data(), sizes.output_rows(), M);
        right = exchange.run<float>(sizes, in, to, late()) && right;
        before = calls;
        right = exchange.run<float>(sizes, in, to, late()) && right;
        auto const allocations = calls.allocations - before.allocations;
        auto const sends = sum_over_ranks(calls.sends - before.sends);
        auto const receives = sum_over_ranks(calls.receives - before.receives);
        CHECK(on_all(right && out == expected));
        CHECK(sends > 0);
        CHECK(sends <= sends_by_hand);
        CHECK(receives <= receives_by_hand);
        CHECK(receives == sends);
        CHECK(sum_over_ranks(rows_copied(sizes)) <= sum_over_ranks(hand.rows_copied()));
        CHECK(on_all(allocations == 0));
      }
}

TEST_CASE("comm/mpi: a rank aborts in any phase: outcomes that name a peer, no wrong rows") {
  int R = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &R);
  for (int strategy = 0; strategy < strategies; ++strategy)
    for (int const victim : {0, R - 1})
      for (int lives = 0;; ++lives) {  // the counts' phases and the rows'
        bool ends_here = false;
        for (bool const sends : {false, true}) {
          CAPTURE(strategy);
          CAPTURE(victim);
          CAPTURE(lives);
          CAPTURE(sends);
          moe::mpi_communicator inner = all_ranks();
          int const r = inner.rank();
          exchange_plan const plan = plan_of(strategy, topology::even(2, R / 2), r);
          int const phases = static_cast<int>(plan.phases.size());
          ends_here = lives + 1 == 2 * phases;
          moe_test::disturbed comm(inner, static_cast<unsigned>(r) + 1,
                                   r == victim ? lives : 1 << 30, sends);
          std::vector<float> rows, expected, out(at(R * M));
          for (int i = 0; i < R; ++i) {
            append_rows(rows, r, i, 1);
            append_rows(expected, i, r, 1);
          }
          outcome end, later;
          auto const start = std::chrono::steady_clock::now();
          {
            moe::bound_plan sizes(plan);
            moe::rank_exchange exchange(comm);
            std::vector<std::int64_t> const ones(at(R), 1);
            try {
              end = exchange.bind(sizes, ones, late());
              if (end) end = exchange.run<float>(sizes, {rows, R, M}, {out, R, M}, late());
              if (!end) later = exchange.bind(sizes, ones, late());
            } catch (moe_test::rank_died const&) {
              comm.abort();
              end = {exchange_status::aborted, r};
            }
          }
          CHECK(std::chrono::steady_clock::now() - start < 20s);
          if (r == victim) {
            CHECK(end.status == exchange_status::aborted);
          } else if (end) {
            CHECK(out == expected);
          } else {
            CHECK(end.status == exchange_status::peer_failed);
            CHECK(end.peer >= 0);
            CHECK(end.peer != r);
            CHECK(later.status == exchange_status::aborted);
          }
          bool const nobody_noticed = on_all(r == victim || static_cast<bool>(end));
          // In a flat exchange everybody waits for it, unless it has sent all it had to.
          if (strategy == 0 && !(sends && lives == 2 * phases - 1)) CHECK(!nobody_noticed);
        }
        if (ends_here) break;
      }
}

TEST_CASE("comm/mpi: a rank goes silent: every other one ends in time, with an outcome") {
  for (int strategy = 0; strategy < strategies; ++strategy)
    for (bool const after_bind : {false, true}) {
      CAPTURE(strategy);
      CAPTURE(after_bind);
      moe::mpi_communicator comm = all_ranks();
      int const R = comm.size(), r = comm.rank(), silent = R - 1;
      exchange_plan const plan = plan_of(strategy, topology::even(2, R / 2), r);
      moe::bound_plan sizes(plan);
      moe::rank_exchange exchange(comm);
      std::vector<float> rows(at(R * M)), out(at(R * M));
      outcome end;
      if (after_bind) end = exchange.bind(sizes, std::vector<std::int64_t>(at(R), 1), late());
      CHECK(on_all(static_cast<bool>(end)));
      auto const start = std::chrono::steady_clock::now();
      if (r != silent && after_bind)
        end = exchange.run<float>(sizes, {rows, R, M}, {out, R, M}, moe::within(100ms));
      if (r != silent && !after_bind)
        end = exchange.bind(sizes, std::vector<std::int64_t>(at(R), 1), moe::within(100ms));
      CHECK(std::chrono::steady_clock::now() - start < 20s);
      bool const timeout = end.status == exchange_status::timeout;
      // Who needs nothing of the silent one in this strategy may have been served.
      bool const typed = end || timeout || end.status == exchange_status::peer_failed;
      CHECK(typed);
      if (!end) CHECK(end.peer >= 0);
      CHECK(on_all(typed));
      CHECK(!on_all(!timeout));
    }
}

TEST_CASE("comm/mpi: ranks that disagree about fixed sizes") {
  moe::mpi_communicator comm = all_ranks();
  int const R = comm.size(), r = comm.rank();
  exchange_plan const plan = plan_of(0, topology::even(1, R), r);
  moe::bound_plan sizes(plan);
  sizes.bind_equal(1 + r);
  std::vector<float> in(at(R * (1 + r))), out(in.size());
  moe::rank_exchange exchange(comm);
  outcome const end =
      exchange.run<float>(sizes, {in, R * (1 + r), 1}, {out, R * (1 + r), 1}, late());
  bool const either =
      end.status == exchange_status::wrong_length || end.status == exchange_status::peer_failed;
  CHECK(either);
  CHECK(end.peer >= 0);
  CHECK(end.peer != r);
  CHECK(!on_all(end.status != exchange_status::wrong_length));
}
