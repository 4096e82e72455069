// Losses and gradients over ranks: four ranks, two copies of the experts, and the numbers of one rank.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/16_gradients_over_ranks.cpp -o ranks -pthread && ./ranks
//
// Each rank, a thread here, has a quarter of the tokens; {0, 1} and {2, 3} hold a copy of all experts each.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/comm/expert_groups.hpp>
#include <moe/comm/flat.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/expert/initialise.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/global_losses.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/parallel_experts.hpp>
#include <moe/layer/reduce_gradients.hpp>

constexpr int all_tokens = 64, M = 8, H = 16, E = 4, K = 2;
struct numbers {
  double balance = 0, router = 0;
};

template <class C>
numbers step(C& comm, moe::expert_parallelism const& degrees) {
  auto const until = moe::within(std::chrono::seconds(10));
  int const R = comm.size(), rank = comm.rank(), T = all_tokens / R;
  // [groups]
  moe::expert_groups<C> groups;  // communicators: of copies, of replicas, ...
  if (!moe::split_groups(comm, degrees, {}, until, groups)) return {};
  // [/groups]
  moe::expert_hosts const hosts(E, degrees, rank);
  moe::token_exchange<C> exchange(comm, moe::topology::even(1, R), moe::flat{}, hosts);
  moe::parallel_experts const experts(moe::ffn<moe::gelu>{}, exchange, {.T = T, .K = K});
  moe::moe_layer const layer(moe::tutel_topk({.k = K, .capacity_factor = 0}), experts,
                             {.T = T, .M = M, .H = H, .E = E});
  std::vector<double> values(static_cast<std::size_t>(layer.parameter_elements()));
  std::vector<double> dvalues(values), x(static_cast<std::size_t>(T * M)), out(x), dx(x);
  auto const parameters = layer.carve(values.data()), gradients = layer.carve(dvalues.data());
  moe::cpu const exec;
  moe::buffer const saved_bytes(layer.template saved_bytes<double>());
  moe::buffer const scratch(layer.template scratch_bytes<double>(exec));
  auto saved = layer.template carve_saved<double>(saved_bytes);
  for (int i = 0; i < M * E; ++i) parameters.router.data()[i] = std::cos(1.3 * i);
  moe::initialise(exec, parameters.experts, {.seed = 7, .first_expert = hosts.first() % E});
  for (int i = 0; i < T * M; ++i) x.data()[i] = std::sin(0.7 * ((i + rank * T * M) % 511));
  // [step]
  moe::layer_losses const losses =
      layer.template forward<double>(exec, parameters, {x, T, M}, {}, {out, T, M}, saved, scratch,
                                     moe::global_losses(comm, layer.shape()));
  for (double& d : out) d = 2 * d / (all_tokens * M);  // of the mean square over all ranks' tokens
  layer.template backward<double>(exec, parameters, {x, T, M}, {out, T, M}, {.balance = 0.1}, saved,
                                  {dx, T, M}, gradients, moe::update::assign, scratch);
  moe::buffer const room(moe::reduce_gradients_scratch(gradients, R));
  if (!moe::reduce_gradients(comm, groups.replicas, gradients, 1, room, until)) return {};
  // [/step]
  double squares = 0;
  for (int i = 0; i < M * E; ++i) squares += std::pow(gradients.router.data()[i], 2);
  return {losses.balance, std::sqrt(squares)};
}

int main() {
  numbers four[4];
  moe::self_communicator alone;
  numbers const one = step(alone, moe::spread_experts(E, 1));
  moe::expert_parallelism const degrees{2, 2, 1, 2};  // EP, copies, slices, experts of a rank
  moe::thread_world(4).run([&](moe::thread_communicator& c) { four[c.rank()] = step(c, degrees); });
  bool same = one.router > 0;
  for (auto const& n : four)
    same = same && std::abs(n.balance - one.balance) + std::abs(n.router - one.router) < 1e-12;
  std::printf("one rank: balance %.6f, gradient %.6f\n", one.balance, one.router);
  std::printf("of four:  balance %.6f, gradient %.6f\n", four[3].balance, four[3].router);
  return same ? 0 : 1;
}
