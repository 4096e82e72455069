// The kernels that route on a GPU, against the CPU.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/project_and_route.cuh>
#include <moe/gate/route.cuh>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/loss/gate_losses.cuh>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/z_loss.hpp>

#include "support/device.cuh"
#include "support/random.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::on_device;

using any_k = moe::gate<moe::softmax, moe::top_k<8>, moe::renormalised>;

template <class T>
std::size_t size_of(T count) {
  return static_cast<std::size_t>(count);
}

/// Logits of T tokens on both sides, some tokens masked or invalid or without enough candidates.
struct problem {
  std::int64_t T;
  int E;
  any_k gate;
  std::vector<float> logits;
  std::vector<std::uint8_t> live;
  on_device<float> device_logits;
  on_device<std::uint8_t> device_live;

  problem(std::int64_t tokens, int experts, int k)
      : T(tokens),
        E(experts),
        gate{.select = moe::top_k<8>(k)},
        logits(make(tokens, experts)),
        live(size_of(tokens), 1),
        device_logits(logits),
        device_live(mask(live)) {}

  static std::vector<float> make(std::int64_t T, int E) {
    auto values = moe_test::normals<float>(T * E, 1, 0, 2);
    for (std::int64_t t = 0; t < T; ++t) {
      float* const row = values.data() + t * E;
      if (t % 17 == 3) row[E - 1] = std::numeric_limits<float>::quiet_NaN();
      if (t % 19 == 5) std::fill(row + 1, row + E, moe::no_score<float>);
      if (t % 23 == 7) std::fill(row, row + E, 0.5f);
    }
    return values;
  }
  static std::vector<std::uint8_t> const& mask(std::vector<std::uint8_t>& live) {
    for (std::size_t t = 4; t < live.size(); t += 13) live[t] = 0;
    return live;
  }

  moe::batch tokens() const { return {.live = live.data()}; }
  moe::batch device_tokens() const { return {.live = device_live.data()}; }
  moe::matrix_view<float const> view() const { return {logits.data(), T, E}; }
  moe::matrix_view<float const> device_view() const { return {device_logits.data(), T, E}; }
};

/// A routing on the device.
struct device_routing {
  on_device<std::int32_t> expert;
  on_device<float> weight, score;
  moe::routing routed;

  device_routing(std::int64_t T, int K, int E)
      : expert(size_of(T * K)), weight(size_of(T * K)), score(size_of(T * K)) {
    routed.T = T;
    routed.K = K;
    routed.E = E;
    routed.expert = expert.data();
    routed.weight = weight.data();
    routed.score = score.data();
  }
};

struct cpu_result {
  moe::routing_buffer routed;
  std::vector<float> scores;

  explicit cpu_result(problem const& p) : routed(p.T, p.gate.k(), p.E), scores(p.logits.size()) {
    moe::cpu const exec;
    moe::buffer const scratch(moe::route_scratch<any_k>(exec, p.E));
    moe::route(exec, p.gate, p.view(), p.tokens(), scratch, routed,
               moe::matrix_view(scores, p.T, p.E));
  }
};

/// The same experts, except where the scores of two differ by less than an exponential's last bits;
/// weights and scores within 1e-5.
void check_close(problem const& p, cpu_result const& expected, device_routing const& found) {
  auto const expert = found.expert.get();
  auto const weight = found.weight.get();
  int const K = p.gate.k();
  int other_experts = 0, other_weights = 0;
  for (std::int64_t i = 0; i < p.T * K; ++i) {
    int const mine = expert[size_of(i)], its = expected.routed.expert[i];
    std::int64_t const t = i / K;
    if (mine != its) {
      bool const both = mine >= 0 && mine < p.E && its >= 0;
      float const a = both ? expected.scores[size_of(t * p.E + mine)] : 0;
      float const b = both ? expected.scores[size_of(t * p.E + its)] : 1;
      if (!(std::abs(a - b) <= 1e-6f * b)) ++other_experts;
    }
    if (!(std::abs(weight[size_of(i)] - expected.routed.weight[i]) <= 1e-5f)) ++other_weights;
  }
  CHECK(other_experts == 0);
  CHECK(other_weights == 0);
}

}  // namespace

TEST_CASE("gate/route on a GPU: as on the CPU") {
  MOE_NEEDS_GPU();
  moe::gpu const exec;
  struct shape {
    std::int64_t T;
    int E, K;
  };
  for (shape const s : {shape{4096, 8, 2}, shape{1, 5, 1}, shape{777, 60, 4}, shape{4096, 64, 6},
                        shape{4096, 128, 8}, shape{4096, 256, 8}, shape{17, 384, 8},
                        shape{500, 512, 8}, shape{100, 1000, 8}, shape{33, 4096, 8}}) {
    CAPTURE(s.T);
    CAPTURE(s.E);
    problem const p(s.T, s.E, s.K);
    cpu_result const expected(p);
    device_routing found(s.T, s.K, s.E);
    on_device<float> scores(p.logits.size());
    moe::route(exec, p.gate, p.device_view(), p.device_tokens(), {}, found.routed,
               {scores.data(), s.T, s.E});
    check_close(p, expected, found);
    auto const all = scores.get();
    int different = 0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      float const a = all[i], b = expected.scores[i];
      different += a == b || std::abs(a - b) <= 1e-6f ? 0 : 1;
    }
    CHECK(different == 0);
  }
}

TEST_CASE("gate/route on a GPU: no tokens") {
  MOE_NEEDS_GPU();
  moe::gpu const exec;
  problem const p(0, 64, 2);
  device_routing found(0, 2, 64);
  moe::route(exec, p.gate, p.device_view(), {}, {}, found.routed);
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
}

TEST_CASE("gate/route on a GPU: sums and losses") {
  MOE_NEEDS_GPU();
  moe::gpu const exec;
  for (int const E : {8, 128, 256, 600}) {
    CAPTURE(E);
    problem const p(4096, E, 8);
    cpu_result const expected(p);
    moe::gpu_buffer const room(moe::gate_sums_bytes(p.T, E));
    moe::memory from = room;
    auto const sums = moe::carve_gate_sums(from, p.T, E);
    device_routing found(p.T, 8, E);
    on_device<double> losses(std::size_t{2});
    on_device<float> dscores(size_of(E));
    moe::route(exec, p.gate, p.device_view(), p.device_tokens(), {}, found.routed, {}, sums);
    moe::load_balance(exec, sums, found.routed, {}, 0.01, losses.data(),
                      {dscores.data(), std::int64_t{E}});
    moe::z_loss(exec, sums, losses.data() + 1);
    check_close(p, expected, found);
    moe::cpu const cpu;
    moe::buffer const scratch(moe::load_balance_scratch(p.T, E) + moe::z_loss_scratch(p.T));
    double const balance = moe::load_balance<float>(cpu, {expected.scores.data(), p.T, E},
                                                    expected.routed, {}, scratch);
    double const z = moe::z_loss(cpu, p.view(), p.tokens(), scratch);
    CHECK(losses.get()[0] == doctest::Approx(balance).epsilon(1e-3));  // a tie may fall otherwise
    CHECK(losses.get()[1] == doctest::Approx(z).epsilon(1e-6));
    // What is counted is what was routed.
    std::vector<std::int32_t> pairs(size_of(sums.chunks * (E + 4)));
    CHECK(cudaMemcpy(pairs.data(), sums.pairs, pairs.size() * 4, cudaMemcpyDeviceToHost) ==
          cudaSuccess);
    auto const expert = found.expert.get();
    for (std::int64_t i = 0; i < p.T * 8; ++i)
      if (int const e = expert[size_of(i)]; e >= 0)
        --pairs[size_of(i / 8 / sums.chunk * (E + 4) + e)];
    int left = 0;
    for (std::int64_t c = 0; c < sums.chunks; ++c)
      for (int e = 0; e < E; ++e) left += pairs[size_of(c * (E + 4) + e)] == 0 ? 0 : 1;
    CHECK(left == 0);
  }
}

TEST_CASE("gate/route_backward on a GPU: as on the CPU") {
  MOE_NEEDS_GPU();
  moe::gpu const exec;
  for (int const E : {8, 60, 128, 256, 500, 1000}) {
    CAPTURE(E);
    problem const p(1000, E, 4);
    cpu_result const expected(p);
    on_device<std::int32_t> const expert(
        std::vector<std::int32_t>(expected.routed.expert, expected.routed.expert + p.T * 4));
    auto const dweight = moe_test::normals<float>(p.T * 4, 2);
    auto const dexpert = moe_test::normals<float>(E, 3);
    on_device<float> const device_dweight(dweight), device_dexpert(dexpert);
    std::vector<float> dlogits(p.logits.size());
    on_device<float> found(p.logits.size());
    moe::cpu const cpu;
    moe::buffer const scratch(moe::route_scratch<any_k>(cpu, E));
    moe::route_backward(cpu, p.gate, p.view(), expected.routed, {dweight.data(), p.T, 4},
                        {.expert = {dexpert.data(), E}}, scratch,
                        moe::matrix_view(dlogits, p.T, E));
    moe::routing chosen = expected.routed;
    chosen.expert = expert.data();
    chosen.tokens = p.device_tokens();
    moe::route_backward(exec, p.gate, p.device_view(), chosen, {device_dweight.data(), p.T, 4},
                        {.expert = {device_dexpert.data(), E}}, {},
                        moe::matrix_view(found.data(), p.T, std::int64_t{E}));
    auto const d = found.get();
    double worst = 0;
    for (std::size_t i = 0; i < d.size(); ++i)
      worst = moe_test::worse(
          worst, std::abs(static_cast<double>(d[i]) - static_cast<double>(dlogits[i])));
    CHECK(worst < 2e-5);
  }
}

TEST_CASE("gate/route on a GPU: a graph that is replayed gives the same") {
  MOE_NEEDS_GPU();
  problem const p(4096, 128, 8);
  device_routing once(p.T, 8, p.E), replayed(p.T, 8, p.E);
  moe::route(moe::gpu{}, p.gate, p.device_view(), p.device_tokens(), {}, once.routed);
  auto const expert = once.expert.get();
  auto const weight = once.weight.get();
  moe_test::replay_as_graph(
      [&](moe::gpu const& exec) {
        moe::route(exec, p.gate, p.device_view(), p.device_tokens(), {}, replayed.routed);
      },
      3);
  CHECK(replayed.expert.get() == expert);
  CHECK(replayed.weight.get() == weight);
}

TEST_CASE("gate/project_and_route on a GPU: a product in double, and the gate of the logits") {
  MOE_NEEDS_GPU();
  moe::gpu const exec;
  on_device<std::int32_t> ticket(std::size_t{1});
  struct shape {
    std::int64_t T;
    int E;
    std::int64_t M;
  };
  for (shape const s : {shape{1, 256, 7168}, shape{16, 256, 7168}, shape{7, 60, 1000},
                        shape{16, 512, 2048}, shape{3, 128, 2049}}) {
    CAPTURE(s.T);
    CAPTURE(s.E);
    auto const numbers = moe_test::normals<float>(s.T * s.M, 4, 0, 0.25);
    auto const weights = moe_test::normals<float>(s.E * s.M, 5, 0, 0.25);
    std::vector<moe::bf16> x, router;
    for (float const v : numbers) x.push_back(static_cast<moe::bf16>(v));
    for (float const v : weights) router.push_back(static_cast<moe::bf16>(v));
    on_device<moe::bf16> const device_x(x), device_router(router);
    on_device<float> logits(size_of(s.T * s.E)), again(size_of(s.T * s.E));
    moe::gpu_buffer const scratch(moe::project_and_route_scratch(exec, s.T, s.E, s.M));
    device_routing found(s.T, 8, s.E), second(s.T, 8, s.E);
    auto const run = [&](device_routing& to, on_device<float>& l) {
      moe::project_and_route(exec, any_k{}, moe::matrix_view(device_x.data(), s.T, s.M),
                             moe::matrix_view(device_router.data(), std::int64_t{s.E}, s.M), {},
                             ticket.data(), scratch, to.routed, {l.data(), s.T, s.E});
    };
    run(found, logits);
    run(second, again);
    CHECK(ticket.get()[0] == 0);
    auto const l = logits.get();
    CHECK(l == again.get());
    CHECK(found.expert.get() == second.expert.get());
    double worst = 0;
    for (std::int64_t t = 0; t < s.T; ++t)
      for (std::int64_t e = 0; e < s.E; ++e) {
        double sum = 0;
        for (std::int64_t m = 0; m < s.M; ++m)
          sum += static_cast<double>(x[size_of(t * s.M + m)]) *
                 static_cast<double>(router[size_of(e * s.M + m)]);
        worst =
            moe_test::worse(worst, std::abs(sum - static_cast<double>(l[size_of(t * s.E + e)])));
      }
    CHECK(worst < 1e-4);
    device_routing routed(s.T, 8, s.E);
    moe::route(exec, any_k{}, moe::matrix_view(logits.data(), s.T, std::int64_t{s.E}), {}, {},
               routed.routed);
    CHECK(routed.expert.get() == found.expert.get());
    CHECK(routed.weight.get() == found.weight.get());
  }
}

TEST_CASE("gate/route on a GPU: more than 2^31 logits") {
  MOE_NEEDS_GPU();
  std::int64_t const E = 512, T = (std::int64_t{1} << 31) / E + 3;
  moe::gpu_buffer room;
  try {
    room = moe::gpu_buffer(size_of(T * E) * sizeof(moe::bf16));
  } catch (moe::cuda_error const&) {
    MESSAGE("SKIPPED: not as much memory");
    return;
  }
  auto* const logits = static_cast<moe::bf16*>(room.data());
  CHECK(cudaMemset(logits, 0, room.size()) == cudaSuccess);
  std::vector<moe::bf16> last(size_of(E), moe::bf16(0.0f));
  last[300] = moe::bf16(3.0f);
  CHECK(cudaMemcpy(logits + (T - 1) * E, last.data(), last.size() * sizeof(moe::bf16),
                   cudaMemcpyHostToDevice) == cudaSuccess);
  using one = moe::gate<moe::softmax, moe::top_k<1>, moe::as_scored>;
  device_routing found(T, 1, static_cast<int>(E));
  moe::route(moe::gpu{}, one{}, moe::matrix_view(logits, T, E), {}, {}, found.routed);
  auto const expert = found.expert.get();
  CHECK(expert[size_of(T - 1)] == 300);
  CHECK(expert[size_of(T - 2)] == 0);
}
