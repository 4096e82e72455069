// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <random>
#include <support/disturbed.hpp>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/deduplicated.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_binder.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>

namespace {

using namespace std::chrono_literals;
using moe::exchange_plan;
using moe::topology;

constexpr int K = 3, M = 4, experts_each = 2;
moe::deadline late() {
  return moe::within(60s);
}
std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}

exchange_plan plan_of(int strategy, topology const& ranks, int rank) {
  switch (strategy) {
    case 0:
      return make_token_plan(moe::flat{}, ranks, rank);
    case 1:
      return make_token_plan(moe::two_hop{}, ranks, rank);
    case 2:
      return make_token_plan(moe::two_hop{moe::first_hop::intra}, ranks, rank);
    case 3:
      return make_token_plan(moe::leader{}, ranks, rank);
    default:
      return make_token_plan(moe::deduplicated{}, ranks, rank);
  }
}
constexpr int strategies = 5;

/// What all ranks know of one case: the tokens of each and what they want.
struct token_case {
  int R, each;
  std::vector<std::int32_t> hosts;              // [P, each]
  std::vector<std::vector<std::int32_t>> keys;  // [R][T, K]

  token_case(int ranks, int hosts_of_each, unsigned seed) : R(ranks), each(hosts_of_each) {
    std::minstd_rand random(seed + 1);
    int const P = R * experts_each;
    for (int p = 0; p < P; ++p)
      for (int l = 0; l < each; ++l) hosts.push_back((p / experts_each + l) % R);
    for (int r = 0; r < R; ++r) {
      std::int64_t const T = r % 4 == 2 ? 0 : static_cast<std::int64_t>(random() % 9);
      std::vector<std::int32_t> k;
      for (std::int64_t i = 0; i < T * K; ++i)
        k.push_back(static_cast<std::int32_t>(random() % static_cast<unsigned>(P + 2)) - 2);
      keys.push_back(std::move(k));
    }
  }
  std::int64_t T(int r) const { return static_cast<std::int64_t>(keys[at(r)].size()) / K; }
  bool wants(int s, std::int64_t t, int d) const {
    for (int j = 0; j < K; ++j) {
      std::int32_t const key = keys[at(s)][at(t * K + j)];
      for (int l = 0; key >= 0 && l < each; ++l)
        if (hosts[at(key * each + l)] == d) return true;
    }
    return false;
  }
  static float value(int s, std::int64_t t, int m) {
    return static_cast<float>(1000 * s + 10 * static_cast<int>(t) + m);
  }
};

/// Rows come as they should, and what goes back is added up. Tokens have two parts.
/// @param room  As bind has it; other than 0 for flat plans alone.
template <class C>
bool tokens_both_ways(C& comm, exchange_plan const& plan, token_case const& c, std::int64_t room) {
  int const r = comm.rank();
  std::int64_t const T = c.T(r);
  moe::bound_plan there(plan);
  moe::token_binder binder(comm);
  if (!binder.bind(there, {c.keys[at(r)], T, K}, {c.hosts, c.each}, room, late())) return false;
  std::vector<float> first(at(T * 3)), second(at(T * 5), -7.f);  // second: leading dimension 5
  for (std::int64_t t = 0; t < T; ++t)
    for (int m = 0; m < M; ++m)
      (m < 3 ? first[at(t * 3 + m)] : second[at(t * 5)]) = token_case::value(r, t, m);
  std::int64_t const N = there.output_rows();
  if (binder.keys().rows() != N) return false;
  // Of a flat plan: a slot takes the first tokens that want its rank.
  std::vector<std::int64_t> before(at(c.R), 0);
  for (std::int64_t t = 0; t < T; ++t) {
    for (int j = 0; j < K; ++j) {
      std::int32_t const key = c.keys[at(r)][at(t * K + j)];
      bool const lost = room > 0 && key >= 0 && before[at(c.hosts[at(key)])] >= room;
      if ((binder.lost()[t * K + j] != 0) != lost) return false;
    }
    for (int d = 0; d < c.R; ++d) before[at(d)] += c.wants(r, t, d) ? 1 : 0;
  }
  std::vector<float> rows(at(N * M), -1.f);
  moe::rank_exchange exchange(comm);
  moe::row_parts<float const> const in({first.data(), T, 3}, {second.data(), T, 1, 5});
  if (!exchange.template run<float>(there, in, {rows, N, M}, late())) return false;

  std::int64_t row = 0;
  bool right = true;
  for (std::size_t slot = 0; slot < plan.output.size(); ++slot) {
    int const s = plan.output[slot].source;
    std::int64_t used = 0;
    for (std::int64_t t = 0; t < c.T(s); ++t) {
      if (!c.wants(s, t, r) || (room > 0 && used == room)) continue;
      ++used;
      for (int m = 0; m < M; ++m)
        right = right && rows[at(row * M + m)] == token_case::value(s, t, m);
      for (int j = 0; j < K; ++j)
        right = right && binder.keys()(row, j) == c.keys[at(s)][at(t * K + j)];
      ++row;
    }
    for (; room > 0 && used < room; ++used, ++row)
      for (int j = 0; j < K; ++j) right = right && binder.keys()(row, j) == -1;
  }
  if (!right || row != N) return false;

  exchange_plan const back_plan = transpose(plan);
  moe::bound_plan back(back_plan);
  back.bind_back(there);
  for (float& x : rows) x *= static_cast<float>(r + 1);
  std::vector<float> home(at(T * 3), -1.f), home2(at(T * 5), -7.f);
  moe::row_parts<float> const out({home.data(), T, 3}, {home2.data(), T, 1, 5});
  if (!exchange.template run<float>(back, {rows, N, M}, out, late())) return false;
  for (std::int64_t t = 0; t < T; ++t) {
    float times = 0;
    for (int d = 0; d < c.R; ++d)
      if (c.wants(r, t, d)) times += static_cast<float>(d + 1);
    for (int m = 0; m < M; ++m) {
      float const got = m < 3 ? home[at(t * 3 + m)] : home2[at(t * 5)];
      if (room == 0 && got != times * token_case::value(r, t, m)) return false;
    }
    for (int j = 1; j < 5; ++j)
      if (home2[at(t * 5 + j)] != -7.f) return false;
  }
  return true;
}

template <class F>
std::vector<char> on_ranks(int R, F const& f) {
  std::vector<char> right(at(R));
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) { right[at(comm.rank())] = f(comm); });
  return right;
}

}  // namespace

TEST_CASE(
    "comm/token_binder: tokens go once to each rank that hosts a key of theirs, and sums come "
    "back") {
  for (int R = 1; R <= 11; ++R)
    for (int strategy = 0; strategy < strategies; ++strategy)
      for (int each = 1; each <= (R > 2 ? 2 : 1); ++each) {
        CAPTURE(R);
        CAPTURE(strategy);
        CAPTURE(each);
        topology const ranks = topology::even(1, R).grouped(3);
        token_case const c(R, each, static_cast<unsigned>(10 * R + strategy));
        auto const right = on_ranks(R, [&](moe::thread_communicator& inner) {
          moe_test::disturbed comm(inner, static_cast<unsigned>(inner.rank() + R));
          return tokens_both_ways(comm, plan_of(strategy, ranks, comm.rank()), c, 0);
        });
        CHECK(right == std::vector<char>(at(R), true));
      }
}

TEST_CASE(
    "comm/token_binder: a flat plan of fixed sizes keeps the first tokens of each rank, and says "
    "which are lost") {
  constexpr int R = 5;
  for (std::int64_t const room : {1, 2, 3, 9}) {
    CAPTURE(room);
    topology const ranks = topology::even(1, R);
    token_case const c(R, 1, static_cast<unsigned>(room));
    auto const right = on_ranks(R, [&](moe::thread_communicator& comm) {
      return tokens_both_ways(comm, plan_of(0, ranks, comm.rank()), c, room);
    });
    CHECK(right == std::vector<char>(R, true));
  }
}
