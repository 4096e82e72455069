// Train a layer whose experts lie on four ranks: the loss curve of one rank that has them all.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/13_expert_parallel.cpp -o parallel -pthread && ./parallel
//
// The ranks are threads of this process. Each has a quarter of the tokens and two of eight experts.
// Prints the loss of some steps, of one rank and of four.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/comm/collectives.hpp>
#include <moe/comm/deduplicated.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/expert/initialise.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/parallel_experts.hpp>

constexpr int all_tokens = 64, M = 8, H = 16, E = 8, K = 2, steps = 60;
using router = moe::preset<moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised>>;

template <class C>
void train(C& comm, std::vector<double>& losses) {
  int const R = comm.size(), rank = comm.rank(), T = all_tokens / R;
  // [layer]
  moe::expert_hosts const hosts(E, moe::spread_experts(E, R), rank);
  moe::topology const cluster = moe::topology::even(1, R).grouped(2);  // two ranks to a node
  moe::token_exchange<C> exchange(comm, cluster, moe::deduplicated{}, hosts);
  moe::parallel_experts const experts(moe::ffn<moe::gelu>{}, exchange, {.T = T, .K = K});
  moe::moe_layer const layer(router{}, experts, {.T = T, .M = M, .H = H, .E = E});
  // [/layer]
  std::vector<double> values(static_cast<std::size_t>(layer.parameter_elements()));
  std::vector<double> gradients(values), x(static_cast<std::size_t>(T * M)), out(x), dx(x);
  auto const parameters = layer.carve(values.data()), dparameters = layer.carve(gradients.data());
  moe::cpu const exec;
  moe::buffer const saved_bytes(layer.template saved_bytes<double>());
  moe::buffer const scratch(layer.template scratch_bytes<double>(exec));
  moe::buffer const sums(moe::all_reduce_scratch<double>(M * E + 1, R));
  auto saved = layer.template carve_saved<double>(saved_bytes);
  for (std::size_t i = 0; i < M * E; ++i) values[i] = std::cos(1.3 * static_cast<double>(i));
  moe::initialise(exec, parameters.experts, {.seed = 7, .first_expert = hosts.first()});
  for (int i = 0; i < T * M; ++i)
    x[static_cast<std::size_t>(i)] = std::sin(0.7 * ((i + rank * T * M) % 511));

  for (int step = 0; step < steps; ++step) {
    layer.template forward<double>(exec, parameters, {x, T, M}, {}, {out, T, M}, saved, scratch);
    std::vector<double> total(M * E + 1);  // over ranks: the loss, and the router's gradient
    for (std::size_t i = 0; i < x.size(); ++i) {
      double const error = out[i] - std::abs(x[i]);
      total[M * E] += error * error / (all_tokens * M);
      out[i] = 2 * error / (all_tokens * M);  // the gradient of the output
    }
    layer.template backward<double>(exec, parameters, {x, T, M}, {out, T, M}, {}, saved, {dx, T, M},
                                    dparameters, moe::update::assign, scratch);
    std::copy_n(gradients.begin(), M * E, total.begin());
    if (!moe::all_reduce<double>(comm, total, sums, moe::within(std::chrono::seconds(10)))) return;
    losses.push_back(total[M * E]);
    // An expert has met the tokens of all ranks: its gradient is whole.
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] -= 2 * (i < M * E ? total[i] : gradients[i]);
  }
}

int main() {
  std::vector<double> one, four[4];
  moe::self_communicator alone;
  train(alone, one);
  moe::thread_world(4).run([&](moe::thread_communicator& c) { train(c, four[c.rank()]); });
  bool same = one.size() == steps && four[0].size() == steps && one[steps - 1] < 0.5 * one[0];
  for (std::size_t i = 0; same && i < steps; ++i) {
    if (i % 15 == 14) std::printf("step %2zu: %.6f, %.6f on four\n", i + 1, one[i], four[0][i]);
    same = std::abs(one[i] - four[0][i]) < 1e-9;
  }
  return same ? 0 : 1;
}
