// Losses of the tokens of all ranks: ranks with a part of the tokens each equal one rank with all.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <numeric>
#include <string>
#include <support/disturbed.hpp>
#include <support/instrumented.hpp>
#include <vector>

#include <moe/comm/threads.hpp>
#include <moe/expert/activation.hpp>
#include <moe/layer/global_losses.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/residual_layer.hpp>

#include "layer/case.hpp"
#include "support/worse.hpp"

namespace {

using namespace std::chrono_literals;
using moe_test::experts_for;
using moe_test::owned_layer;
using moe_test::same_bits;
using disturbed = moe_test::disturbed<moe::thread_communicator>;

constexpr moe::loss_weights by{.balance = 0.7, .z = 0.3};
/// Sums of some hundred terms in another order.
constexpr double tolerance = 1e-12;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
moe::layer_shape shape_of(std::int64_t T) {
  return {.T = T, .M = 6, .H = 4, .E = 5, .bias = true, .z_loss = true};
}

/// What all ranks give, by rank or in the order of tokens.
struct of_ranks {
  std::vector<moe::layer_losses> losses;
  std::vector<double> router, dtokens;  ///< Summed over ranks; [T,M].
};

/// Each rank has counts[r] of the tokens of `whole`, its parameters and no other loss than the auxiliary
/// ones, unless with_output.
template <class Layer>
of_ranks run_ranks(owned_layer<double, Layer>& whole, Layer const& layer,
                   std::vector<std::int64_t> const& counts, bool global, bool with_output = false) {
  int const R = static_cast<int>(counts.size());
  std::int64_t const M = whole.M, E = layer.shape().E;
  of_ranks result{std::vector<moe::layer_losses>(counts.size()), std::vector<double>(at(M * E)),
                  std::vector<double>(whole.dtokens.size())};
  std::vector<std::vector<double>> router(counts.size());
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& inner) {
    disturbed comm(inner, static_cast<unsigned>(inner.rank()) + 1);
    std::size_t const r = at(comm.rank());
    std::int64_t const first =
        std::accumulate(counts.begin(), counts.begin() + comm.rank(), std::int64_t{0});
    owned_layer<double, Layer> own(layer, counts[r], 1);
    own.parameters = whole.parameters;
    std::copy_n(whole.tokens.begin() + first * M, counts[r] * M, own.tokens.begin());
    std::copy_n(whole.dout.begin() + first * M, counts[r] * M, own.dout.begin());
    if (!with_output) std::fill(own.dout.begin(), own.dout.end(), 0);
    own.ids = whole.ids;
    own.ids.first_id += first;
    if (own.ids.live != nullptr) own.ids.live += first;
    if (global)
      own.forward(moe::global_losses(comm, layer.shape()));
    else
      own.forward();
    own.backward(by);
    result.losses[r] = own.losses;
    router[r].assign(own.gradients.begin(), own.gradients.begin() + M * E);
    std::copy(own.dtokens.begin(), own.dtokens.end(), result.dtokens.begin() + first * M);
  });
  for (auto const& own : router)
    for (std::size_t i = 0; i < own.size(); ++i) result.router[i] += own[i];
  return result;
}

double distance(std::vector<double> const& a, double const* b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    double const d = std::abs(a[i] - b[i]);
    most = moe_test::worse(most, d);
  }
  return most;
}

template <class Layer>
void check_equal(owned_layer<double, Layer>& whole, of_ranks const& ranks) {
  for (moe::layer_losses const& l : ranks.losses) {
    CHECK(l.balance == ranks.losses[0].balance);  // the same bits
    CHECK(l.z == ranks.losses[0].z);
    CHECK(std::abs(l.balance - whole.losses.balance) < tolerance);
    CHECK(std::abs(l.z - whole.losses.z) < tolerance);
  }
  CHECK(distance(ranks.router, whole.gradients.data()) < tolerance);
  CHECK(distance(ranks.dtokens, whole.dtokens.data()) < tolerance);
}

/// Parts of 40 tokens.
std::vector<std::vector<std::int64_t>> const parts = {{40},    {20, 20},         {33, 7},
                                                      {0, 40}, {10, 10, 10, 10}, {1, 0, 25, 0, 14}};

}  // namespace

TEST_CASE("layer/global_losses: losses and their gradients are those of all tokens") {
  constexpr std::int64_t T = 40;
  std::vector<std::uint8_t> live(T, 1);
  for (int const t : {3, 17, 18, 35}) live[at(t)] = 0;
  int different = 0;
  moe_test::for_each_preset([&](char const* name, auto const& preset) {
    CAPTURE(std::string(name));
    auto const experts = experts_for<moe::swiglu>(preset);
    moe::moe_layer const layer(preset, experts, shape_of(T));
    using layer_type = std::remove_cv_t<decltype(layer)>;
    owned_layer<double, layer_type> whole(layer, T, 5);
    whole.ids.live = live.data();
    std::fill(whole.dout.begin(), whole.dout.end(), 0);
    whole.forward();
    whole.backward(by);
    CHECK(whole.losses.balance > 0.5);
    CHECK(whole.losses.z > 0.5);
    for (auto const& counts : parts) {
      CAPTURE(counts.size());
      std::int64_t const most = *std::max_element(counts.begin(), counts.end());
      // A rank that has room for no more than the tokens of the greatest part.
      layer_type const small(preset, experts, shape_of(most));
      check_equal(whole, run_ranks(whole, small, counts, true));
    }
    auto const apart = run_ranks(whole, layer, parts[1], false);
    different += std::abs(apart.losses[0].balance - whole.losses.balance) > 1e-3 ? 1 : 0;
  });
  CHECK(different > 0);  // without the hook each rank has losses of its own
}

TEST_CASE("layer/global_losses: beside the gradient of the output") {
  auto const preset = moe::tutel_topk({.k = 2, .capacity_factor = 0});  // dropless
  moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(40));
  owned_layer<double, std::remove_cv_t<decltype(layer)>> whole(layer, 40, 5);
  whole.tokens[7] = std::numeric_limits<double>::quiet_NaN();
  whole.forward();
  whole.backward(by);
  for (double& d : whole.dtokens) d = std::isnan(d) ? 0 : d;
  for (auto const& counts : parts) {
    auto ranks = run_ranks(whole, layer, counts, true, true);
    for (double& d : ranks.dtokens) d = std::isnan(d) ? 0 : d;
    check_equal(whole, ranks);
  }
}

TEST_CASE("layer/global_losses: residual layers pass the hook on") {
  auto const preset = moe::deepspeed_top1({.use_rts = false});
  for (auto const mix : {moe::residual_mix::add, moe::residual_mix::learned}) {
    moe::residual_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(40), mix);
    owned_layer<double, std::remove_cv_t<decltype(layer)>> whole(layer, 40, 5);
    std::fill(whole.dout.begin(), whole.dout.end(), 0);
    whole.forward();
    whole.backward(by);
    for (auto const& counts : parts) check_equal(whole, run_ranks(whole, layer, counts, true));
  }
}

TEST_CASE("layer/global_losses: central differences over two ranks") {
  auto const preset = moe::deepspeed_topk({.k = 3, .capacity_factor = 0.7, .min_capacity = 1});
  moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(9));
  owned_layer<double, std::remove_cv_t<decltype(layer)>> whole(layer, 9, 5);
  std::vector<std::int64_t> const counts{7, 2};
  auto const analytic = run_ranks(whole, layer, counts, true);
  auto const total = [&] {
    auto const found = run_ranks(whole, layer, counts, true).losses[1];
    return by.balance * found.balance + by.z * found.z;
  };
  double worst = 0;
  auto const compare = [&](double& x, double gradient) {
    double const middle = x, h = 1e-5;
    x = middle + h;
    double const above = total();
    x = middle - h;
    double const below = total();
    x = middle;
    worst = moe_test::worse(worst, std::abs((above - below) / (2 * h) - gradient));
  };
  for (std::size_t i = 0; i < analytic.router.size(); i += 2)
    compare(whole.parameters[i], analytic.router[i]);
  for (std::size_t i = 0; i < analytic.dtokens.size(); i += 5)
    compare(whole.tokens[i], analytic.dtokens[i]);
  CHECK(worst < 1e-8);
}

namespace {

/// Sees the sums, and may double them: then the losses are those of two batches of the same tokens.
struct seeing {
  int calls = 0;
  double factor = 1;
  std::vector<double> sums{};
  bool before_routed = false;

  void loss_sums(moe::vector_view<double> all) {
    ++calls;
    sums.assign(all.begin(), all.end());
    for (double& s : all) s *= factor;
  }
  void routed(moe::basic_routing<double> const&, moe::routing_table const&,
              moe::vector_view<double const>) {
    before_routed = calls == 1;
  }
};

}  // namespace

TEST_CASE("layer/global_losses: the hook is called once, and that alone changes no bit") {
  for (bool const z : {false, true}) {
    auto const preset = moe::gshard({.capacity_factor = 0.7});
    moe::layer_shape shape = shape_of(40);
    shape.z_loss = z;
    moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape);
    using layer_type = std::remove_cv_t<decltype(layer)>;
    moe::loss_weights const weights{.balance = 0.7, .z = z ? 0.3 : 0};
    owned_layer<double, layer_type> a(layer, 40, 5), b(layer, 40, 5), twice(layer, 40, 5);
    a.forward();
    seeing hook, doubling{.factor = 2};
    b.forward(hook);
    twice.forward(doubling);
    CHECK(hook.calls == 1);
    CHECK(hook.before_routed);
    CHECK(hook.sums.size() == (z ? 13 : 11));
    CHECK(hook.sums[10] == 40);  // tokens that count
    if (z) CHECK(hook.sums[12] == 40);
    for (auto* c : {&a, &b, &twice}) c->backward(weights);
    for (auto* other : {&b, &twice}) {
      CHECK(a.losses.balance == doctest::Approx(other->losses.balance).epsilon(1e-15));
      CHECK(a.losses.z == other->losses.z);
    }
    CHECK(a.losses.balance == b.losses.balance);
    CHECK(same_bits(a.out, b.out));
    CHECK(same_bits(a.gradients, b.gradients));
    CHECK(same_bits(a.dtokens, b.dtokens));
    CHECK(!same_bits(a.gradients, twice.gradients));  // of twice as many tokens
  }
}

TEST_CASE("layer/global_losses: a rank that dies is an error that names it, and nothing is saved") {
  auto const preset = moe::gshard({});
  moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(10));
  using layer_type = std::remove_cv_t<decltype(layer)>;
  std::vector<int> status(3, -1), peer(3, -1);
  std::vector<char> filled(3, true);
  moe::thread_world world(3);
  CHECK_THROWS_AS(world.run([&](moe::thread_communicator& comm) {
    if (comm.rank() == 1) throw moe_test::rank_died{};
    std::size_t const r = at(comm.rank());
    owned_layer<double, layer_type> own(layer, 10, 1);
    own.forward();
    try {
      own.forward(moe::global_losses(comm, layer.shape(), 20s));
    } catch (moe::exchange_error const& error) {
      status[r] = error.status();
      peer[r] = error.peer();
    }
    filled[r] = own.saved.filled;
  }),
                  moe_test::rank_died);
  int named = 0;
  for (std::size_t const r : {0U, 2U}) {
    CHECK(status[r] == static_cast<int>(moe::exchange_status::peer_failed));
    named += peer[r] == 1 ? 1 : 0;
    CHECK(!filled[r]);
  }
  CHECK(named > 0);
}
