// All-to-all of equal blocks over threads: every strategy beside an exchange by hand.
// SPDX-License-Identifier: MIT
//
// Threads have no network: what a strategy costs shows here, not what it gains. Messages and bytes are those
// of all ranks together.
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstring>
#include <string>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/grid.hpp>
#include <moe/comm/leader.hpp>
#include <moe/comm/make_plan.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

#include "rank_timing.hpp"

namespace {

using bytes = std::vector<unsigned char>;

/// Rank s sends block d to rank d. No two blocks of a rank are alike.
struct blocks {
  int R, m;  // bytes of each
  bytes in, out, expected;

  blocks(int ranks, int rank, int bytes_of_block)
      : R(ranks),
        m(bytes_of_block),
        in(static_cast<std::size_t>(R * m)),
        out(in.size()),
        expected(in.size()) {
    for (int i = 0; i < R * m; ++i) {
      auto const at = static_cast<std::size_t>(i);
      in[at] = value(rank, i / m, i % m);
      expected[at] = value(i / m, rank, i % m);
    }
  }
  static unsigned char value(int source, int destination, int place) {
    return static_cast<unsigned char>(37 * source + 11 * destination + place);
  }
};

/// One rank's exchange by a plan.
class by_plan {
 public:
  by_plan(moe::thread_communicator& comm, moe::exchange_plan const& plan, int m)
      : blocks_(comm.size(), comm.rank(), m), sizes_(plan), exchange_(comm) {
    sizes_.bind_equal(1);
  }
  bool run() {
    blocks& b = blocks_;
    return static_cast<bool>(exchange_.run<unsigned char>(
        sizes_, {b.in.data(), b.R, b.m}, {b.out.data(), b.R, b.m}, moe_bench::soon()));
  }
  bool is_right() const { return blocks_.out == blocks_.expected; }

 private:
  blocks blocks_;
  moe::bound_plan sizes_;
  moe::rank_exchange<moe::thread_communicator> exchange_;
};

/// One rank's exchange by hand: a message to each, all at once.
class by_hand {
 public:
  by_hand(moe::thread_communicator& comm, int m)
      : comm_(&comm), blocks_(comm.size(), comm.rank(), m) {
    for (int i = 1; i < comm.size(); ++i) {
      int const to = (comm.rank() + i) % comm.size();
      int const from = (comm.rank() - i + comm.size()) % comm.size();
      sends_.push_back({block(blocks_.in, to), static_cast<std::size_t>(m), to});
      receives_.push_back({block(blocks_.out, from), static_cast<std::size_t>(m), from});
    }
  }
  bool run() {
    int const own = comm_->rank();
    std::memcpy(block(blocks_.out, own), block(blocks_.in, own),
                static_cast<std::size_t>(blocks_.m));
    return static_cast<bool>(
        moe::exchange_now(*comm_, sends_, receives_, ticket_, moe_bench::soon()));
  }
  bool is_right() const { return blocks_.out == blocks_.expected; }

 private:
  std::byte* block(bytes& of, int i) const {
    return reinterpret_cast<std::byte*>(of.data()) + static_cast<std::ptrdiff_t>(i) * blocks_.m;
  }

  moe::thread_communicator* comm_;
  blocks blocks_;
  std::vector<moe::outgoing> sends_;
  std::vector<moe::incoming> receives_;
  moe::thread_communicator::ticket ticket_;
};

template <class Run>
void add(char const* name, int R, int m, Run const& run) {
  std::string const full =
      "all_to_all/R:" + std::to_string(R) + "/m:" + std::to_string(m) + "/" + name;
  benchmark::RegisterBenchmark(full.c_str(), run)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Iterations(9);
}

template <class Strategy>
void add_strategy(char const* name, Strategy const& strategy, moe::topology const& nodes, int m) {
  add(name, nodes.size(), m, [=](benchmark::State& state) {
    std::vector<moe::exchange_plan> const plans = moe::make_plans(strategy, nodes);
    moe_bench::time_ranks(state, nodes.size(), [&](moe::thread_communicator& comm) {
      return by_plan(comm, plans[static_cast<std::size_t>(comm.rank())], m);
    });
    auto const t = count_traffic(plans, nodes);
    auto const rows = [](moe::link_traffic const& link) {
      return moe::link_rows{link.messages, static_cast<double>(link.slots)};
    };
    moe_bench::count(state,
                     {rows(t.within_nodes), rows(t.between_nodes), t.copies,
                      static_cast<double>(t.copied_slots)},
                     m);
  });
}

int const registered = [] {
  for (int const G : {2, 4})
    for (int const m : {64, 1 << 10, 8 << 10, 64 << 10}) {
      constexpr int N = 2;
      moe::topology const nodes = moe::topology::even(N, G);
      add("by_hand", N * G, m, [=](benchmark::State& state) {
        moe_bench::time_ranks(state, N * G,
                              [&](moe::thread_communicator& comm) { return by_hand(comm, m); });
      });
      add_strategy("flat", moe::flat{}, nodes, m);
      add_strategy("two_hop_inter", moe::two_hop{}, nodes, m);
      add_strategy("two_hop_intra", moe::two_hop{moe::first_hop::intra}, nodes, m);
      add_strategy("grid", moe::grid<2>{{N, G}}, nodes, m);
      add_strategy("leader", moe::leader{}, nodes, m);
    }
  return 0;
}();

}  // namespace
