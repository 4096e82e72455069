// Write a gate of your own: a score and a select policy, run forward and backward.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/03_custom_gate.cpp -o custom_gate -pthread && ./custom_gate
//
// Prints the experts and weights of each token, and the gradient of the first token's logits.
#include <cmath>
#include <cstdio>
#include <utility>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/weigh.hpp>

// [gate]
/// s = (1 + l / (1 + |l|)) / 2. Its derivative, (1 - |2 s - 1|)^2 / 2, needs the score alone.
struct soft_step {
  void operator()(moe::score_row auto& row, moe::token const&) const {
    row.transform(
        [](int, auto l) { return moe::is_candidate(l) ? (1 + l / (1 + std::abs(l))) / 2 : l; });
  }
  template <moe::score_row R>
  void backward(R const& scores, R& grad, moe::token const&) const {
    grad.transform(scores, [](int, auto g, auto s) {
      auto const rest = 1 - std::abs(2 * s - 1);
      return moe::is_candidate(s) ? g * rest * rest / 2 : 0;
    });
  }
};

/// The best expert of each half of them, the better one first: one on each of two machines.
struct best_of_each_half {
  static constexpr int max_k = 2;
  int k() const { return 2; }

  template <moe::score_row R>
  void operator()(R& keys, moe::choices<2, typename R::value_type>& chosen,
                  moe::token const&) const {
    auto first = keys.pop_max(0, keys.size() / 2);
    auto second = keys.pop_max(keys.size() / 2, keys.size());
    if (second.key > first.key) std::swap(first, second);
    chosen = {2, {first.expert, second.expert}, {}};
  }
};

using two_machines = moe::gate<soft_step, best_of_each_half, moe::renormalised>;
static_assert(moe::token_gate<two_machines, moe::array_row<double>>);
// [/gate]

int main() {
  constexpr int T = 2, K = 2, E = 4;
  std::vector<double> logits{1, 2, 0, -1, 3, 2, 1, 4};
  moe::cpu const exec;
  moe::buffer const scratch(moe::route_scratch<two_machines, double>(exec, E));
  moe::basic_routing_buffer<double> routing(T, K, E);
  auto const weights_of_token_0 = [&] {
    moe::route(exec, two_machines{}, moe::matrix_view(logits, T, E), {}, scratch, routing);
    return std::pair{routing.weight[0], routing.weight[1]};
  };
  weights_of_token_0();
  for (int i = 0; i < T * K; ++i)
    std::printf("token %d: expert %d (%.3f)\n", i / K, routing.expert[i], routing.weight[i]);

  std::vector<double> const dweights{1, 0, 0, 0};  // of a loss that is the first weight
  std::vector<double> dlogits(T * E);
  moe::route_backward(exec, two_machines{}, moe::matrix_view(logits, T, E), routing,
                      {dweights, T, K}, {}, scratch, moe::matrix_view(dlogits, T, E));
  std::printf("gradient: %.4f %.4f %.4f %.4f\n", dlogits[0], dlogits[1], dlogits[2], dlogits[3]);

  logits[1] += 1e-4;
  double const above = weights_of_token_0().first;
  logits[1] -= 2e-4;
  double const below = weights_of_token_0().first;
  bool const right = std::abs(dlogits[1] - (above - below) / 2e-4) < 1e-7;
  return right && routing.expert[0] == 1 && routing.expert[1] == 2 ? 0 : 1;
}
