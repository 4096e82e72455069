// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <support/counted.hpp>
#include <support/exchanged_rows.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/flat.hpp>
#include <moe/comm/hierarchical_all_to_all.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/two_hop.hpp>

namespace {

using moe::topology;
using moe_test::at;
using moe_test::late;

/// Not a number: an all-to-all has nothing to add.
struct labelled {
  std::int32_t source, destination, place;
  friend bool operator==(labelled const&, labelled const&) = default;
};

/// Blocks of n labels between all of `ranks`, as this rank; true if they came right.
template <class C, class Strategy>
bool exchange_blocks(C& comm, topology const& ranks, int n, Strategy const& strategy) {
  int const R = ranks.size(), i = ranks.index_of(comm.rank());
  std::vector<labelled> in, expected, out(at(R * n));
  for (int j = 0; j < R; ++j)
    for (int k = 0; k < n; ++k) {
      in.push_back({i, j, k});
      expected.push_back({j, i, k});
    }
  return moe::hierarchical_all_to_all<labelled>(comm, ranks, in, out, late(), strategy) &&
         out == expected;
}

}  // namespace

TEST_CASE("comm/hierarchical_all_to_all: equal blocks, over threads, by any strategy") {
  for (topology const& ranks :
       {topology::even(2, 3), topology::of_nodes(std::vector{1, 3, 2}), topology::even(1, 6),
        topology::even(1, 8).surviving({.epoch = 2, .alive = {1, 1, 0, 1, 1, 1, 0, 1}})}) {
    std::vector<char> right(8, true);
    moe::thread_world world(8);
    world.run([&](moe::thread_communicator& comm) {
      if (ranks.index_of(comm.rank()) < 0) return;
      for (int const n : {0, 1, 5})
        if (!exchange_blocks(comm, ranks, n, moe::two_hop{}) ||
            !exchange_blocks(comm, ranks, n, moe::two_hop{moe::first_hop::intra}) ||
            !exchange_blocks(comm, ranks, n, moe::leader{}) ||
            !exchange_blocks(comm, ranks, n, moe::flat{}))
          right[at(comm.rank())] = false;
    });
    CHECK(right == std::vector<char>(8, true));
  }
}

TEST_CASE("comm/hierarchical_all_to_all: as many messages as the strategy has") {
  topology const ranks = topology::even(2, 3);
  std::vector<std::int64_t> flat(6), two_hop(6);
  moe::thread_world world(6);
  world.run([&](moe::thread_communicator& inner) {
    moe_test::counted comm(inner, ranks);
    if (!exchange_blocks(comm, ranks, 2, moe::flat{})) return;
    flat[at(comm.rank())] = comm.between_nodes.messages;
    comm.between_nodes = {};
    if (!exchange_blocks(comm, ranks, 2, moe::two_hop{})) return;
    two_hop[at(comm.rank())] = comm.between_nodes.messages;
  });
  CHECK(flat == std::vector<std::int64_t>(6, 3));
  CHECK(two_hop == std::vector<std::int64_t>(6, 1));
}

TEST_CASE("comm/hierarchical_all_to_all: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  moe::self_communicator comm;
  std::vector<int> in(4), out(4);
  says(refusal([&] {
         (void)moe::hierarchical_all_to_all<int>(comm, topology::even(1, 1), {in.data(), 3}, out,
                                                 late());
       }),
       "hierarchical_all_to_all: in and out of one size, a multiple of R; got in = 3, out = 4");
  says(refusal([&] {
         (void)moe::hierarchical_all_to_all<int>(comm, topology::even(1, 3), in, out, late());
       }),
       "a multiple of R; got in = 4, out = 4, R = 3");
  topology const others = topology::even(1, 3).surviving({.epoch = 1, .alive = {0, 1, 1}});
  says(refusal([&] { (void)moe::hierarchical_all_to_all<int>(comm, others, in, out, late()); }),
       "make_plan: rank is in the topology; got rank = 0");
}
