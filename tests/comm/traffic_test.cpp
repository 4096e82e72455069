// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>
#include <vector>

#include <moe/comm/flat.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

namespace {

using moe::topology;

/// A latency of 8, 1 for each message and 2 for each byte; between nodes 10 times as much. No copies.
constexpr moe::machine_speed machine{
    .within_nodes = {8, 1, 0.5}, .between_nodes = {80, 10, 0.05}, .copied_bytes_per_second = 1e300};

}  // namespace

TEST_CASE("comm/traffic: links are those of the topology, whatever groups the strategy used") {
  topology const nodes = topology::even(2, 4);
  auto const plans = moe::make_plans(moe::two_hop{}, nodes.grouped(2));
  auto const by_node = count_traffic(plans, nodes),
             by_group = count_traffic(plans, nodes.grouped(2));
  CHECK(by_group.between_nodes.messages == 2 * 4 * 3);  // G N (N - 1) of 4 groups of 2
  CHECK(by_node.between_nodes.messages == 8 * 2);  // each rank to one of both groups of the other
  CHECK(by_node.within_nodes.messages + by_node.between_nodes.messages ==
        by_group.within_nodes.messages + by_group.between_nodes.messages);
  CHECK(by_node.between_nodes.slots == 32);
}

TEST_CASE("comm/traffic: ranks that are left out leave their numbers out, too") {
  topology const ranks = topology::even(2, 2).surviving({.alive = {0, 1, 1, 1}});
  auto const t = count_traffic(moe::make_plans(moe::flat{}, ranks), ranks);
  CHECK(t.within_nodes == moe::link_traffic{2, 2});
  CHECK(t.between_nodes == moe::link_traffic{4, 4});
}

TEST_CASE("comm/traffic: the modelled time of small exchanges, by hand") {
  auto const time = [](auto const& path, topology const& ranks, double bytes) {
    return moe::modelled_seconds(moe::make_plans(path, ranks), ranks, machine, bytes);
  };
  using doctest::Approx;
  // One message of 3 bytes on each link.
  CHECK(time(moe::flat{}, topology::even(1, 2), 3) == Approx(8 + 1 + 3 * 2));
  CHECK(time(moe::flat{}, topology::even(2, 1), 3) == Approx(80 + 10 + 3 * 20));
  // Both classes at once: the slower one. Two messages between nodes against one.
  CHECK(time(moe::flat{}, topology::even(2, 2), 3) == Approx(80 + 2 * 10 + 2 * 3 * 20));
  // Two hops: one message of two slots between nodes; then one slot inside.
  CHECK(time(moe::two_hop{}, topology::even(2, 2), 3) ==
        Approx(80 + 10 + 2 * 3 * 20 + 8 + 1 + 3 * 2));
  CHECK(time(moe::flat{}, topology::even(1, 1), 3) == Approx(0));
  CHECK(moe::modelled_seconds({}, topology::even(1, 1), machine, 3) == 0);
  // Copies are read and written: one slot of the rank's own.
  moe::machine_speed slow = machine;
  slow.copied_bytes_per_second = 2;
  auto const plans = moe::make_plans(moe::flat{}, topology::even(1, 1));
  CHECK(moe::modelled_seconds(plans, topology::even(1, 1), slow, 3) == Approx(3));
}

TEST_CASE("comm/traffic: two hops win where messages cost, and lose where bytes do") {
  topology const ranks = topology::even(8, 8);
  auto const flat = moe::make_plans(moe::flat{}, ranks),
             two = moe::make_plans(moe::two_hop{}, ranks);
  constexpr moe::machine_speed cluster{.within_nodes = {4e-6, 0.5e-6, 371e9},
                                       .between_nodes = {14e-6, 2e-6, 45e9},
                                       .copied_bytes_per_second = 2e12};
  auto const gain = [&](double bytes) {
    return modelled_seconds(flat, ranks, cluster, bytes) /
           modelled_seconds(two, ranks, cluster, bytes);
  };
  CHECK(gain(4096) > 2);
  CHECK(gain(4 << 20) < 1);
}
