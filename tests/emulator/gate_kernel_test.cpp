#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/gate_kernel.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

#include "emulator/block_emulator.hpp"
#include "support/laws.hpp"

namespace {

/// Everything that routing writes.
struct result {
  std::vector<int> expert;
  std::vector<float> weight, score, scores;
  std::vector<std::int32_t> counts;  // [chunks,E]

  bool operator==(result const&) const = default;
};

struct problem {
  std::int64_t T;
  int E;
  int chunk;
  std::vector<float> logits;
  std::vector<std::uint8_t> live;
  bool keep_scores;

  problem(std::int64_t tokens, int experts, int tokens_of_a_block, bool scores_too)
      : T(tokens), E(experts), chunk(tokens_of_a_block), keep_scores(scores_too) {
    for (std::int64_t t = 0; t < T; ++t) {
      // Some tokens have no candidate, few, or ties.
      auto row = moe_test::law_scores<float>(E, static_cast<unsigned>(t), t % 5 == 1 ? 0.9 : 0.0);
      for (float& l : row) {
        if (t % 5 == 2) l = static_cast<float>(static_cast<int>(l));
        if (t % 11 == 3) l = moe::no_score<float>;
      }
      logits.insert(logits.end(), row.begin(), row.end());
      live.push_back(t % 7 == 4 ? 0 : 1);
    }
    auto const last_of = [&](std::int64_t t) -> float& {
      return logits[static_cast<std::size_t>((t + 1) * E - 1)];
    };
    if (T > 4) last_of(4) = -moe::no_score<float>;
    if (T > 6) last_of(6) = std::numeric_limits<float>::quiet_NaN();
  }

  moe::batch tokens() const {
    return {.first_id = 100, .seed = 3, .step = 2, .training = true, .live = live.data()};
  }
  int blocks() const { return static_cast<int>((T + chunk - 1) / chunk); }
};

/// Calls f(routing, scores, counts), whose arrays come back as the result.
template <class Gate, class F>
result collect(Gate const& gate, problem const& p, F const& f) {
  moe::basic_routing_buffer<float> routed(p.T, gate.k(), p.E);
  result r;
  r.scores.resize(p.keep_scores ? p.logits.size() : 0);
  r.counts.resize(static_cast<std::size_t>(p.blocks() * p.E), -1);
  moe::matrix_view<float> scores;
  if (p.keep_scores) scores = moe::matrix_view<float>(r.scores.data(), p.T, p.E);
  routed.tokens = p.tokens();
  f(routed, scores, r.counts.data());
  std::int64_t const pairs = p.T * gate.k();
  r.expert.assign(routed.expert, routed.expert + pairs);
  r.weight.assign(routed.weight, routed.weight + pairs);
  r.score.assign(routed.score, routed.score + pairs);
  return r;
}

/// Of `route`; the counts counted.
template <class Gate>
result on_cpu(Gate const& gate, problem const& p) {
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<Gate>(exec, p.E));
  return collect(gate, p, [&](auto& routed, auto scores, std::int32_t* counts) {
    moe::route(exec, gate, moe::matrix_view(p.logits, p.T, p.E), p.tokens(), scratch, routed,
               scores);
    std::fill_n(counts, p.blocks() * p.E, 0);
    for (std::int64_t i = 0; i < p.T * routed.K; ++i)
      if (routed.expert[i] >= 0) ++counts[i / routed.K / p.chunk * p.E + routed.expert[i]];
  });
}

/// The kernel gives what `route` gives, in every schedule.
template <int MaxE, int Width, class Gate>
void check_kernel(Gate const& gate, problem const& p) {
  result const expected = on_cpu(gate, p);
  moe::matrix_view<float const> const logits(p.logits.data(), p.T, p.E);
  for (auto const order : moe_test::schedules) {
    // A race shows in any schedule, and the thread sanitizer is slow.
    if (moe_test::has_thread_sanitizer && order != moe_test::schedule::shuffled) continue;
    CAPTURE(p.E);
    CAPTURE(static_cast<int>(order));
    result const found = collect(gate, p, [&](auto& routed, auto scores, std::int32_t* counts) {
      moe::gate_kernel<Gate, MaxE, Width, Width <= 32 ? 64 : Width> const kernel{gate};
      moe_test::launch(order, 1, p.blocks(), kernel, logits, p.chunk,
                       static_cast<moe::routing const&>(routed), scores, counts);
    });
    CHECK(found.expert == expected.expert);
    CHECK(found.weight == expected.weight);
    CHECK(found.score == expected.score);
    CHECK(found.scores == expected.scores);
    CHECK(found.counts == expected.counts);
  }
}

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;
using wide = moe::gate<moe::sigmoid, moe::top_k<16>, moe::scaled<moe::renormalised>>;
using sampled = moe::gate<moe::softmax, moe::sampled<moe::top_k<2>>, moe::as_scored>;

}  // namespace

TEST_CASE("gate/gate_kernel: routes as the CPU does, one token in a part of a warp") {
  check_kernel<8, 1>(mixtral{}, problem(37, 5, 20, true));
  check_kernel<8, 8>(mixtral{}, problem(37, 8, 10, true));
  check_kernel<64, 8>(mixtral{}, problem(37, 60, 12, false));
  check_kernel<1024, 32>(mixtral{}, problem(21, 160, 8, true));
  check_kernel<1024, 32>(mixtral{}, problem(6, 1000, 4, false));
}

TEST_CASE("gate/gate_kernel: routes as the CPU does, one token in a block") {
  check_kernel<4096, 128>(mixtral{}, problem(9, 4096, 5, true));
  check_kernel<384, 96>(mixtral{}, problem(9, 300, 5, false));
}

TEST_CASE("gate/gate_kernel: any K, random policies") {
  check_kernel<64, 16>(wide{{}, moe::top_k<16>(11), {.factor = 2.5f}}, problem(20, 33, 7, true));
  check_kernel<64, 8>(sampled{}, problem(20, 40, 7, true));
}

TEST_CASE("gate/gate_kernel: no tokens, one expert") {
  check_kernel<8, 8>(mixtral{}, problem(0, 4, 3, true));
  check_kernel<8, 8>(moe::gate<moe::softmax, moe::top_k<1>, moe::as_scored>{},
                     problem(10, 1, 3, true));
}
