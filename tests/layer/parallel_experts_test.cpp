// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <support/disturbed.hpp>
#include <support/instrumented.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/flat.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/comm/verify.hpp>
#include <moe/expert/activation.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/gathered_experts.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/parallel_experts.hpp>

#include "layer/case.hpp"
#include "layer/held_experts.hpp"
#include "layer/parallel_case.hpp"

namespace {

using namespace std::chrono_literals;
using moe::exchange_status;
using moe::expert_hosts;
using moe::lost_contributions;
using moe::topology;
using moe_test::for_each_held;
using namespace moe_test::parallel;
template <class C>
using remote = moe::parallel_experts<inner_experts, C>;
static_assert(moe::experts<remote<moe::thread_communicator>, float>);
static_assert(moe::experts<remote<moe::self_communicator>, double>);

void check_equal_to_one_rank(parallel_case const& c, bool disturb = false) {
  whole_layer whole(c.first(c.R()), c.E);
  joint_result sum = joint_result::of(whole);
  std::mutex mutex;
  moe::thread_world world(c.R());
  world.run([&](moe::thread_communicator& inner) {
    expert_hosts const hosts(c.E, c.degrees, inner.rank());
    moe::thread_communicator second;
    if (!inner.split(0, inner.rank(), moe::within(60s), second)) throw std::runtime_error("split");
    if (!disturb) return run_rank(inner, &second, whole, c, hosts, sum, mutex);
    auto const seed = static_cast<unsigned>(inner.rank()) + 1;
    moe_test::disturbed a(inner, seed), b(second, seed + 100);
    run_rank(a, &b, whole, c, hosts, sum, mutex);
  });
  check_equal(sum, whole);
}

}  // namespace

TEST_CASE("layer/parallel_experts: ranks equal one rank, forward and backward, by every strategy") {
  unsigned seed = 0;
  for (int const R : {1, 2, 3, 4, 5, 8, 12, 16})
    for (int kind = 0; kind < any_strategy::kinds; ++kind) {
      if (moe_test::instrumented && R > 5) continue;
      CAPTURE(R);
      CAPTURE(kind);
      int const E = R * (1 + kind % 2) + (R == 1 ? 2 : 0);
      parallel_case c{.T = some_tokens(R, seed++), .E = E, .degrees = moe::spread_experts(E, R)};
      c.strategy = {kind};
      c.group = 1 + static_cast<int>(seed) % 4;
      check_equal_to_one_rank(c);
    }
}

TEST_CASE("layer/parallel_experts: copies, slices, and both") {
  for (int kind = 0; kind < any_strategy::kinds; ++kind) {
    CAPTURE(kind);
    for (auto const degrees : {moe::expert_parallelism{2, 3, 1, 2},
                               {2, 1, 3, 2},
                               {3, 2, 1, 1},
                               {1, 1, 6, 4},
                               {2, 2, 2, 1},
                               {1, 4, 1, 3}}) {
      parallel_case c;
      c.degrees = degrees;
      c.E = degrees.expert_parallel * degrees.experts_per_rank;
      c.T = some_tokens(degrees.expert_parallel * degrees.data_parallel * degrees.slices, 3);
      c.strategy = {kind};
      check_equal_to_one_rank(c);
    }
  }
}

TEST_CASE("layer/parallel_experts: in chunks, disturbed, twice") {
  for (int const chunks : {1, 2, 3, 5})
    for (int kind = 0; kind < any_strategy::kinds; ++kind) {
      CAPTURE(chunks);
      CAPTURE(kind);
      parallel_case c{.T = {7, 0, 1, 12}, .E = 8, .degrees = moe::spread_experts(8, 4)};
      c.strategy = {kind};
      c.chunks = chunks;
      c.repeat = chunks == 3;
      check_equal_to_one_rank(c, true);
    }
}

TEST_CASE("layer/parallel_experts: fixed sizes with room for all are exact") {
  for (int kind = 0; kind < any_strategy::kinds; ++kind) {
    CAPTURE(kind);
    parallel_case c{.T = {7, 0, 1, 12}, .E = 8, .degrees = moe::spread_experts(8, 4)};
    c.strategy = {kind};
    c.room = 12;
    c.chunks = kind % 2 + 1;
    check_equal_to_one_rank(c);
  }
}

TEST_CASE("layer/parallel_experts: experts sliced over all ranks, without counts") {
  for (int const R : {1, 2, 3, 6}) {
    parallel_case c{.T = some_tokens(R, 1), .E = 3, .degrees = {1, 1, R, 3}};
    c.strategy = {5};
    c.room = c.most();
    check_equal_to_one_rank(c);
    topology const ranks = topology::even(1, R);
    auto plans = moe::make_token_plans(moe::sharded{}, ranks);
    CHECK(moe::verify_plans(plans));
    for (moe::exchange_plan& p : plans) p = transpose(p);
    CHECK(moe::verify_plans(plans));
  }
}

TEST_CASE(
    "layer/gathered_experts: any number of partial experts, call by call, with the same "
    "parameters") {
  struct {
    moe::expert_parallelism degrees;
    std::vector<int> r;
  } const cases[] = {{{2, 1, 4, 2}, {0, 1, 2, 4}},
                     {{2, 1, 3, 1}, {0, 1, 3}},
                     {{1, 1, 6, 3}, {0, 1, 2, 3, 6}},
                     {{4, 1, 1, 1}, {0, 1}}};
  for (auto const& [degrees, degrees_of_r] : cases) {
    int const EP = degrees.expert_parallel, S = degrees.slices, R = EP * S;
    moe::expert_parallelism const kept = degrees;
    parallel_case c{.T = some_tokens(R, 2), .E = EP * degrees.experts_per_rank};
    whole_layer whole(c.first(R), c.E, 1, 0, 0, 12);
    std::vector<joint_result> sums(degrees_of_r.size(), joint_result::of(whole));
    std::vector<int> const& rs = degrees_of_r;
    std::mutex mutex;
    moe::thread_world world(R);
    world.run([&](moe::thread_communicator& comm) {
      int const rank = comm.rank();
      expert_hosts const keeps(c.E, kept, rank);
      for (std::size_t i = 0; i < rs.size(); ++i) {
        auto const [pool, color] = moe::adaptive_pool::of(kept, rs[i], rank);
        moe::thread_communicator pool_ranks;
        if (!comm.split(color, rank, moe::within(60s), pool_ranks))
          throw std::runtime_error("split");
        moe::gathered_experts const inner(inner_experts{}, pool_ranks, pool);
        run_rank<moe::thread_communicator>(comm, nullptr, whole, c,
                                           expert_hosts::adaptive(c.E, kept, rs[i], rank), sums[i],
                                           mutex, inner, &keeps);
      }
    });
    for (std::size_t i = 0; i < rs.size(); ++i) {
      CAPTURE(R);
      CAPTURE(i);
      check_equal(sums[i], whole);
    }
  }
}

TEST_CASE("layer/parallel_experts: tokens on some ranks, experts on others") {
  whole_layer whole(9, 4);
  joint_result sum = joint_result::of(whole);
  parallel_case c{.T = {4, 5, 0, 0}, .E = 4};
  std::mutex mutex;
  moe::thread_world world(4);
  world.run([&](moe::thread_communicator& comm) {
    run_rank<moe::thread_communicator>(comm, nullptr, whole, c,
                                       expert_hosts::apart(4, 2, 2, comm.rank()), sum, mutex);
  });
  check_equal(sum, whole);
}

namespace {

/// Ranks of which some have died before, which all know: those that are left give what `expected` does.
void check_survivors(parallel_case const& c, moe::membership const& members, bool take_over,
                     lost_contributions lost, whole_layer& whole, whole_layer const& expected) {
  topology const ranks = topology::even(1, c.R()).grouped(c.group).surviving(members);
  std::mutex mutex;
  std::vector<double> out(whole.out.size()), dtokens(whole.out.size());
  std::vector<double> experts(whole.values.size());
  std::vector<std::int32_t> lost_of_token;
  moe::thread_world world(c.R());
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    if (members.alive[at(r)] == 0) return;
    std::int64_t const T = c.T[at(r)], first = c.first(r);
    expert_hosts const hosts = expert_hosts(c.E, c.degrees, r).surviving(members, take_over);
    moe::token_exchange<moe::thread_communicator> exchange(comm, ranks, c.strategy, hosts);
    moe::moe_layer const layer(
        router{}, remote<moe::thread_communicator>({}, exchange, {.T = c.most(), .K = K}, lost),
        {.T = c.most(), .M = M, .H = H, .E = c.E, .bias = true});
    std::vector<double> values(at(layer.parameter_elements())), gradients(values.size());
    auto const from = whole.layer.carve(whole.values.data());
    auto const parts = layer.carve(values.data());
    for (std::int64_t m = 0; m < M; ++m) std::copy_n(from.router.row(m), c.E, parts.router.row(m));
    for_each_held(from.experts, parts.experts, hosts, [](double a, double& b) { b = a; });
    moe::cpu const exec;
    moe::buffer saved_bytes(layer.template saved_bytes<double>());
    moe::buffer scratch(layer.template scratch_bytes<double>(exec));
    auto saved = layer.template carve_saved<double>(saved_bytes);
    moe::matrix_view<double const> const tokens(whole.tokens.data() + first * M, T, M);
    layer.template forward<double>(exec, parts, tokens, {.training = true},
                                   {out.data() + first * M, T, M}, saved, scratch);
    layer.template backward<double>(exec, parts, tokens, {whole.dout.data() + first * M, T, M}, {},
                                    saved, {dtokens.data() + first * M, T, M},
                                    layer.carve(gradients.data()), moe::update::assign, scratch);
    std::lock_guard const lock(mutex);
    auto const into = whole.layer.carve(experts.data());
    for_each_held(into.experts, layer.carve(gradients.data()).experts, hosts,
                  [](double& a, double b) { a += b; });
    for (std::int32_t const n : exchange.lost_of_token()) lost_of_token.push_back(n);
  });
  CHECK(worst_difference(out, expected.out) < tolerance);
  CHECK(worst_difference(dtokens, expected.dtokens) < tolerance);
  // Of the experts that are left.
  std::vector<double> want = expected.gradients;
  std::fill_n(want.begin(), M * c.E, 0.);
  for (std::size_t i = 0; i < want.size(); ++i)
    if (experts[i] == 0) want[i] = 0;
  CHECK(worst_difference(experts, want) < tolerance);
  CHECK(std::count(experts.begin(), experts.end(), 0.) <
        static_cast<std::ptrdiff_t>(experts.size()) / 2);
  auto const total = std::accumulate(lost_of_token.begin(), lost_of_token.end(), 0);
  CHECK((total > 0) == !take_over);
}

}  // namespace

TEST_CASE("layer/parallel_experts: a copy takes over from a rank that died") {
  for (int kind = 0; kind < any_strategy::kinds; ++kind) {
    if (kind == 4) continue;  // grids need all ranks
    CAPTURE(kind);
    parallel_case c{.T = {5, 0, 4, 6}, .E = 4, .degrees = {2, 2, 1, 2}};
    c.strategy = {kind};
    whole_layer whole(15, 4);
    check_survivors(c, {.epoch = 1, .alive = {1, 0, 1, 1}}, true, lost_contributions::fail, whole,
                    whole);
  }
}

TEST_CASE("layer/parallel_experts: what is lost with a rank is left out, and counted") {
  for (int const kind : {0, 1, 5, 6}) {
    CAPTURE(kind);
    parallel_case c{.T = {5, 4, 0, 6}, .E = 8, .degrees = moe::spread_experts(8, 4)};
    c.strategy = {kind};
    whole_layer whole(15, 8);
    // Experts that give nothing are as good as lost ones.
    whole_layer silent(15, 8, 1, 4, 6);
    check_survivors(c, {.epoch = 1, .alive = {1, 1, 0, 1}}, false, lost_contributions::drop, whole,
                    silent);
  }
}

TEST_CASE("layer/parallel_experts: gradients where weights are scaled to what is left") {
  // Two ranks' experts, of which the other ones are lost. Weights that do not sum to 1 anyway.
  using unscaled = moe::preset<moe::gate<moe::softmax, moe::top_k<K>, moe::as_scored>>;
  for (auto const lost : {lost_contributions::drop, lost_contributions::drop_and_renormalise}) {
    moe::self_communicator comm;
    expert_hosts const hosts =
        expert_hosts(4, {2, 1, 1, 2}, 0).surviving({.epoch = 1, .alive = {1, 0}}, true);
    moe::token_exchange exchange(comm, topology::even(1, 1), moe::chunked<moe::flat>{{}, 1}, hosts);
    moe::moe_layer const layer(unscaled{},
                               remote<moe::self_communicator>({}, exchange, {.T = 9, .K = K}, lost),
                               {.T = 9, .M = M, .H = H, .E = 4, .bias = true, .z_loss = true});
    moe_test::owned_layer<double, std::decay_t<decltype(layer)>> c(layer, 9, 40);
    auto const result = moe_test::check_gradients(c);
    CHECK(result.flipped == 0);
    CHECK(result.worst < 2e-8);
    CHECK(result.nonzero > result.checked / 3);
    auto const n = exchange.lost_of_token();
    CHECK(std::count(n.begin(), n.end(), 0) > 0);
    CHECK(std::count(n.begin(), n.end(), 1) > 0);
  }
}

TEST_CASE("layer/parallel_experts: a rank dies in any phase: an error that names a peer, in time") {
  constexpr int R = 4, E = 8;
  whole_layer whole(16, E);
  for (int const kind : {0, 1, 5, 6})
    for (int const chunks : {1, 2})
      for (int lives = 0; lives < (moe_test::instrumented ? 4 : 26); ++lives)
        for (bool const sends : {false, true}) {
          CAPTURE(kind);
          CAPTURE(chunks);
          CAPTURE(lives);
          CAPTURE(sends);
          int const victim = lives % R;
          parallel_case c{.T = {4, 4, 4, 4}, .E = E, .degrees = moe::spread_experts(E, R)};
          c.strategy = {kind};
          c.chunks = chunks;
          joint_result sum = joint_result::of(whole);
          std::mutex mutex;
          std::vector<char> ended_well(R), named(R, true);
          bool victim_died = false;
          auto const start = std::chrono::steady_clock::now();
          moe::thread_world world(R);
          auto const run = [&](moe::thread_communicator& inner) {
            int const r = inner.rank();
            moe::thread_communicator second;
            if (!inner.split(0, r, moe::within(60s), second)) throw std::runtime_error("split");
            // The victim's calls of both communicators count.
            moe_test::disturbed a(inner, static_cast<unsigned>(r) + 1,
                                  r == victim ? lives : 1 << 30, sends);
            moe_test::disturbed b(second, static_cast<unsigned>(r) + 9);
            try {
              run_rank(a, chunks > 1 ? &b : nullptr, whole, c, expert_hosts(E, c.degrees, r), sum,
                       mutex);
              ended_well[at(r)] = true;
            } catch (moe::exchange_error const& e) {
              auto const status = static_cast<exchange_status>(e.status());
              named[at(r)] = status == exchange_status::peer_failed && e.peer() >= 0 &&
                             e.peer() != r &&
                             std::strstr(e.what(), "peer_failed, rank ") != nullptr;
            }
          };
          try {
            world.run(run);
          } catch (moe_test::rank_died const&) {
            victim_died = true;
          }
          CHECK(std::chrono::steady_clock::now() - start < 20s);
          for (int r = 0; r < R; ++r) {
            if (victim_died && r == victim) continue;
            CHECK(named[at(r)]);
            if (ended_well[at(r)])  // then its rows are right
              CHECK(std::equal(sum.out.begin() + 4 * r * M, sum.out.begin() + 4 * (r + 1) * M,
                               whole.out.begin() + 4 * r * M,
                               [](double x, double y) { return std::abs(x - y) < tolerance; }));
          }
          if (!victim_died) CHECK(std::count(ended_well.begin(), ended_well.end(), true) == R);
        }
}

namespace {

/// How a forward of two ranks with 4 experts ends, on each.
std::vector<exchange_status> endings(moe::parallel_shape const& bounds, std::int64_t room,
                                     lost_contributions lost, moe::membership const& members) {
  std::vector<exchange_status> ends(2, exchange_status::ok);
  moe::thread_world world(2);
  world.run([&](moe::thread_communicator& comm) {
    int const r = comm.rank();
    expert_hosts const hosts =
        expert_hosts(4, moe::spread_experts(4, 2), r).surviving(members, true);
    moe::token_exchange<moe::thread_communicator> exchange(comm, topology::even(1, 2), moe::flat{},
                                                           hosts, {.timeout = 60s, .room = room});
    moe::moe_layer const layer(router{},
                               remote<moe::thread_communicator>({}, exchange, bounds, lost),
                               {.T = 8, .M = M, .H = H, .E = 4});
    auto const values = moe_test::normals<double>(layer.parameter_elements(), 3, 0, 0.5);
    auto const tokens = moe_test::normals<double>(8 * M, 4);
    std::vector<double> parameters = values, out(8 * M);
    moe::cpu const exec;
    moe::buffer saved_bytes(layer.template saved_bytes<double>());
    moe::buffer scratch(layer.template scratch_bytes<double>(exec));
    auto saved = layer.template carve_saved<double>(saved_bytes);
    try {
      layer.template forward<double>(exec, layer.carve(parameters.data()), {tokens, 8, M}, {},
                                     {out, 8, M}, saved, scratch);
    } catch (moe::exchange_error const& e) {
      ends[at(r)] = static_cast<exchange_status>(e.status());
    }
  });
  return ends;
}

}  // namespace

TEST_CASE("layer/parallel_experts: too little room, and lost experts, end as the rule says") {
  using enum exchange_status;
  moe::membership const all{.epoch = 0, .alive = {1, 1}};
  moe::parallel_shape const enough{.T = 8, .K = K};
  auto const either = [](std::vector<exchange_status> const& ends, exchange_status status) {
    return std::all_of(ends.begin(), ends.end(),
                       [&](exchange_status s) { return s == status || s == peer_failed; }) &&
           std::count(ends.begin(), ends.end(), status) > 0;
  };
  CHECK(endings(enough, 0, lost_contributions::fail, all) == std::vector{ok, ok});
  CHECK(
      either(endings({.T = 8, .K = K, .max_rows = 3}, 0, lost_contributions::fail, all), no_room));
  CHECK(endings({.T = 8, .K = K, .max_rows = 16}, 0, lost_contributions::fail, all) ==
        std::vector{ok, ok});
  CHECK(either(endings(enough, 2, lost_contributions::fail, all), exchange_status::lost));
  CHECK(endings(enough, 2, lost_contributions::drop, all) == std::vector{ok, ok});
  CHECK(endings(enough, 2, lost_contributions::drop_and_renormalise, all) == std::vector{ok, ok});
  moe::membership const one{.epoch = 0, .alive = {1, 0}};
  CHECK(either(endings(enough, 0, lost_contributions::fail, one), exchange_status::lost));
  CHECK(endings(enough, 0, lost_contributions::drop, one) == std::vector{ok, ok});
}

TEST_CASE("layer/parallel_experts: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  moe::self_communicator comm;
  expert_hosts const hosts(4, {1, 1, 1, 4}, 0);
  using exchange_type = moe::token_exchange<moe::self_communicator>;
  topology const one = topology::even(1, 1);
  says(refusal([&] { exchange_type(comm, one, moe::chunked<moe::flat>{{}, 2}, hosts); }),
       "token_exchange: chunks >= 1, and a second communicator for several; got chunks = 2");
  says(refusal([&] { expert_hosts(4, {1, 1, 1, 4}, 1); }), "expert_hosts: ");
  says(refusal([&] { expert_hosts(5, {1, 1, 1, 4}, 0); }), "expert_hosts: ");
  says(refusal([&] { expert_hosts::apart(5, 1, 2, 0); }), "expert_hosts::apart: ");
  exchange_type exchange(comm, one, moe::flat{}, hosts);
  says(refusal([&] { remote<moe::self_communicator>({}, exchange, {.T = 4, .K = 17}); }),
       "parallel_experts: T >= 0, 1 <= K <= 16, max_rows >= 0");
  moe::moe_layer const layer(router{},
                             remote<moe::self_communicator>({}, exchange, {.T = 4, .K = K}),
                             {.T = 8, .M = M, .H = H, .E = 4});
  moe_test::owned_layer<double, std::decay_t<decltype(layer)>> large(layer, 5, 1),
      small(layer, 4, 1), other(layer, 4, 1);
  says(refusal([&] { large.forward(); }),
       "parallel_experts: a table of E experts, K choices each, of at most T tokens");
  small.forward();
  small.backward();
  other.forward();
  says(refusal([&] { small.backward(); }),
       "parallel_experts::backward: no other forward has used the exchange since");
  other.backward();
}
