// Tokens to the ranks of their experts and back over threads: strategies beside one row for each choice.
// SPDX-License-Identifier: MIT
//
// A run tells all ranks what comes, brings the tokens, and adds up what comes back; experts do nothing.
// Threads have no network: compare bytes between nodes, and what a strategy costs.
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/deduplicated.hpp>
#include <moe/comm/expert_hosts.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/sharded.hpp>
#include <moe/comm/slot_names.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/comm/traffic.hpp>
#include <moe/comm/two_hop.hpp>

#include "rank_timing.hpp"

namespace {

struct shape {
  int N, G;
  std::int64_t T;  // of each rank
  int E, K;
  std::int64_t M;

  int ranks() const { return N * G; }
};

/// One rank's tokens, the experts that they chose at random, and what comes back.
struct tokens {
  shape s;
  std::vector<std::int32_t> keys;  // [T,K]
  std::vector<float> in, out;      // [T,M]

  tokens(shape const& given, int rank)
      : s(given), in(static_cast<std::size_t>(s.T * s.M)), out(in.size()) {
    std::mt19937 random(static_cast<unsigned>(rank));
    std::vector<std::int32_t> experts(static_cast<std::size_t>(s.E));
    std::iota(experts.begin(), experts.end(), 0);
    for (std::int64_t t = 0; t < s.T; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      keys.insert(keys.end(), experts.begin(), experts.begin() + s.K);
    }
    for (float& x : in) x = static_cast<float>(random() % 256);  // sums are exact
  }
  int host(std::int64_t t, int k) const {
    return keys[static_cast<std::size_t>(t * s.K + k)] / (s.E / s.ranks());
  }
  /// Whether a token wants any of these ranks.
  bool wants(std::int64_t t, int first, int span) const {
    for (int k = 0; k < s.K; ++k)
      if (host(t, k) >= first && host(t, k) < first + span) return true;
    return false;
  }
  /// `times(t)`: how often token t has been sent.
  template <class Times>
  bool came_back(Times const& times) const {
    for (std::int64_t t = 0; t < s.T; ++t)
      for (std::int64_t c = 0; c < s.M; ++c) {
        auto const i = static_cast<std::size_t>(t * s.M + c);
        if (out[i] != static_cast<float>(times(t)) * in[i]) return false;
      }
    return true;
  }
};

template <class Strategy>
class by_strategy {
 public:
  by_strategy(moe::thread_communicator& comm, moe::topology const& nodes, Strategy const& strategy,
              shape const& s)
      : tokens_(s, comm.rank()),
        exchange_(comm, nodes, strategy,
                  moe::expert_hosts(
                      s.E, {.expert_parallel = s.ranks(), .experts_per_rank = s.E / s.ranks()},
                      comm.rank())),
        rows_(static_cast<std::size_t>(exchange_.most_rows(s.T) * s.M)) {}

  bool run() {
    shape const& s = tokens_.s;
    if (!exchange_.bind(0, {tokens_.keys.data(), s.T, s.K})) return false;
    moe::matrix_view<float> const rows(rows_.data(), exchange_.rows(0), s.M);
    return exchange_.template begin_dispatch<float>(
               0, moe::matrix_view<float const>(tokens_.in.data(), s.T, s.M), rows) &&
           exchange_.finish_dispatch() &&
           exchange_.template begin_combine<float>(
               0, rows, moe::matrix_view<float>(tokens_.out.data(), s.T, s.M)) &&
           exchange_.finish_combine();
  }
  bool is_right() const {
    bool constexpr to_all = std::is_same_v<Strategy, moe::sharded>;
    int const R = tokens_.s.ranks();
    return tokens_.came_back([&](std::int64_t t) {
      int n = to_all ? R : 0;
      for (int d = 0; d < R && !to_all; ++d) n += tokens_.wants(t, d, 1);
      return n;
    });
  }

 private:
  tokens tokens_;
  moe::token_exchange<moe::thread_communicator> exchange_;
  std::vector<float> rows_;
};

/// A row for each choice of a token, by expert, in one exchange of counts, one of rows, and one back.
class by_choice {
 public:
  by_choice(moe::thread_communicator& comm, shape const& s)
      : comm_(&comm),
        tokens_(s, comm.rank()),
        sent_(static_cast<std::size_t>(s.ranks())),
        received_(sent_.size()),
        sent_rows_(static_cast<std::size_t>(s.T * s.K * s.M)),
        received_rows_(sent_rows_.size() * sent_.size()) {}

  bool run() {
    shape const& s = tokens_.s;
    std::int64_t const R = s.ranks(), N = s.T * s.K;
    std::fill(sent_.begin(), sent_.end(), 0);
    float* next = sent_rows_.data();
    for (int d = 0; d < R; ++d)
      for (std::int64_t t = 0; t < s.T; ++t)
        for (int k = 0; k < s.K; ++k)
          if (tokens_.host(t, k) == d) {
            ++sent_[static_cast<std::size_t>(d)];
            next = std::copy_n(tokens_.in.data() + t * s.M, s.M, next);
          }
    if (!moe::all_to_all<std::int64_t>(*comm_, {sent_.data(), R}, {received_.data(), R},
                                       moe_bench::soon()))
      return false;
    std::int64_t const come = std::reduce(received_.begin(), received_.end());
    if (!moe::all_to_all_v<float>(*comm_, {sent_rows_.data(), N, s.M}, {sent_.data(), R},
                                  {received_rows_.data(), come, s.M}, {received_.data(), R},
                                  moe_bench::soon()) ||
        !moe::all_to_all_v<float>(*comm_, {received_rows_.data(), come, s.M}, {received_.data(), R},
                                  {sent_rows_.data(), N, s.M}, {sent_.data(), R},
                                  moe_bench::soon()))
      return false;
    std::fill(tokens_.out.begin(), tokens_.out.end(), 0.f);
    float const* row = sent_rows_.data();
    for (int d = 0; d < R; ++d)
      for (std::int64_t t = 0; t < s.T; ++t)
        for (int k = 0; k < s.K; ++k)
          if (tokens_.host(t, k) == d)
            for (std::int64_t c = 0; c < s.M; ++c)
              tokens_.out[static_cast<std::size_t>(t * s.M + c)] += *row++;
    return true;
  }
  bool is_right() const {
    return tokens_.came_back([&](std::int64_t) { return tokens_.s.K; });
  }

 private:
  moe::thread_communicator* comm_;
  tokens tokens_;
  std::vector<std::int64_t> sent_, received_;
  std::vector<float> sent_rows_, received_rows_;
};

template <class Run>
void add(char const* name, shape const& s, Run const& run) {
  std::string const full = "tokens/R:" + std::to_string(s.ranks()) + "/T:" + std::to_string(s.T) +
                           "/E:" + std::to_string(s.E) + "/K:" + std::to_string(s.K) +
                           "/M:" + std::to_string(s.M) + "/" + name;
  benchmark::RegisterBenchmark(full.c_str(), run)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond)
      ->Iterations(5);
}

/// Rows there and back, without counts and keys.
template <class Strategy>
void add_strategy(char const* name, Strategy const& strategy, shape const& s) {
  add(name, s, [=](benchmark::State& state) {
    moe::topology const nodes = moe::topology::even(s.N, s.G);
    moe_bench::time_ranks(state, s.ranks(), [&](moe::thread_communicator& comm) {
      return by_strategy<Strategy>(comm, nodes, strategy, s);
    });
    std::vector<tokens> all;
    all.reserve(static_cast<std::size_t>(s.ranks()));
    for (int r = 0; r < s.ranks(); ++r) all.emplace_back(s, r);
    auto const rows_of = [&](moe::piece const& p) {
      tokens const& from = all[static_cast<std::size_t>(p.source)];
      double rows = 0;
      for (std::int64_t t = 0; t < s.T; ++t) rows += from.wants(t, p.destination, p.span);
      return rows;
    };
    auto plans = moe::make_token_plans(strategy, nodes);
    auto sum = count_traffic(plans, nodes, moe::slot_names(plans), rows_of);
    for (moe::exchange_plan& p : plans) p = transpose(p);
    auto const back = count_traffic(plans, nodes, moe::slot_names(plans), rows_of);
    sum.within_nodes.messages += back.within_nodes.messages;
    sum.within_nodes.rows += back.within_nodes.rows;
    sum.between_nodes.messages += back.between_nodes.messages;
    sum.between_nodes.rows += back.between_nodes.rows;
    sum.copied_rows += back.copied_rows;
    moe_bench::count(state, sum, static_cast<double>(s.M) * sizeof(float));
  });
}

int const registered = [] {
  for (int const G : {2, 4})
    for (std::int64_t const T : {64, 512})
      for (int const K : {2, 8}) {
        shape const s{.N = 2, .G = G, .T = T, .E = 64, .K = K, .M = 512};
        add("by_choice", s, [=](benchmark::State& state) {
          moe_bench::time_ranks(state, s.ranks(),
                                [&](moe::thread_communicator& comm) { return by_choice(comm, s); });
        });
        add_strategy("flat", moe::flat{}, s);
        add_strategy("two_hop_inter", moe::two_hop{}, s);
        add_strategy("deduplicated", moe::deduplicated{}, s);
        add_strategy("sharded", moe::sharded{}, s);
      }
  return 0;
}();

}  // namespace
