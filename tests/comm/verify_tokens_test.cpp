// SPDX-License-Identifier: MIT
#include <array>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <support/instrumented.hpp>
#include <support/token_run.hpp>
#include <utility>
#include <vector>

#include <moe/comm/deduplicated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>
#include <moe/comm/verify.hpp>

namespace {

using moe::exchange_plan;
using moe::piece;
using moe::plan_error;
using moe::row_action;
using moe::row_move;
using moe::topology;
using plans = std::vector<exchange_plan>;

plans transposed(plans p) {
  for (exchange_plan& plan : p) plan = transpose(plan);
  return p;
}
plans deduplicated_plans() {
  return moe::make_token_plans(moe::deduplicated{}, topology::even(2, 2));
}

/// The error after a change, where the tokens do not come out right, either.
template <class Change>
plan_error changed(plans p, Change const& change) {
  REQUIRE(static_cast<bool>(moe::verify_plans(p)));
  REQUIRE(moe_test::token_run(p, 1).is_right());
  change(p);
  CHECK_FALSE(moe_test::token_run(p, 1).is_right());
  return moe::verify_plans(p).error;
}

/// One plan of one rank: its input slots are of source 0.
plans alone(std::vector<piece> input, std::vector<piece> output, int staging,
            std::vector<row_move> moves) {
  exchange_plan p;
  p.buffers = {static_cast<int>(input.size()), static_cast<int>(output.size()), staging};
  p.input = std::move(input);
  p.output = std::move(output);
  p.last = std::move(moves);
  exchange_plan idle;  // so that there are two more destinations
  idle.rank = 1;
  plans all{p, idle, idle};
  all[2].rank = 2;
  return all;
}

constexpr piece all_three{0, 0, 0, 3};
constexpr row_move select_of(moe::slot_at from, moe::slot_at to, piece const& what) {
  return {from, to, 1, row_action::select, what};
}
constexpr row_move scatter_of(moe::slot_at from, moe::slot_at to, piece const& what) {
  return {from, to, 1, row_action::scatter, what};
}
constexpr row_move clear_of(moe::slot_at to) {
  return {{}, to, 1, row_action::clear, {}};
}

/// The verdict, which a run on tokens shares.
plan_error verdict(plans const& p) {
  plan_error const error = moe::verify_plans(p).error;
  CHECK(moe_test::token_run(p, 1).is_right() == (error == plan_error::none));
  return error;
}

/// Changes one number, action, move or message, at random.
class mutation {
 public:
  explicit mutation(unsigned seed) : random_(seed) {}

  void apply(plans& all) {
    exchange_plan& plan = all[static_cast<std::size_t>(below(all.size()))];
    if (below(8) == 0)
      change_list(plan);
    else
      change_number(plan);
  }

 private:
  template <class N>
  int below(N n) {
    return static_cast<int>(random_() % static_cast<unsigned>(n));
  }

  void change_number(exchange_plan& plan) {
    std::vector<int*> numbers;
    std::vector<row_action*> actions;
    auto const names = [&](piece& p) {
      for (int* n : {&p.source, &p.destination, &p.part, &p.span}) numbers.push_back(n);
    };
    auto const moves = [&](std::vector<row_move>& all) {
      for (row_move& m : all) {
        for (int* n : {&m.from.buffer, &m.from.slot, &m.to.buffer, &m.to.slot, &m.count})
          numbers.push_back(n);
        names(m.what);
        actions.push_back(&m.action);
      }
    };
    auto const messages = [&](std::vector<moe::message>& all) {
      for (moe::message& m : all)
        for (int* n : {&m.at.buffer, &m.at.slot, &m.peer, &m.count}) numbers.push_back(n);
    };
    for (moe::exchange_phase& phase : plan.phases) {
      moves(phase.moves);
      messages(phase.sends);
      messages(phase.receives);
    }
    moves(plan.last);
    for (piece& p : plan.input) names(p);
    for (piece& p : plan.output) names(p);
    std::size_t const i = static_cast<std::size_t>(below(numbers.size() + actions.size()));
    if (i >= numbers.size()) {
      row_action& action = *actions[i - numbers.size()];
      action = static_cast<row_action>((static_cast<int>(action) + 1 + below(4)) % 5);
      return;
    }
    constexpr std::array extremes{2147483647, -2147483647 - 1, 1 << 30};
    *numbers[i] = below(20) == 0  ? extremes[static_cast<std::size_t>(below(3))]
                  : below(2) == 0 ? *numbers[i] + 1 + below(3)
                                  : *numbers[i] - 1 - below(3);
  }

  /// One element less, one twice, or two exchanged.
  void change_list(exchange_plan& plan) {
    auto const change = [&](auto& list) {
      if (list.empty()) return false;
      auto const i = static_cast<std::ptrdiff_t>(below(list.size()));
      auto const j = static_cast<std::ptrdiff_t>(below(list.size()));
      int const what = below(3);
      if (what == 0) list.erase(list.begin() + i);
      if (what == 1) {
        auto const twice = list[static_cast<std::size_t>(i)];
        list.insert(list.begin() + j, twice);
      }
      if (what == 2)
        std::swap(list[static_cast<std::size_t>(i)], list[static_cast<std::size_t>(j)]);
      return true;
    };
    for (bool done = false; !done;) {
      int const place = below(3 * plan.phases.size() + 1);
      if (place == 0) {
        done = change(plan.last);
        continue;
      }
      moe::exchange_phase& phase = plan.phases[static_cast<std::size_t>((place - 1) / 3)];
      done = place % 3 == 0   ? change(phase.moves)
             : place % 3 == 1 ? change(phase.sends)
                              : change(phase.receives);
    }
  }

  std::mt19937 random_;
};

}  // namespace

TEST_CASE("comm/verify: plans of tokens, made right and run on tokens") {
  for (topology const& ranks : {topology::even(2, 2), topology::of_nodes(std::vector{3, 1, 2}),
                                topology::even(2, 3).surviving({1, {1, 0, 1, 1, 0, 1}})}) {
    auto const check = [&](auto const& strategy) {
      plans const there = moe::make_token_plans(strategy, ranks);
      CHECK(verdict(there) == plan_error::none);
      CHECK(verdict(transposed(there)) == plan_error::none);
      CHECK(verdict(transposed(transposed(there))) == plan_error::none);
    };
    check(moe::flat{});
    check(moe::two_hop{});
    check(moe::leader{});
    check(moe::deduplicated{});
    check(moe::sharded{});
  }
}

TEST_CASE("comm/verify: selections of what a slot does not hold") {
  auto const wrong_selection = [](auto const& change) {
    CHECK(changed(deduplicated_plans(), change) == plan_error::wrong_selection);
  };
  auto const of = [](plans& p) -> piece& { return p[0].phases[1].moves[1].what; };  // (2, 1)
  wrong_selection([&](plans& p) { of(p).source = 1; });
  wrong_selection([&](plans& p) { of(p).source = -1; });
  wrong_selection([&](plans& p) { of(p).destination = 2; });  // the pilot has none for node 1
  wrong_selection([&](plans& p) { of(p).destination = -1; });
  wrong_selection([&](plans& p) { of(p).destination = 2147483647; });
  wrong_selection([&](plans& p) { of(p).span = 2; });
  wrong_selection([&](plans& p) { of(p).span = 0; });
  wrong_selection([&](plans& p) { of(p).span = 2147483647; });
  wrong_selection([&](plans& p) { of(p).span = -2147483647; });
  CHECK(changed(deduplicated_plans(), [&](plans& p) { of(p).destination = 0; }) ==
        plan_error::wrong_rows);
  CHECK(changed(deduplicated_plans(), [](plans& p) { p[0].phases[1].moves[1].count = 2; }) ==
        plan_error::out_of_range);
  CHECK(changed(deduplicated_plans(), [](plans& p) { p[0].phases[1].moves[1].from.slot = 0; }) ==
        plan_error::unwritten);
  // Of a name that has no part.
  plans p = deduplicated_plans();
  of(p).part = 1;
  CHECK(moe::verify_plans(p).error == plan_error::wrong_selection);
}

TEST_CASE("comm/verify: a selection from sums") {
  // Of the sum of two slots, or of what was scattered: a token that two want would be there twice.
  piece const two{0, 0, 0, 2};
  std::vector<row_move> moves{
      {{0, 0}, {2, 0}, 1}, {{0, 1}, {2, 0}, 1, row_action::add}, select_of({2, 0}, {1, 0}, {0, 0})};
  CHECK(moe::verify_plans(alone({two, two}, {{0, 0}}, 1, moves)).error ==
        plan_error::wrong_selection);
  moves = {select_of({0, 0}, {2, 0}, {0, 0}),
           select_of({0, 0}, {2, 1}, {0, 1}),
           clear_of({2, 2}),
           scatter_of({2, 0}, {2, 2}, {0, 0}),
           scatter_of({2, 1}, {2, 2}, {0, 1}),
           select_of({2, 2}, {1, 0}, {0, 0})};
  CHECK(verdict(alone({two}, {{0, 0}}, 3, moves)) == plan_error::wrong_selection);
  moves.back() = {{2, 2}, {1, 0}, 1};
  CHECK(verdict(alone({two}, {two}, 3, moves)) == plan_error::wrong_rows);
  // A selection of a selection is one.
  moves = {select_of({0, 0}, {2, 0}, {0, 1, 0, 2}), select_of({2, 0}, {1, 0}, {0, 2})};
  CHECK(verdict(alone({all_three}, {{0, 2}}, 1, moves)) == plan_error::none);
}

TEST_CASE("comm/verify: cleared slots") {
  std::vector<piece> const three{{0, 0}, {0, 1}, {0, 2}};
  std::vector<row_move> const right{clear_of({1, 0}), scatter_of({0, 2}, {1, 0}, three[2]),
                                    scatter_of({0, 0}, {1, 0}, three[0]),
                                    scatter_of({0, 1}, {1, 0}, three[1])};
  auto const with = [&](auto const& change) {
    std::vector<row_move> moves = right;
    change(moves);
    return moe::verify_plans(alone(three, {all_three}, 2, moves)).error;
  };
  CHECK(verdict(alone(three, {all_three}, 2, right)) == plan_error::none);
  // A hole, a repetition, both at once, nothing at all.
  CHECK(with([](auto& m) { m.pop_back(); }) == plan_error::incomplete);
  CHECK(with([](auto& m) { m.push_back(m.back()); }) == plan_error::incomplete);
  CHECK(with([](auto& m) { m[3] = m[2]; }) == plan_error::incomplete);
  CHECK(with([](auto& m) { m.resize(1); }) == plan_error::incomplete);
  CHECK(with([](auto& m) { m.erase(m.begin() + 1); }) == plan_error::wrong_rows);
  // Twice cleared, never cleared, or cleared when something is in it.
  CHECK(with([](auto& m) { m.insert(m.begin(), m[0]); }) == plan_error::overwritten);
  CHECK(with([](auto& m) { m.erase(m.begin()); }) == plan_error::unwritten);
  CHECK(with([](auto& m) { m.push_back(clear_of({1, 0})); }) == plan_error::overwritten);
  CHECK(with([](auto& m) { m[0].to.buffer = 0; }) == plan_error::overwritten);
  CHECK(with([](auto& m) { m[0].to.slot = 1; }) == plan_error::out_of_range);
  CHECK(with([](auto& m) { m[0].to.buffer = 3; }) == plan_error::out_of_range);
  CHECK(with([](auto& m) { m[0] = {{}, {2, 0}, 2, row_action::clear, {}}; }) ==
        plan_error::wrong_selection);
  // Scattered by another name than the rows have.
  CHECK(with([](auto& m) { m[1].what.destination = 1; }) == plan_error::wrong_selection);
  CHECK(with([](auto& m) { m[1].what.source = 1; }) == plan_error::wrong_selection);
  CHECK(with([](auto& m) { m[1].what.span = 2; }) == plan_error::wrong_selection);
  CHECK(with([](auto& m) { m[1].what.part = 1; }) == plan_error::wrong_selection);
  CHECK(with([](auto& m) { m[1].count = 2; }) == plan_error::out_of_range);
  CHECK(with([](auto& m) { m[1].action = row_action::add; }) == plan_error::incomplete);
  CHECK(with([](auto& m) { m[1].action = static_cast<row_action>(9); }) == plan_error::shape);
  // By some of the names of its rows.
  std::vector<row_move> const part{clear_of({1, 0}), scatter_of({0, 0}, {1, 0}, {0, 1}),
                                   scatter_of({0, 1}, {1, 0}, {0, 2})};
  CHECK(verdict(alone({{0, 0, 0, 2}, {0, 2}}, {all_three}, 2, part)) ==
        plan_error::wrong_selection);
  // Read once, a slot has a size: it does not grow any more, but can still be added to.
  CHECK(with([](auto& m) { m.insert(m.begin() + 2, row_move{{1, 0}, {2, 0}, 1}); }) ==
        plan_error::wrong_selection);
  std::vector<row_move> more = right;
  more.insert(more.end(), {{{1, 0}, {2, 0}, 1},
                           scatter_of({0, 3}, {1, 0}, three[1]),
                           {{0, 4}, {1, 0}, 1, row_action::add}});
  std::vector<piece> five = three;
  five.insert(five.end(), {three[1], all_three});
  CHECK(verdict(alone(five, {all_three}, 2, more)) == plan_error::none);
  // Tokens of two sources, or of two parts, do not share a slot.
  five = {{0, 0}, {1, 1}, {0, 2}};
  std::vector<row_move> moves = right;
  moves[3].what.source = 1;
  CHECK(verdict(alone(five, {all_three}, 2, moves)) == plan_error::wrong_selection);
  five = {{0, 0}, {0, 1, 1}, {0, 2}};
  CHECK(verdict(alone(five, {all_three}, 2, right)) == plan_error::wrong_selection);
}

TEST_CASE("comm/verify: names of destinations that do not exist") {
  auto const shape = [](auto const& change) {
    plans p = deduplicated_plans();
    change(p);
    CHECK(moe::verify_plans(p).error == plan_error::shape);
  };
  shape([](plans& p) { p[0].input[0].span = 5; });
  shape([](plans& p) { p[0].input[0].span = 0; });
  shape([](plans& p) { p[0].input[0].span = -2147483647 - 1; });
  shape([](plans& p) { p[0].input[0].destination = 1; });
  shape([](plans& p) { p[0].input[0].destination = -1; });
  shape([](plans& p) { p[0].output[0].span = 2147483647; });
  shape([](plans& p) { p[0].output[0].destination = 2147483647; });
}

TEST_CASE("comm/verify: of random changes of plans of tokens those pass that change no token") {
  topology const ranks = topology::of_nodes(std::vector{3, 1, 2});
  std::vector<plans> all;
  for (plans const& there :
       {moe::make_token_plans(moe::deduplicated{}, ranks),
        moe::make_token_plans(moe::deduplicated{}, topology::even(2, 3)),
        moe::make_token_plans(moe::flat{}, ranks), moe::make_token_plans(moe::two_hop{}, ranks),
        moe::make_token_plans(moe::leader{}, ranks),
        moe::make_token_plans(moe::sharded{}, ranks)}) {
    all.push_back(there);
    all.push_back(transposed(there));
  }
  mutation random(1);
  int tried = 0, passed = 0, unchanged = 0, refused_though_right = 0, wrong = 0;
  for (plans const& right : all) {
    REQUIRE(static_cast<bool>(moe::verify_plans(right)));
    for (int i = 0; i < moe_test::cases(800); ++i) {
      plans p = right;
      random.apply(p);
      ++tried;
      unchanged += p == right;
      bool const accepted = static_cast<bool>(moe::verify_plans(p));
      bool run = true;
      for (unsigned seed = 0; seed < 3 && run; ++seed)
        run = moe_test::token_run(p, seed).is_right();
      passed += accepted;
      refused_though_right += !accepted && run;
      if (accepted && !run) ++wrong;
    }
  }
  MESSAGE(tried << " tried, " << passed << " passed, of which " << unchanged << " unchanged; "
                << refused_though_right << " refused that were right");
  CHECK(wrong == 0);
  // Those are the fields that an action does not read, another order, and more tokens than are wanted on
  // the way; the others select by a name with a part, or call an end by a name that no plan may have.
  CHECK(passed < tried / 8);
  CHECK(refused_though_right < tried / 16);
}
