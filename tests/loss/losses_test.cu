#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/core/thread_team.hpp>
#include <moe/loss/importance.cuh>
#include <moe/loss/load_balance.cuh>
#include <moe/loss/z_loss.cuh>

#include "support/device.cuh"

using moe_test::on_device;

namespace {

constexpr std::int64_t T = 4096;
constexpr int E = 256, K = 8;

/// A batch with everything that losses skip, on both sides.
struct problem {
  std::vector<float> scores = std::vector<float>(T * E), threshold = std::vector<float>(T);
  std::vector<std::uint8_t> live = std::vector<std::uint8_t>(T);
  moe::basic_routing_buffer<float> routing{T, K, E};
  on_device<float> scores_there, threshold_there;
  on_device<std::uint8_t> live_there;
  on_device<std::int32_t> expert_there;
  moe::routing there;

  problem() : problem(std::mt19937(1)) {}

  moe::matrix_view<float const> here() const { return {scores.data(), T, E}; }
  moe::matrix_view<float const> on_gpu() const { return {scores_there.data(), T, E}; }

 private:
  explicit problem(std::mt19937 random)
      : scores_there((fill(random), scores)),
        threshold_there(threshold),
        live_there(live),
        expert_there(std::vector<std::int32_t>(routing.expert, routing.expert + T * K)),
        there(routing) {
    there.expert = expert_there.data();
    there.weight = there.score = nullptr;
    there.tokens.live = live_there.data();
  }

  void fill(std::mt19937& random) {
    auto const unit = [&] { return static_cast<float>(random() >> 8) * 0x1p-24f; };
    for (float& s : scores) s = unit() < 0.1f ? moe::no_score<float> : unit();
    for (float& x : threshold) x = unit() < 0.1f ? std::numeric_limits<float>::quiet_NaN() : unit();
    for (auto& l : live) l = unit() < 0.8f ? 1 : 0;
    for (std::int64_t i = 0; i < T * K; ++i)
      routing.expert[i] = static_cast<std::int32_t>(unit() * (E + 2)) - 1;
    for (std::int64_t t = 4; t < T; t += 9) routing.expert[t * K] = moe::invalid_token;
    routing.tokens.live = live.data();
  }
};

void check_close(std::vector<float> const& found, std::vector<float> const& expected) {
  std::size_t wrong = 0;
  for (std::size_t i = 0; i < found.size(); ++i)
    wrong += found[i] == doctest::Approx(expected[i]).epsilon(1e-5) ? 0 : 1;
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("loss on a GPU: losses and gradients of the CPU, twice the same, in a graph, too") {
  MOE_NEEDS_GPU();
  problem const p;
  moe::gpu const exec;
  moe::cpu const cpu;
  moe::load_balance_rule const rule{moe::load_balance_rule::counted::all,
                                    moe::load_balance_rule::masked_tokens::left_out};
  moe::buffer const room(moe::importance_and_load_scratch(T, E) + 4096);
  moe::gpu_buffer const scratch(moe::importance_and_load_scratch(exec, T, E) + 4096);
  on_device<double> const losses(6);
  auto const enqueue = [&](moe::gpu const& on, double* out) {
    moe::load_balance(on, p.on_gpu(), p.there, rule, scratch, out);
    moe::z_loss(on, p.on_gpu(), p.there.tokens, scratch, out + 1);
    moe::importance_and_load(on, p.on_gpu(), {p.threshold_there.data(), T}, 1.5, p.there.tokens,
                             scratch, out + 2);
  };
  enqueue(exec, losses.data());
  auto const direct = losses.get();
  moe_test::replay_as_graph([&](moe::gpu const& on) { enqueue(on, losses.data() + 3); });
  auto const found = losses.get();
  double const expected[] = {
      moe::load_balance(cpu, p.here(), p.routing, rule, room),
      moe::z_loss(cpu, p.here(), p.routing.tokens, room),
      moe::importance_and_load(cpu, p.here(), p.threshold, 1.5, p.routing.tokens, room)};
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(direct[i] == doctest::Approx(expected[i]).epsilon(1e-11));
    CHECK(found[3 + i] == direct[i]);
  }

  std::vector<float> d(E), dl(T * E, 0.5f), ds(T * E), dbar(T);
  on_device<float> const d_there(E), dl_there(dl), ds_there(T * E), dbar_there(T);
  moe::load_balance_backward(cpu, p.routing, rule, 0.3, room, d);
  moe::load_balance_backward(exec, p.there, rule, 0.3, scratch, {d_there.data(), E});
  check_close(d_there.get(), d);
  moe::z_loss_backward<float const, float>(cpu, p.here(), p.routing.tokens, 0.3, room,
                                           {dl.data(), T, E});
  moe::z_loss_backward<moe::gpu, float const, float>(exec, p.on_gpu(), p.there.tokens, 0.3, scratch,
                                                     {dl_there.data(), T, E});
  check_close(dl_there.get(), dl);
  moe::importance_and_load_backward<float const, float>(
      cpu, p.here(), p.threshold, 1.5, p.routing.tokens, 0.3, room, {ds.data(), T, E}, dbar);
  moe::importance_and_load_backward<moe::gpu, float const, float>(
      exec, p.on_gpu(), {p.threshold_there.data(), T}, 1.5, p.there.tokens, 0.3, scratch,
      {ds_there.data(), T, E}, {dbar_there.data(), T});
  check_close(ds_there.get(), ds);
  check_close(dbar_there.get(), dbar);
}
