#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.cuh>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/loss/gate_losses.cuh>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/z_loss.hpp>

#include "emulator/emulated_gpu.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"

namespace {

using moe_test::emulated_gpu;
using moe_test::on_emulator;
using moe_test::refusal;
using moe_test::says;

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;
using rule = moe::load_balance_rule;

/// Both losses from a gate's sums, and from all scores on the CPU.
void check(std::int64_t T, int E, std::int64_t chunk, rule const& how) {
  CAPTURE(T);
  CAPTURE(E);
  auto logits = moe_test::normals<float>(T * E, 5, 0, 3);
  std::vector<std::uint8_t> live(static_cast<std::size_t>(T), 1);
  for (std::int64_t t = 0; t < T; ++t) {
    if (t % 6 == 2) live[static_cast<std::size_t>(t)] = 0;
    if (t % 9 == 3) logits[static_cast<std::size_t>(t * E)] = -moe::no_score<float>;
    for (std::int64_t e = 0; e < E && t % 9 == 5; ++e)
      logits[static_cast<std::size_t>(t * E + e)] = moe::no_score<float>;
    if (t % 4 == 1) logits[static_cast<std::size_t>((t + 1) * E - 1)] = 8;  // an uneven load
  }
  moe::batch const tokens{.live = live.data()};
  moe::matrix_view<float const> const in(logits, T, E);

  moe::cpu const cpu;
  moe::buffer const scratch(moe::route_scratch<mixtral>(cpu, E) + moe::load_balance_scratch(T, E) +
                            moe::z_loss_scratch(T));
  moe::routing_buffer routed(T, 2, E);
  std::vector<float> scores(logits.size()), dscores(static_cast<std::size_t>(E));
  moe::matrix_view<float const> const all(scores, T, E);
  moe::route(cpu, mixtral{}, in, tokens, scratch, routed, moe::matrix_view(scores, T, E));
  double const loss = moe::load_balance<float>(cpu, all, routed, how, scratch);
  double const z = moe::z_loss(cpu, in, tokens, scratch);
  moe::load_balance_backward<float>(cpu, routed, how, 0.5, scratch, dscores);

  on_emulator([&](emulated_gpu const& exec) {
    moe::gate_sums sums;
    sums.chunk = chunk;
    sums.chunks = (T + chunk - 1) / chunk;
    std::vector<std::int32_t> pairs(static_cast<std::size_t>(sums.chunks * (E + 4)));
    std::vector<std::int32_t> first(static_cast<std::size_t>(sums.chunks * E));
    std::vector<float> score(first.size());
    std::vector<double> squares(static_cast<std::size_t>(sums.chunks * 2));
    sums.pairs = pairs.data();
    sums.first = first.data();
    sums.score = score.data();
    sums.z = squares.data();
    sums.scores_masked = how.masked == rule::masked_tokens::scored;
    moe::routing_buffer found(T, 2, E);
    moe::route(exec, mixtral{}, in, tokens, {}, found, {}, sums);
    double found_loss = 9, found_z = 9;
    std::vector<float> found_dscores(dscores.size(), 9);
    moe::load_balance(exec, sums, found, how, 0.5, &found_loss, found_dscores);
    moe::z_loss(exec, sums, &found_z);
    CHECK(found_loss == doctest::Approx(loss).epsilon(1e-6));
    CHECK(found_z == doctest::Approx(z).epsilon(1e-6));
    CHECK(found_dscores == dscores);
    moe::load_balance(exec, sums, found, how, 0.5, nullptr, {});
  });
}

}  // namespace

TEST_CASE("loss/load_balance, z_loss on a GPU: from the sums of a gate as from all scores") {
  check(70, 8, 64, {});
  check(40, 20, 3, {rule::counted::all, rule::masked_tokens::scored});
  check(40, 60, 16, {rule::counted::first, rule::masked_tokens::scored});
  check(25, 33, 4, {rule::counted::all, rule::masked_tokens::left_out});
  check(9, 600, 2, {});
}

TEST_CASE("loss/load_balance, z_loss on a GPU: no tokens, none that counts") {
  check(0, 8, 64, {});
  moe::gate_sums sums;
  sums.chunk = 4;
  sums.chunks = 1;
  std::vector<std::int32_t> const pairs{0, 0, 0, 0, 3, 0};  // two experts, all tokens masked
  std::vector<std::int32_t> first(2);
  std::vector<float> score(2);
  std::vector<double> z(2);
  auto counts = pairs;
  sums.pairs = counts.data();
  sums.first = first.data();
  sums.score = score.data();
  sums.z = z.data();
  moe::routing routed;
  routed.T = 3;
  routed.K = 1;
  routed.E = 2;
  emulated_gpu const exec;
  double loss = 9;
  std::vector<float> dscores(2, 9.0f);
  moe::load_balance(exec, sums, routed, {}, 1, &loss, dscores);
  CHECK(loss == 0);
  CHECK(dscores == std::vector<float>{0, 0});
  loss = 9;
  moe::z_loss(exec, sums, &loss);
  CHECK(loss == 0);
}

TEST_CASE("loss/load_balance, z_loss on a GPU: bad input") {
  emulated_gpu const exec;
  moe::routing routed;
  routed.T = 3;
  routed.K = 1;
  routed.E = 2;
  moe::gate_sums sums;
  double loss = 0;
  std::vector<float> dscores(3);
  auto const call = [&](rule const& how, moe::vector_view<float> d) {
    return refusal([&] { moe::load_balance(exec, sums, routed, how, 1, &loss, d); });
  };
  says(call({}, {}), "load_balance: sums are of the routing's tokens; got chunk = 0");
  sums.chunk = 4;
  sums.chunks = 1;
  says(call({}, {}), "load_balance: sums have pairs, scores, and the first choices");
  std::vector<std::int32_t> pairs(6), first(2);
  std::vector<float> score(2);
  sums.pairs = pairs.data();
  sums.score = score.data();
  says(call({}, {}), "load_balance: sums have pairs, scores, and the first choices");
  CHECK(call({rule::counted::all, {}}, {}) == "nothing was thrown");
  sums.first = first.data();
  says(call({{}, rule::masked_tokens::scored}, {}), "sums.scores_masked is what the rule says");
  says(call({}, dscores), "load_balance: dscores is [E], or absent; got size = 3, E = 2");
  says(refusal([&] { moe::z_loss(exec, sums, &loss); }), "z_loss: sums have z, and loss is given");
}
