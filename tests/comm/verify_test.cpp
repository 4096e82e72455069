// SPDX-License-Identifier: MIT
#include <cstddef>
#include <doctest/doctest.h>
#include <random>
#include <vector>

#include <moe/comm/coordinated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/comm/verify.hpp>

namespace {

using moe::exchange_plan;
using moe::plan_error;
using moe::topology;
using plans = std::vector<exchange_plan>;

/// The verdict on plans after a change.
template <class Change>
moe::plan_verdict changed(plans p, Change const& change) {
  REQUIRE(static_cast<bool>(moe::verify_plans(p)));
  change(p);
  return moe::verify_plans(p);
}

plans flat_plans() {
  return moe::make_plans(moe::flat{}, topology::even(2, 2));
}
plans two_hop_plans() {
  return moe::make_plans(moe::two_hop{}, topology::even(2, 3));
}
plans summing_plans() {
  plans p;
  for (int r = 0; r < 3; ++r)
    p.push_back(transpose(moe::make_sharded_plan(topology::even(1, 3), r)));
  return p;
}

/// a + b into c, or a into b and then b into c: the only change that changes nothing.
bool is_same_sum(exchange_plan const& right, exchange_plan const& other) {
  int differences = 0, chained = 0;
  for (std::size_t i = 0; i < right.phases.size(); ++i) {
    auto const &a = right.phases[i].moves, &b = other.phases[i].moves;
    for (std::size_t j = 0; j < a.size(); ++j) {
      if (a[j] == b[j]) continue;
      ++differences;
      chained += a[j].action == moe::row_action::add && a[j].from == b[j].from &&
                 j + 1 < a.size() && b[j].to == a[j + 1].from && a[j + 1].to == a[j].to;
    }
  }
  return differences == 1 && chained == 1;
}

}  // namespace

TEST_CASE("comm/verify: nothing to verify is right") {
  CHECK(static_cast<bool>(moe::verify_plans({})));
  CHECK(static_cast<bool>(moe::verify_plans(plans(1))));
}

TEST_CASE("comm/verify: a row that arrives at the wrong place, or other rows in its place") {
  auto v = changed(flat_plans(), [](plans& p) { p[1].phases[0].sends[0].at.slot = 0; });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 2, 1, 1});
  v = changed(flat_plans(), [](plans& p) {
    std::swap(p[1].phases[0].receives[0].at, p[1].phases[0].receives[1].at);
  });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 1, 1, 0});
  v = changed(flat_plans(), [](plans& p) { p[3].last[0].from.slot = 2; });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 3, 1, 3});
  // The right rows of another name: only what the ends say has changed.
  v = changed(flat_plans(), [](plans& p) { std::swap(p[0].output[1], p[0].output[2]); });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 0, 1, 1});
  v = changed(flat_plans(), [](plans& p) { p[0].output[1].part = 1; });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 0, 1, 1});
}

TEST_CASE("comm/verify: a row that never arrives") {
  auto v = changed(flat_plans(), [](plans& p) { p[2].last.clear(); });
  CHECK(v == moe::plan_verdict{plan_error::unwritten, 2, 1, 2});
}

TEST_CASE("comm/verify: a message that is not received, or not sent, or comes in another phase") {
  auto v = changed(flat_plans(), [](plans& p) {
    p[0].phases[0].receives.erase(p[0].phases[0].receives.begin());
  });
  CHECK(v.error == plan_error::unmatched);
  v = changed(flat_plans(), [](plans& p) { p[1].phases[0].sends.pop_back(); });
  CHECK(v.error == plan_error::unmatched);
  v = changed(two_hop_plans(), [](plans& p) { std::swap(p[0].phases[0], p[0].phases[1]); });
  CHECK(v.error != plan_error::none);
  v = changed(flat_plans(), [](plans& p) { p[0].phases[0].sends[0].peer = 2; });
  CHECK(v.error == plan_error::unmatched);
  v = changed(flat_plans(), [](plans& p) {
    auto& sends = p[0].phases[0].sends;
    sends.push_back(sends[0]);
  });
  CHECK(v.error == plan_error::unmatched);
}

TEST_CASE("comm/verify: the last message of all is one too many") {
  auto v = changed(flat_plans(), [](plans& p) {
    auto& sends = p[2].phases[0].sends;
    REQUIRE(sends[0].peer == 3);
    sends.push_back(sends[0]);
  });
  CHECK(v == moe::plan_verdict{plan_error::unmatched, 2, 0, 3});
}

TEST_CASE("comm/verify: a message that is longer or shorter than its receive") {
  auto v = changed(two_hop_plans(), [](plans& p) { p[0].phases[0].sends.back().count -= 1; });
  CHECK(v.error == plan_error::other_count);
  v = changed(flat_plans(), [](plans& p) { p[0].phases[0].receives[0].count = 2; });
  CHECK((v.error == plan_error::other_count || v.error == plan_error::out_of_range));
}

TEST_CASE("comm/verify: reading what is not there yet") {
  auto v = changed(two_hop_plans(), [](plans& p) {  // moves of the end come first
    p[0].phases[0].moves = std::move(p[0].last);
    p[0].last.clear();
  });
  CHECK(v.error == plan_error::unwritten);
  CHECK(v.rank == 0);
  CHECK(v.phase == 0);
  v = changed(flat_plans(), [](plans& p) { p[0].phases[0].sends[0].at.buffer = 1; });
  CHECK(v.error == plan_error::unwritten);
}

TEST_CASE("comm/verify: writing twice, or into the input") {
  auto v = changed(flat_plans(), [](plans& p) { p[0].last.push_back(p[0].last[0]); });
  CHECK(v == moe::plan_verdict{plan_error::overwritten, 0, 1, 0});
  v = changed(flat_plans(), [](plans& p) { p[0].phases[0].receives[0].at.buffer = 0; });
  CHECK(v.error == plan_error::overwritten);
  v = changed(flat_plans(), [](plans& p) { p[0].last[0].to.buffer = 0; });
  CHECK(v.error == plan_error::overwritten);
  v = changed(summing_plans(),
              [](plans& p) { p[0].last.push_back({{0, 1}, {0, 1}, 1, moe::row_action::add}); });
  CHECK(v == moe::plan_verdict{plan_error::overwritten, 0, 1, 1});
  v = changed(flat_plans(),
              [](plans& p) { p[0].phases[0].receives[1].at = p[0].phases[0].receives[0].at; });
  CHECK(v.error == plan_error::overwritten);
}

TEST_CASE("comm/verify: sums that lack a term, have one twice, or mix sizes") {
  auto v = changed(summing_plans(), [](plans& p) { p[1].last.pop_back(); });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 1, 1, 0});
  v = changed(summing_plans(), [](plans& p) { p[1].last.push_back(p[1].last.back()); });
  CHECK(v == moe::plan_verdict{plan_error::wrong_rows, 1, 1, 0});
  v = changed(summing_plans(), [](plans& p) { p[1].phases[0].moves[0].from.slot = 0; });
  CHECK(v.error == plan_error::other_extent);
  v = changed(summing_plans(), [](plans& p) { p[1].last[0].action = moe::row_action::copy; });
  CHECK(v.error == plan_error::overwritten);
  v = changed(flat_plans(), [](plans& p) { p[1].last[0].action = moe::row_action::add; });
  CHECK(v.error == plan_error::unwritten);
}

TEST_CASE("comm/verify: what does not exist") {
  auto const out_of_range = [](auto const& change) {
    CHECK(changed(two_hop_plans(), change).error == plan_error::out_of_range);
  };
  out_of_range([](plans& p) { p[0].phases[0].sends[0].peer = 6; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].peer = -1; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].peer = 0; });  // itself
  out_of_range([](plans& p) { p[0].phases[0].receives[0].peer = 6; });
  out_of_range([](plans& p) { p[0].phases[0].receives[0].at.buffer = 9; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].at.buffer = -1; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].at.slot = 6; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].at.slot = -1; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].count = 0; });
  out_of_range([](plans& p) { p[0].phases[0].sends[0].count = 2147483647; });
  out_of_range([](plans& p) { p[0].last[0].count = -1; });
  out_of_range([](plans& p) { p[0].last[0].to.slot = 6; });
}

TEST_CASE("comm/verify: plans that do not belong together") {
  auto const shape = [](auto const& change) {
    CHECK(changed(two_hop_plans(), change).error == plan_error::shape);
  };
  shape([](plans& p) { p[1].rank = 0; });
  shape([](plans& p) { p[1].rank = -1; });
  shape([](plans& p) { p[1].epoch = 1; });
  shape([](plans& p) { p[1].phases.pop_back(); });
  shape([](plans& p) { p[1].input.pop_back(); });
  shape([](plans& p) { p[1].buffers[1] = 5; });
  shape([](plans& p) { p[1].buffers.resize(1); });
  shape([](plans& p) { p[1].buffers[2] = -1; });
  CHECK(changed(two_hop_plans(), [](plans& p) { p.pop_back(); }).error == plan_error::out_of_range);
}

TEST_CASE("comm/verify: the order of plans is free") {
  plans p = two_hop_plans();
  std::swap(p[0], p[4]);
  std::swap(p[1], p[4]);
  CHECK(static_cast<bool>(moe::verify_plans(p)));
}

TEST_CASE("comm/verify: random changes of any number are found") {
  std::mt19937 random(1);
  auto const below = [&](auto n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  topology const ranks = topology::of_nodes(std::vector{3, 4, 2});
  std::vector<plans> all{moe::make_plans(moe::flat{}, ranks),
                         moe::make_plans(moe::two_hop{}, ranks),
                         moe::make_plans(moe::two_hop{moe::first_hop::intra}, ranks),
                         moe::make_plans(moe::leader{}, ranks),
                         plans(),
                         plans()};
  for (int r = 0; r < ranks.size(); ++r) {
    all[4].push_back(
        moe::make_coordinated_plans(ranks, 3, moe::shared_by::expert_slice, r).dispatch);
    all[5].push_back(transpose(all[4].back()));
  }
  int tried = 0, found = 0;
  for (plans const& right : all) {
    REQUIRE(static_cast<bool>(moe::verify_plans(right)));
    for (int i = 0; i < 300; ++i) {
      plans p = right;
      exchange_plan& plan = p[static_cast<std::size_t>(below(p.size()))];
      std::vector<int*> numbers;
      auto const place = [&](moe::slot_at& at) {
        numbers.push_back(&at.buffer);
        numbers.push_back(&at.slot);
      };
      auto const moves = [&](std::vector<moe::row_move>& v) {
        for (moe::row_move& m : v) place(m.from), place(m.to), numbers.push_back(&m.count);
      };
      auto const messages = [&](std::vector<moe::message>& v) {
        for (moe::message& m : v)
          place(m.at), numbers.push_back(&m.peer), numbers.push_back(&m.count);
      };
      for (moe::exchange_phase& phase : plan.phases) {
        moves(phase.moves);
        messages(phase.sends);
        messages(phase.receives);
      }
      moves(plan.last);
      int& number = *numbers[static_cast<std::size_t>(below(numbers.size()))];
      number += below(2) == 0 ? 1 + below(3) : -1 - below(3);
      ++tried;
      if (!moe::verify_plans(p))
        ++found;
      else
        CHECK(is_same_sum(right[static_cast<std::size_t>(&plan - p.data())], plan));
    }
  }
  CAPTURE(tried);
  CHECK(found >= tried - 10);
}
