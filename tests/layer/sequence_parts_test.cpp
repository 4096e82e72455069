// A layer on parts of the tokens, and what it gives restored, equals the layer on all of them.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <stdexcept>
#include <support/counted.hpp>
#include <support/disturbed.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/expert_groups.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/expert/activation.hpp>
#include <moe/layer/global_losses.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/parallel_experts.hpp>
#include <moe/layer/reduce_gradients.hpp>
#include <moe/layer/sequence_parts.hpp>

#include "layer/case.hpp"
#include "layer/held_experts.hpp"
#include "support/worse.hpp"

namespace {

using namespace std::chrono_literals;
using moe_test::owned_layer;
using inner_experts = moe::ffn<moe::swiglu>;
constexpr std::int64_t M = 8;
constexpr moe::loss_weights by{.balance = 0.7, .z = 0.3};

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
moe::deadline late() {
  return moe::within(60s);
}
auto dropless() {
  return moe::tutel_topk({.k = 2, .capacity_factor = 0, .gate_noise = 1});
}
moe::layer_shape shape_of(std::int64_t T) {
  return {.T = T, .M = M, .H = 6, .E = 4, .bias = true, .z_loss = true};
}
using whole_layer = moe::moe_layer<decltype(dropless()), inner_experts>;

double distance(double const* a, double const* b, std::size_t n) {
  double most = 0;
  for (std::size_t i = 0; i < n; ++i) {
    double const d = std::abs(a[i] - b[i]);
    most = moe_test::worse(most, d);
  }
  return most;
}

double distance(std::vector<double> const& a, std::int64_t first, std::vector<double> const& b) {
  return distance(a.data() + first, b.data(), b.size());
}

/// What a rank gives.
struct of_rank {
  double worst = 0;        ///< Greatest difference from the layer on all tokens.
  std::int64_t rows = 0;   ///< Tokens that came to this rank's experts, its own too.
  std::int64_t bytes = 0;  ///< Sent for forward and backward, without what is restored.
};

/// A rank of R, with experts on all of them. L consecutive ranks have the same tokens, the groups of
/// them one after another; they take a part each if `divides`.
template <class C>
of_rank run(C& all, owned_layer<double, whole_layer>& whole, int L, bool divides) {
  int const R = all.size(), r = all.rank(), E = whole.layer.shape().E;
  auto const degrees = moe::spread_experts(E, R);
  moe::expert_groups<C> groups;
  C own_messages;
  if (!split_groups(all, degrees, {.same_tokens = L}, late(), groups) ||
      !all.split(0, r, late(), own_messages))
    throw std::runtime_error("split");
  using counting = moe_test::counted<C>;
  counting counted(own_messages, moe::topology::even(1, R));

  std::int64_t const T = whole.T / (R / L), first = r / L * T;
  moe::sequence_parts const parts(T, divides ? r % L : 0, divides ? L : 1);
  std::int64_t const most = moe::sequence_parts::most(T, divides ? L : 1);
  moe::expert_hosts const hosts(E, degrees, r);
  moe::token_exchange<counting> exchange(counted, moe::topology::even(1, R), moe::flat{}, hosts);
  moe::moe_layer const layer(
      dropless(), moe::parallel_experts<inner_experts, counting>({}, exchange, {.T = most, .K = 2}),
      shape_of(most));
  std::vector<double> values(at(layer.parameter_elements())), gradients(values.size(), 1e30);
  auto const parameters = layer.carve(values.data()), sums = layer.carve(gradients.data());
  std::copy_n(whole.parameters.data(), M * E, values.data());
  moe_test::for_each_held(whole.weights().experts, parameters.experts, hosts,
                          [](double a, double& b) { b = a; });

  moe::cpu const exec;
  moe::buffer const saved_bytes(layer.template saved_bytes<double>());
  moe::buffer const scratch(layer.template scratch_bytes<double>(exec));
  auto saved = layer.template carve_saved<double>(saved_bytes);
  std::vector<double> out(at(T * M), 1e30), dtokens(out);
  moe::matrix_view<double> const x(whole.tokens.data() + first * M, T, M),
      dout(whole.dout.data() + first * M, T, M), y(out, T, M), dx(dtokens, T, M);
  moe::batch ids = whole.ids;
  ids.first_id += first;
  if (ids.live != nullptr) ids.live += first;

  moe::layer_losses const losses =
      layer.forward(exec, parameters, parts.own(x), parts.own(ids), parts.own(y), saved, scratch,
                    moe::global_losses(all, layer.shape()));
  layer.backward(exec, parameters, parts.own(x), parts.own(dout), by, saved, parts.own(dx), sums,
                 moe::update::assign, scratch);
  of_rank result{0, exchange.rows(0), counted.within_nodes.bytes};
  if (!divides) return result;

  moe::buffer const room(moe::sequence_parts::restore_scratch(L));
  moe::buffer const more(moe::reduce_gradients_scratch(sums, R));
  if (!parts.restore(groups.tokens, y, room, late()) ||
      !parts.restore(groups.tokens, dx, room, late()) ||
      !moe::reduce_gradients(all, groups.replicas, sums, 1, more, late()))
    throw std::runtime_error("restore");
  result.worst = moe_test::worst_of(
      {distance(whole.out, first * M, out), distance(whole.dtokens, first * M, dtokens),
       distance(gradients.data(), whole.gradients.data(), at(M * E)),
       std::abs(losses.balance - whole.losses.balance), std::abs(losses.z - whole.losses.z)});
  moe_test::for_each_held(whole.dweights().experts, sums.experts, hosts, [&](double a, double b) {
    result.worst = moe_test::worse(result.worst, distance(&a, &b, 1));
  });
  return result;
}

/// All ranks.
of_rank run_ranks(owned_layer<double, whole_layer>& whole, int R, int L, bool divides,
                  bool disturb) {
  std::vector<of_rank> ranks(at(R));
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& inner) {
    if (disturb) {
      moe_test::disturbed comm(inner, static_cast<unsigned>(inner.rank()) + 1);
      ranks[at(inner.rank())] = run(comm, whole, L, divides);
    } else {
      ranks[at(inner.rank())] = run(inner, whole, L, divides);
    }
  });
  of_rank sum;
  for (of_rank const& r : ranks) {
    sum.worst = moe_test::worse(sum.worst, r.worst);
    sum.rows += r.rows;
    sum.bytes += r.bytes;
  }
  return sum;
}

}  // namespace

TEST_CASE("layer/sequence_parts: equals the layer on all tokens, forward and backward") {
  struct ranks {
    int R, L;
  };
  for (auto const [R, L] : {ranks{1, 1}, {2, 2}, {3, 3}, {4, 2}, {4, 4}, {6, 2}, {6, 3}})
    for (std::int64_t const T : {0, 1, 2, 7, 12}) {  // of each group; fewer than L, too
      int const ranks_of_all = R, same = L;
      CAPTURE(ranks_of_all);
      CAPTURE(same);
      CAPTURE(T);
      std::int64_t const all = T * (R / L);
      owned_layer<double, whole_layer> whole({dropless(), {}, shape_of(all)}, all, 5);
      std::vector<std::uint8_t> live(at(all), 1);
      if (all > 5) live[5] = 0;
      whole.ids.live = live.data();
      whole.forward();
      whole.backward(by);
      CHECK(run_ranks(whole, R, L, true, T % 2 == 1).worst < 1e-11);
    }
}

TEST_CASE("layer/sequence_parts: exchanges are an L-th of what they are without") {
  for (int const L : {2, 4}) {
    int const R = 4;
    std::int64_t const all = 64 * (R / L);
    owned_layer<double, whole_layer> whole({dropless(), {}, shape_of(all)}, all, 5);
    whole.forward();
    whole.backward(by);
    auto const parts = run_ranks(whole, R, L, true, false);
    auto const copies = run_ranks(whole, R, L, false, false);
    CHECK(parts.worst < 1e-11);
    CHECK(copies.rows == L * parts.rows);
    // Up to the counts, and to what a rank need not send because it is its own.
    double const ratio = static_cast<double>(copies.bytes) / static_cast<double>(parts.bytes);
    CHECK(ratio > 0.85 * L);
    CHECK(ratio < 1.15 * L);
  }
}

TEST_CASE("layer/sequence_parts: parts of a batch") {
  std::int64_t const ids[] = {5, 6, 7, 8, 9};
  std::uint8_t const live[] = {1, 0, 1, 0, 1};
  std::int32_t const source[] = {0, 1, 2, 3, 4};
  moe::batch const all{.first_id = 3, .ids = ids, .seed = 2, .live = live, .source = source};
  std::int64_t next = 0;
  for (int r = 0; r < 3; ++r) {
    moe::sequence_parts const parts(5, r, 3);
    CHECK(parts.range().first == next);
    CHECK(parts.range().size() <= moe::sequence_parts::most(5, 3));
    moe::batch const own = parts.own(all);
    CHECK(own.first_id == 3 + next);
    CHECK(own.ids[0] == 5 + next);
    CHECK(own.live == live + next);
    CHECK(own.source[0] == next);
    CHECK(own.seed == 2);
    next = parts.range().last;
  }
  CHECK(next == 5);
  CHECK(moe::sequence_parts(5, 1, 3).own(moe::batch{}).live == nullptr);
}

TEST_CASE("layer/sequence_parts: a dead rank, broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  std::vector<float> x(20);
  moe::buffer const room(moe::sequence_parts::restore_scratch(2));
  moe::thread_world world(2);
  world.kill(1);
  auto comm = world.communicator(0);
  moe::sequence_parts const parts(5, 0, 2);
  CHECK(parts.restore<float>(comm, {x, 5, 4}, room, late()) ==
        moe::outcome{moe::exchange_status::peer_failed, 1});

  says(refusal([] { moe::sequence_parts(5, 2, 2); }),
       "sequence_parts: T >= 0, 0 <= rank < L; got T = 5, rank = 2, L = 2");
  says(refusal([&] { parts.own(moe::matrix_view<float>(x, 4, 4)); }),
       "sequence_parts: matrices are [T,M]; got rows = 4, T = 5");
  moe::self_communicator self;
  says(refusal([&] { static_cast<void>(parts.restore<float>(self, {x, 5, 4}, room, late())); }),
       "sequence_parts::restore: comm is of the L ranks");
  moe::sequence_parts const alone(5, 0, 1);
  says(refusal([&] { static_cast<void>(alone.restore<float>(self, {x, 5, 4}, {}, late())); }),
       "sequence_parts::restore: scratch >= restore_scratch(L)");
  says(refusal([&] {
         static_cast<void>(alone.restore<float>(self, {x.data(), 5, 3, 4}, room, late()));
       }),
       "contiguous");
}
