// Gradients summed over ranks are those of one rank with all tokens, however experts are spread.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <stdexcept>
#include <support/disturbed.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/expert_groups.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/expert/activation.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/slice.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/parallel_experts.hpp>
#include <moe/layer/reduce_gradients.hpp>

#include "layer/held_experts.hpp"
#include "support/same_bits.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::same_bits;

using namespace std::chrono_literals;
using moe::expert_parallelism;
using inner_experts = moe::ffn<moe::swiglu>;
using router = moe::preset<moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>>;

constexpr std::int64_t M = 5, H = 12;
/// Sums of some ten products in another order.
constexpr double tolerance = 1e-11;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
moe::deadline late() {
  return moe::within(60s);
}

/// Parameters, tokens [T,M] and d(loss) / d(out) [T,M] of the sum over all tokens; a layer on one rank.
template <class Layer>
struct whole_problem {
  Layer layer;
  std::int64_t T;
  std::vector<double> values, gradients, tokens, dout;

  whole_problem(Layer const& made, unsigned seed)
      : layer(made),
        T(made.shape().T),
        values(moe_test::normals<double>(layer.parameter_elements(), seed, 0, 0.5)),
        gradients(values.size()),
        tokens(moe_test::normals<double>(T * M, seed + 1)),
        dout(moe_test::normals<double>(T * M, seed + 2)) {
    differentiate(layer, layer.carve(values.data()), 0, T, 1, layer.carve(gradients.data()));
  }
  /// Of tokens [first, first + n), whose dout are multiplied by `factor`.
  template <class Other, class Weights>
  void differentiate(Other const& of, Weights const& parameters, std::int64_t first, std::int64_t n,
                     double factor, Weights const& into) const {
    moe::cpu const exec;
    moe::buffer saved_bytes(of.template saved_bytes<double>());
    moe::buffer scratch(of.template scratch_bytes<double>(exec));
    auto saved = of.template carve_saved<double>(saved_bytes);
    std::vector<double> out(at(n * M)), dtokens(out.size()), d(out.size());
    for (std::size_t i = 0; i < d.size(); ++i) d[i] = factor * dout[at(first * M) + i];
    moe::matrix_view<double const> const x(tokens.data() + first * M, n, M);
    of.template forward<double>(exec, parameters, x, {.first_id = first, .training = true},
                                {out, n, M}, saved, scratch);
    of.template backward<double>(exec, parameters, x, {d, n, M}, {}, saved, {dtokens, n, M}, into,
                                 moe::update::assign, scratch);
  }
};

double distance(double const* a, double const* b, std::int64_t n) {
  double worst = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    double const d = std::abs(a[i] - b[i]);
    worst = moe_test::worse(worst, d);
  }
  return worst;
}

template <class Layer>
concept residual = requires(Layer const& layer) { layer.mix(); };

/// The part of a residual layer that is the moe_layer's, of its parameters, too.
template <class Part>
auto const& of_moe(Part const& part) {
  if constexpr (requires { part.moe(); })
    return part.moe();
  else if constexpr (requires { part.moe; })
    return part.moe;
  else
    return part;
}

/// The same layer as one rank's, its experts on many.
template <class Experts, class Layer>
auto spread(Layer const& whole, Experts const& experts, std::int64_t T) {
  moe::layer_shape shape = whole.shape();
  shape.T = T;
  if constexpr (residual<Layer>)
    return moe::residual_layer(router{}, experts, inner_experts{}, shape, whole.mix(), 7);
  else
    return moe::moe_layer(router{}, experts, shape);
}

/// The greatest difference of what a rank has after the reduction from what one rank has.
/// @param counts  [R] tokens of each.
template <class C, class Layer>
double parallel_error(C& comm, whole_problem<Layer>& whole, expert_parallelism const& degrees,
                      std::vector<std::int64_t> const& counts, double factor, double scale) {
  int const R = comm.size(), E = whole.layer.shape().E;
  std::int64_t first = 0, T = counts[at(comm.rank())];
  for (int r = 0; r < comm.rank(); ++r) first += counts[at(r)];
  std::int64_t const most = *std::max_element(counts.begin(), counts.end());
  moe::expert_groups<C> groups;
  if (!split_groups(comm, degrees, {}, late(), groups)) throw std::runtime_error("split");

  moe::expert_hosts const hosts(E, degrees, comm.rank());
  moe::token_exchange<C> exchange(comm, moe::topology::even(1, R), moe::flat{}, hosts);
  auto const layer =
      spread(whole.layer,
             moe::parallel_experts<inner_experts, C>({}, exchange, {.T = most, .K = 2}), most);
  std::vector<double> values(at(layer.parameter_elements())), gradients(values.size(), 1e30);
  // What comes after the experts: the fixed one and the mix.
  std::int64_t const own = of_moe(layer).parameter_elements(),
                     all = of_moe(whole.layer).parameter_elements(),
                     dense = layer.parameter_elements() - own;
  auto const parameters = layer.carve(values.data()), sums = layer.carve(gradients.data());
  std::copy_n(whole.values.data(), M * E, values.data());
  std::copy_n(whole.values.data() + all, dense, values.data() + own);
  moe_test::for_each_held(of_moe(whole.layer.carve(whole.values.data())).experts,
                          of_moe(parameters).experts, hosts, [](double a, double& b) { b = a; });
  whole.differentiate(layer, parameters, first, T, factor, sums);

  moe::buffer const scratch(moe::reduce_gradients_scratch(sums, R));
  if (!moe::reduce_gradients(comm, groups.replicas, sums, scale, scratch, late()))
    throw std::runtime_error("reduce_gradients");
  double worst =
      moe_test::worse(distance(whole.gradients.data(), gradients.data(), M * E),
                      distance(whole.gradients.data() + all, gradients.data() + own, dense));
  moe_test::for_each_held(
      of_moe(whole.layer.carve(whole.gradients.data())).experts, of_moe(sums).experts, hosts,
      [&](double a, double b) { worst = moe_test::worse(worst, distance(&a, &b, 1)); });
  return worst;
}

/// On the worst rank.
template <class Problem>
double worst_error(Problem& whole, expert_parallelism const& degrees,
                   std::vector<std::int64_t> const& counts, double factor, double scale) {
  int const R = static_cast<int>(counts.size());
  std::vector<double> worst(counts.size());
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& inner) {
    moe_test::disturbed comm(inner, static_cast<unsigned>(R * 8 + inner.rank()));
    worst[at(comm.rank())] = parallel_error(comm, whole, degrees, counts, factor, scale);
  });
  return *std::max_element(worst.begin(), worst.end());
}

}  // namespace

TEST_CASE("layer/reduce_gradients: gradients do not depend on how experts are spread") {
  struct spread {
    int E;
    expert_parallelism degrees;
  };
  std::vector<spread> const cases = {{3, {1, 1, 1, 3}}, {4, {1, 2, 1, 4}}, {4, {2, 1, 1, 2}},
                                     {4, {1, 1, 2, 4}}, {4, {1, 4, 1, 4}}, {4, {2, 2, 1, 2}},
                                     {4, {4, 1, 1, 1}}, {4, {2, 1, 2, 2}}, {3, {3, 2, 1, 1}},
                                     {3, {3, 1, 2, 1}}, {2, {2, 2, 2, 1}}, {6, {2, 1, 3, 3}}};
  for (spread const& c : cases) {
    int const EP = c.degrees.expert_parallel, D = c.degrees.data_parallel, S = c.degrees.slices;
    int const R = EP * D * S;
    CAPTURE(EP);
    CAPTURE(D);
    CAPTURE(S);
    whole_problem<moe::moe_layer<router, inner_experts>> whole(
        {router{}, inner_experts{}, {.T = 6 * R, .M = M, .H = H, .E = c.E, .bias = true}},
        static_cast<unsigned>(EP + D));
    // A sum over all tokens, which lie anywhere.
    std::vector<std::int64_t> uneven(at(R), 6), even(at(R), 6);
    for (int r = 0; r + 1 < R; r += 2) {
      uneven[at(r)] = r % 4 == 0 ? 12 : 5;
      uneven[at(r + 1)] = r % 4 == 0 ? 0 : 7;
    }
    CHECK(worst_error(whole, c.degrees, uneven, 1, 1) < tolerance);
    // A mean over each rank's tokens, as the one rank's is a mean over all: R times the gradient.
    CHECK(worst_error(whole, c.degrees, even, R, 1. / R) < tolerance);
    // What was wrong with dividing by the copies alone.
    if (EP > 1) CHECK(worst_error(whole, c.degrees, even, R, 1. / D) > 1e-3);
  }
}

TEST_CASE("layer/reduce_gradients: residual layers, whose fixed expert and mix are dense") {
  auto const mixes = {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated};
  for (auto const mix : mixes)
    for (int const R : {1, 3, 4}) {
      whole_problem<moe::residual_layer<router, inner_experts>> whole(
          {router{}, inner_experts{}, {.T = 5 * R, .M = M, .H = H, .E = 3, .bias = true}, mix, 7},
          3);
      std::vector<double> worst(at(R));
      moe::thread_world world(R);
      world.run([&](moe::thread_communicator& comm) {
        std::vector<double> gradients(whole.gradients.size());
        auto const sums = whole.layer.carve(gradients.data());
        whole.differentiate(whole.layer, whole.layer.carve(whole.values.data()), 5 * comm.rank(), 5,
                            R, sums);
        moe::buffer const scratch(moe::reduce_gradients_scratch(sums, R));
        // All ranks hold all experts.
        if (!moe::reduce_gradients(comm, comm, sums, 1. / R, scratch, late()))
          throw std::runtime_error("reduce_gradients");
        worst[at(comm.rank())] = distance(gradients.data(), whole.gradients.data(),
                                          static_cast<std::int64_t>(gradients.size()));
      });
      for (double const w : worst) CHECK(w < tolerance);
    }
}

TEST_CASE("layer/reduce_gradients: residual layers whose routed experts are on other ranks") {
  auto const mixes = {moe::residual_mix::add, moe::residual_mix::learned, moe::residual_mix::gated};
  for (auto const mix : mixes)
    for (expert_parallelism const& degrees :
         std::vector<expert_parallelism>{{4, 1, 1, 1}, {2, 2, 1, 2}, {2, 1, 2, 2}, {1, 4, 1, 4}}) {
      CAPTURE(degrees.expert_parallel);
      whole_problem<moe::residual_layer<router, inner_experts>> whole(
          {router{}, inner_experts{}, {.T = 24, .M = M, .H = H, .E = 4, .bias = true}, mix, 7}, 5);
      CHECK(worst_error(whole, degrees, {12, 0, 5, 7}, 1, 1) < tolerance);
      CHECK(worst_error(whole, degrees, {6, 6, 6, 6}, 4, 0.25) < tolerance);
    }
}

TEST_CASE("layer/reduce_gradients: any vector, any type, the same bits on all ranks") {
  constexpr int R = 3;
  std::vector<std::vector<moe::bf16>> all(R);
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& comm) {
    auto& g = all[at(comm.rank())];
    for (int i = 0; i < 50; ++i)
      g.push_back(static_cast<moe::bf16>(1.f + 3.f * static_cast<float>(comm.rank() + i)));
    moe::buffer const scratch(moe::reduce_gradients_scratch<moe::bf16>(50, R));
    if (!moe::reduce_gradients(comm, moe::vector_view<moe::bf16>(g), 0.5, scratch, late()))
      throw std::runtime_error("reduce_gradients");
  });
  CHECK(same_bits(all[0], all[1]));
  CHECK(same_bits(all[0], all[2]));
  CHECK(static_cast<float>(all[0][0]) == 6);  // (1 + 4 + 7) / 2
  CHECK(static_cast<float>(all[0][2]) == 15);
}

TEST_CASE("layer/reduce_gradients: views with gaps, row by row") {
  moe::moe_layer const layer(router{}, inner_experts{}, {.T = 1, .M = 4, .H = 6, .E = 2});
  std::vector<double> gradients(at(layer.parameter_elements()), 3);
  auto parts = layer.carve(gradients.data());
  parts.experts = moe::slice(parts.experts, 1, 2);
  moe::thread_world world(2);
  auto const before = gradients;
  std::vector<std::vector<double>> after(2);
  world.run([&](moe::thread_communicator& comm) {
    auto own = gradients;
    auto sums = layer.carve(own.data());
    sums.experts = moe::slice(sums.experts, 1, 2);
    moe::buffer const scratch(moe::reduce_gradients_scratch(sums, 2));
    if (!moe::reduce_gradients(comm, comm, sums, 1, scratch, late()))
      throw std::runtime_error("reduce_gradients");
    after[at(comm.rank())] = own;
  });
  for (auto const& own : after) {
    CHECK(std::count(own.begin(), own.end(), 6) == 8 + (own.size() - 8) / 2);
    CHECK(std::count(own.begin(), own.end(), 3) == (own.size() - 8) / 2);
  }
}

TEST_CASE("layer/reduce_gradients: a dead rank ends it on all, in both communicators") {
  constexpr int R = 4;
  std::vector<moe::outcome> ends(R);
  moe::moe_layer const layer(router{}, inner_experts{}, {.T = 1, .M = 4, .H = 6, .E = 2});
  for (int calls = 0; calls < 8; ++calls) {
    moe::thread_world world(R);
    auto const start = std::chrono::steady_clock::now();
    CHECK_THROWS_AS(world.run([&](moe::thread_communicator& inner) {
      moe::thread_communicator pair;  // {0, 1}, {2, 3}
      if (!inner.split(inner.rank() / 2, 0, late(), pair)) throw std::runtime_error("split");
      bool const dies = inner.rank() == 3;
      moe_test::disturbed all(inner, 1, dies && calls < 2 ? calls : 1 << 30);
      moe_test::disturbed replicas(pair, 2, dies && calls >= 2 ? calls - 2 : 1 << 30);
      std::vector<double> gradients(at(layer.parameter_elements()), 3);
      auto const sums = layer.carve(gradients.data());
      moe::buffer const scratch(moe::reduce_gradients_scratch(sums, R));
      ends[at(all.rank())] =
          moe::reduce_gradients(all, replicas, sums, 1, scratch, moe::within(20s));
      if (!ends[at(all.rank())]) {
        moe::thread_communicator::ticket t;
        if (inner.exchange({}, {}, t).status != moe::exchange_status::aborted ||
            pair.exchange({}, {}, t).status != moe::exchange_status::aborted)
          throw std::runtime_error("not aborted");
      }
    }),
                    moe_test::rank_died);
    CHECK(std::chrono::steady_clock::now() - start < 20s);
    // In the exchange of replicas only rank 2 has to do with rank 3.
    CHECK(ends[2].status == moe::exchange_status::peer_failed);
    if (calls == 0)
      for (int r : {0, 1}) CHECK(ends[at(r)].status == moe::exchange_status::peer_failed);
  }
}

TEST_CASE("layer/reduce_gradients: broken preconditions") {
  moe::self_communicator comm;
  moe::moe_layer const layer(router{}, inner_experts{}, {.T = 1, .M = 4, .H = 6, .E = 2});
  std::vector<double> gradients(at(layer.parameter_elements()), 3);
  moe_test::says(moe_test::refusal([&] {
                   static_cast<void>(moe::reduce_gradients(
                       comm, comm, layer.carve(gradients.data()), 1, moe::memory{}, late()));
                 }),
                 "all_reduce: scratch >= all_reduce_scratch<T>(n, R)");
}
