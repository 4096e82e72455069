// Logits, choices and sums on a GPU that benchmarks of gates share, and what they have to equal.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <type_traits>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/gpu.cuh>
#include <moe/core/memory.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/routing.cuh>

#include "support/gpu_problem.cuh"

namespace moe_bench {

/// Mixtral and Qwen3.
template <int K>
inline constexpr moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised> softmax_gate{};
/// DeepSeek-V3 without its groups and biases.
inline constexpr moe::gate<moe::sigmoid, moe::top_k<8>, moe::scaled<moe::renormalised>>
    sigmoid_gate{.weigh = {.factor = 2.5f, .weigh = {.floor = 1e-20f}}};

template <class L>
inline constexpr char const* name_of = std::is_same_v<L, bf16> ? "bf16" : "float";

/// The model cases, and what the targets ask for besides: T=8192 of 256 experts, a token of 512.
inline std::vector<batch_case> gate_cases() {
  auto all = all_cases();
  all.push_back({models[1], 8192});
  all.push_back({{"512_experts", 512, 8, 4096}, 1});
  return all;
}

/// T rows of E logits, whose K highest are those that `make_routing` draws, in distribution.
template <class L>
std::vector<L> make_logits(batch_case const& c) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> unit(1e-6f, 1 - 1e-6f);
  std::vector<L> logits;
  logits.reserve(static_cast<std::size_t>(c.T * c.of.E));
  for (std::int64_t t = 0; t < c.T; ++t)
    for (int e = 0; e < c.of.E; ++e) {
      float const rarity = c.zipf ? std::log(static_cast<float>(e + 1)) : 0;
      logits.push_back(static_cast<L>(-std::log(-std::log(unit(random))) - rarity));
    }
  return logits;
}

/// So that nothing that another kernel left passes for a result.
inline void forget(moe::gpu const& exec, moe::routing const& routed) {
  auto const bytes = static_cast<std::size_t>(routed.pairs()) * 4;
  exec.fill(routed.expert, 0x7f, bytes);
  exec.fill(routed.weight, 0x7f, bytes);
}

/// Choices of the same tokens on the CPU, and the scores they were made by.
struct expected_routing {
  moe::routing_buffer routed;
  std::vector<float> scores;

  template <class Gate, class L>
  expected_routing(moe::cpu const& host, Gate const& gate, moe::matrix_view<L> logits)
      : routed(logits.rows(), gate.k(), static_cast<int>(logits.cols())),
        scores(static_cast<std::size_t>(logits.rows() * logits.cols())) {
    moe::buffer const scratch(moe::route_scratch<Gate>(host, routed.E));
    moe::route(host, gate, logits, moe::batch{}, scratch, routed,
               moe::matrix_view(scores, logits.rows(), logits.cols()));
  }

  /// Whether arrays of the device hold the same experts, except where two scores are as good as equal,
  /// and weights within `scale`, relative where they are above 1.
  /// @param tie  How far apart, relatively, scores may be that are as good as equal.
  bool equals(std::int32_t const* expert, float const* weight, float scale, float tie) const {
    auto const ids = download(expert, routed.pairs());
    auto const weights = download(weight, routed.pairs());
    for (std::int64_t i = 0; i < routed.pairs(); ++i) {
      auto const n = static_cast<std::size_t>(i);
      if (ids[n] < 0 || ids[n] >= routed.E) return false;
      float const* const row = scores.data() + i / routed.K * routed.E;
      float const best = row[routed.expert[i]];
      if (!(std::abs(row[ids[n]] - best) <= tie * best)) return false;
      if (!(std::abs(weights[n] - routed.weight[i]) <= scale * (1 + routed.weight[i])))
        return false;
    }
    return true;
  }
};

/// Device memory for one case, in sets that follow one another.
template <class L>
struct gate_problem {
  struct set {
    moe::matrix_view<L> logits, dlogits;  // [T,E]
    float* dweight;                       // [T,K]
    moe::routing routed;
    moe::gate_sums sums;
  };

  moe::gpu exec;  // first: without a device nothing else is tried
  batch_case of;
  std::vector<L> logits;
  std::vector<float> dweight, dexpert;  // [T,K], [E]
  moe::gpu_buffer room, shared;
  std::vector<set> sets;

  explicit gate_problem(batch_case const& c)
      : of(c),
        logits(make_logits<L>(c)),
        dweight(random_values(c.pairs())),
        dexpert(random_values(c.of.E)),
        shared(dexpert.size() * sizeof(float)) {
    int const E = c.of.E, K = c.of.K;
    auto const size = static_cast<std::int64_t>(logits.size());
    int const count =
        sets_past_cache(logits.size() * sizeof(L) + 8 * static_cast<std::size_t>(c.pairs()));
    std::size_t const bytes = moe::memory_size()
                                  .template add<L>(size)
                                  .template add<L>(size)
                                  .template add<float>(c.pairs())
                                  .bytes() +
                              moe::routing_bytes(c.T, K) + moe::gate_sums_bytes(c.T, E);
    room = moe::gpu_buffer(bytes * static_cast<std::size_t>(count));
    upload(static_cast<float*>(shared.data()), dexpert.data(), E);
    moe::memory from = room;
    auto const site = moe::call_site::here();
    for (int n = 0; n < count; ++n) {
      set s;
      s.logits = {from.take<L>(size, "benchmark", site), c.T, E};
      s.dlogits = {from.take<L>(size, "benchmark", site), c.T, E};
      s.dweight = from.take<float>(c.pairs(), "benchmark", site);
      s.routed = moe::carve_routing(exec, from, c.T, K, E);
      s.routed.score = nullptr;
      s.sums = moe::carve_gate_sums(from, c.T, E);
      if (n == 0) {
        upload(s.logits.data(), logits.data(), size);
        upload(s.dweight, dweight.data(), c.pairs());
      } else {
        copy_on_device(s.logits.data(), sets[0].logits.data(), size);
        copy_on_device(s.dweight, sets[0].dweight, c.pairs());
      }
      sets.push_back(s);
    }
  }

  int count() const { return static_cast<int>(sets.size()); }
  set const& at(int n) const { return sets[static_cast<std::size_t>(n)]; }
  moe::matrix_view<L const> on_host() const { return {logits.data(), of.T, of.of.E}; }
  moe::vector_view<float const> dexpert_there() const {
    return {static_cast<float const*>(shared.data()), of.of.E};
  }
  /// Bytes of logits; of ids and weights.
  double logit_bytes() const { return static_cast<double>(logits.size() * sizeof(L)); }
  double choice_bytes() const { return 8.0 * static_cast<double>(of.pairs()); }

 private:
  static std::vector<float> random_values(std::int64_t size) {
    std::mt19937 random(2);
    std::uniform_real_distribution<float> unit(-1, 1);
    std::vector<float> values(static_cast<std::size_t>(size));
    for (float& v : values) v = unit(random);
    return values;
  }
};

}  // namespace moe_bench
