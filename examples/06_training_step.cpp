// Train an MoE layer for some steps: forward, backward, a step downhill; nothing is allocated.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/06_training_step.cpp -o step -pthread && ./step
//
// Prints one derivative beside its finite difference, and the loss of the first and the last step.
#include <cmath>
#include <cstdio>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/expert/initialise.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

int main() {
  constexpr int T = 32, M = 8, E = 4;
  moe::cpu const exec;
  moe::moe_layer const layer(moe::switch_transformer(), moe::ffn<moe::gelu>{},
                             {.T = T, .M = M, .H = 16, .E = E, .bias = true, .z_loss = true});
  auto const elements = static_cast<std::size_t>(layer.parameter_elements());
  std::vector<double> values(elements), gradients(elements);  // float in earnest
  auto const parameters = layer.carve(values.data()), dparameters = layer.carve(gradients.data());
  moe::buffer const saved_bytes(layer.saved_bytes<double>());
  moe::buffer const scratch(layer.scratch_bytes<double>(exec));
  auto saved = layer.carve_saved<double>(saved_bytes);

  std::vector<double> x(T * M), target(T * M), out(T * M), dout(T * M), dx(T * M);
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = std::sin(0.7 * static_cast<double>(i * i % 97));
    target[i] = std::abs(x[i]);
  }
  for (std::size_t i = 0; i < M * E; ++i) values[i] = std::cos(1.3 * static_cast<double>(i));
  moe::initialise(exec, parameters.experts);
  moe::matrix_view<double> const tokens(x, T, M);

  // [step]
  moe::loss_weights const coefficients{.balance = 0.01, .z = 0.001};
  auto const forward = [&](std::uint32_t step) {
    moe::layer_losses const losses =
        layer.forward(exec, parameters, tokens, {.seed = 1, .step = step, .training = true},
                      {out.data(), T, M}, saved, scratch);
    double total = coefficients.balance * losses.balance + coefficients.z * losses.z;
    for (std::size_t i = 0; i < out.size(); ++i) {
      dout[i] = (out[i] - target[i]) / T;
      total += 0.5 * T * dout[i] * dout[i];
    }
    return total;
  };
  auto const backward = [&] {
    layer.backward(exec, parameters, tokens, {dout.data(), T, M}, coefficients, saved,
                   {dx.data(), T, M}, dparameters, moe::update::assign, scratch);
  };
  // [/step]

  double const first = forward(0);
  backward();
  double worst = 0;
  for (std::size_t i = 0; i < elements; i += 7) {  // some of all parameters
    double const value = values[i], h = 1e-5;
    values[i] = value + h;
    double const above = forward(0);
    values[i] = value - h;
    double const difference = (above - forward(0)) / (2 * h);
    values[i] = value;
    if (i == 0) std::printf("derivative %.8f, difference %.8f\n", gradients[i], difference);
    worst = std::fmax(worst, std::abs(gradients[i] - difference));
  }

  double last = first;
  for (std::uint32_t step = 1; step <= 100; ++step) {
    last = forward(step);
    backward();
    for (std::size_t i = 0; i < elements; ++i) values[i] -= 0.5 * gradients[i];
  }
  std::printf("loss %.3f, after 100 steps %.3f\n", first, last);
  return worst < 1e-8 && last < 0.7 * first ? 0 : 1;
}
