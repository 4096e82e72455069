// SPDX-License-Identifier: MIT
#include <array>
#include <doctest/doctest.h>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/topology.hpp>

using moe::topology;
using moe_test::refusal;
using moe_test::says;

TEST_CASE("comm/topology: nodes of different sizes") {
  topology const t = topology::of_nodes(std::vector<int>{2, 1, 3});
  CHECK(t.size() == 6);
  CHECK(t.nodes() == 3);
  std::array const node{0, 0, 1, 2, 2, 2}, local{0, 1, 0, 0, 1, 2};
  for (int i = 0; i < 6; ++i) {
    CHECK(t.node(i) == node[static_cast<std::size_t>(i)]);
    CHECK(t.local(i) == local[static_cast<std::size_t>(i)]);
    CHECK(t.rank(i) == i);
    CHECK(t.index_of(i) == i);
  }
  CHECK(t.node_size(2) == 3);
  CHECK(t.first(2) == 3);
  CHECK(t.index_of(6) == -1);
}

TEST_CASE("comm/topology: groups of any size instead of nodes") {
  topology const t = topology::even(2, 4).grouped(3);
  CHECK(t.size() == 8);
  CHECK(t.nodes() == 3);
  CHECK(t.node_size(0) == 3);
  CHECK(t.node_size(2) == 2);
  CHECK(t.node(5) == 1);
}

TEST_CASE("comm/topology: without the dead, indices have no gaps and ranks keep their numbers") {
  moe::membership const m{.epoch = 7, .alive = {1, 0, 0, 0, 1, 1}};
  topology const t = topology::even(3, 2).surviving(m);
  CHECK(t.epoch() == 7);
  CHECK(t.size() == 3);
  CHECK(t.nodes() == 2);
  CHECK(t.rank(0) == 0);
  CHECK(t.rank(1) == 4);
  CHECK(t.rank(2) == 5);
  CHECK(t.node(1) == 1);
  CHECK(t.local(2) == 1);
  CHECK(t.index_of(1) == -1);
  CHECK(t.index_of(5) == 2);
  CHECK(t.grouped(2).epoch() == 7);
  CHECK(t.grouped(2).rank(2) == 5);
}

TEST_CASE("comm/topology: what makes no sense is refused") {
  says(refusal([] { topology::even(0, 2); }),
       "topology::even: nodes >= 1 and G >= 1; got nodes = 0, G = 2");
  says(refusal([] { topology::of_nodes(std::vector<int>{}); }),
       "topology::of_nodes: at least one node");
  says(refusal([] { topology::of_nodes(std::vector<int>{1, 0}); }),
       "topology::of_nodes: at least one rank in each node; got ranks = 0");
  says(refusal([] { topology::even(1, 2).grouped(0); }), "topology::grouped: group >= 1; got");
  says(refusal([] { topology::even(1, 2).surviving({.epoch = 1, .alive = {1}}); }),
       "topology::surviving: alive is [R]; got alive = 1, R = 2");
  says(refusal([] { topology::even(1, 2).surviving({.epoch = 1, .alive = {0, 0}}); }),
       "topology::surviving: somebody is alive");
}
