// The PR-MoE language model on ranks that share its experts, and on one rank: the same loss curve.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <moe/moe.hpp>

#include "model.hpp"
#include "text.hpp"

namespace pr_moe_text {

constexpr int windows_per_step = 16, layers = 4;  // of all ranks; 4 ranks or fewer, 2^n
constexpr std::int64_t S = 64, M = 64, H = 64;
constexpr std::uint64_t seed = 1;

// Each layer has as many copies of its experts as there are ranks to spare: 2, 2, 1, 1 on four.
inline moe::expert_schedule const schedule =
    moe::expert_schedule::pyramid({.layers = layers, .every = 1, .base = 2, .top = 8, .last = 2})
        .with_residual();
// Nothing is dropped: what is dropped by a capacity depends on who counts.
inline auto const router = moe::deepspeed_top1({.drop_tokens = false});
inline moe::ffn<moe::gelu_tanh> const ffn;

inline model_shape shape_of(int windows, double balance_weight) {
  return {.windows = windows,
          .S = S,
          .M = M,
          .H = H,
          .heads = 2,
          .schedule = schedule,
          .balance_weight = balance_weight,
          .longest_gradient = std::numeric_limits<double>::infinity()};
}
inline moe::layer_shape layer_of(int l, std::int64_t T) {
  return {.T = T, .M = M, .H = H / 2, .E = schedule.experts(l), .bias = true};
}

inline void expect_done(moe::outcome const& end) {
  if (!end) throw std::runtime_error(std::string("an exchange ended with ") + name(end.status));
}
inline moe::deadline soon() {
  return moe::within(std::chrono::seconds(60));
}

/// A residual layer whose routed experts lie on all ranks. The fixed one and the router are on each.
template <class C>
class parallel_slot final : public ffn_slot<double> {
 public:
  parallel_slot(moe::cpu const& exec, C& all, int l, std::int64_t T)
      : all_(all),
        degrees_(moe::spread_experts(schedule.experts(l), all.size())),
        hosts_(schedule.experts(l), degrees_, all.rank()),
        exchange_(all, moe::topology::even(1, all_.size()).grouped(2), moe::deduplicated{}, hosts_),
        slot_(exec,
              moe::residual_layer(router, moe::parallel_experts(ffn, exchange_, {.T = T, .K = 1}),
                                  ffn, layer_of(l, T), moe::residual_mix::learned),
              moe::global_losses<C>(all, layer_of(l, T)), hosts_.first() % hosts_.experts()) {
    expect_done(moe::split_groups(all, degrees_, {}, soon(), groups_));
  }
  std::int64_t parameter_elements() const override { return slot_.parameter_elements(); }
  void bind(moe::cpu const& exec, double* values, double* gradients, std::uint64_t from,
            int layer) override {
    slot_.bind(exec, values, gradients, from, layer);
    scratch_ = moe::buffer(moe::reduce_gradients_scratch(slot_.gradients(), all_.size()));
  }
  ffn_report forward(moe::cpu const& exec, moe::matrix_view<double const> x, moe::batch const& ids,
                     moe::matrix_view<double> out) override {
    return slot_.forward(exec, x, ids, out);
  }
  void backward(moe::cpu const& exec, moe::matrix_view<double const> x,
                moe::matrix_view<double const> dout, double balance_weight,
                moe::matrix_view<double> dx) override {
    slot_.backward(exec, x, dout, balance_weight, dx);
    expect_done(moe::reduce_gradients(all_, groups_.replicas, slot_.gradients(), 1. / all_.size(),
                                      scratch_, soon()));
  }

 private:
  using layer_type = moe::residual_layer<decltype(moe::deepspeed_top1()),
                                         moe::parallel_experts<moe::ffn<moe::gelu_tanh>, C>,
                                         moe::ffn<moe::gelu_tanh>>;
  C& all_;
  moe::expert_parallelism degrees_;
  moe::expert_hosts hosts_;
  moe::token_exchange<C> exchange_;
  moe::expert_groups<C> groups_;
  routed_slot<double, layer_type, moe::global_losses<C>> slot_;
  moe::buffer scratch_;
};

/// Windows [first, first + count) of a batch.
inline std::vector<std::uint8_t> part_of(std::vector<std::uint8_t> const& all, int first,
                                         int count) {
  auto const at = [&](int window) { return all.begin() + window * S; };
  return {at(first), at(first + count)};
}

/// Calls f(step, model's loss) for each step of the training on windows [first, first + count) of all.
template <class After, class F>
void train(model<double>& m, corpus const& text, int steps, int first, int count,
           After const& after_backward, F const& f) {
  std::mt19937_64 random(seed);
  windows batch;
  for (int step = 0; step < steps; ++step) {
    batch.draw(text.train, windows_per_step, static_cast<int>(S), random);
    auto const input = part_of(batch.input, first, count);
    auto const target = part_of(batch.target, first, count);
    double const loss = m.forward(input, target,
                                  {.first_id = (step * windows_per_step + first) * S,
                                   .seed = seed,
                                   .step = static_cast<std::uint32_t>(step),
                                   .training = true})
                            .loss;
    m.backward(input, target);
    after_backward();
    m.step(3e-3, step + 1);
    f(step, loss);
  }
}

inline std::vector<double> losses_of_one(corpus const& text, int steps) {
  moe::cpu const exec;
  model<double> m(exec, shape_of(windows_per_step, 0.01), seed, [&](int l) {
    moe::residual_layer const layer(router, ffn, layer_of(l, windows_per_step * S),
                                    moe::residual_mix::learned);
    return std::make_unique<routed_slot<double, std::decay_t<decltype(layer)>>>(exec, layer);
  });
  std::vector<double> losses;
  train(
      m, text, steps, 0, windows_per_step, [] {},
      [&](int, double loss) { losses.push_back(loss); });
  return losses;
}

/// The mean over ranks, each of which has a part of the windows.
template <class C>
std::vector<double> losses_of(C& all, corpus const& text, int steps) {
  int const R = all.size(), own = windows_per_step / R;
  moe::cpu const exec;
  // Losses over all tokens are no means over those of a rank: their gradients are not to be divided.
  model<double> m(exec, shape_of(own, 0.01 * R), seed,
                  [&](int l) { return std::make_unique<parallel_slot<C>>(exec, all, l, own * S); });
  moe::buffer const scratch(moe::reduce_gradients_scratch<double>(m.own_gradients().size(), R));
  std::vector<double> losses;
  auto const reduce = [&] {
    expect_done(moe::reduce_gradients(all, m.own_gradients(), 1. / R, scratch, soon()));
  };
  train(m, text, steps, all.rank() * own, own, reduce,
        [&](int, double loss) { losses.push_back(loss); });
  expect_done(moe::reduce_gradients(all, moe::vector_view<double>(losses), 1. / R,
                                    moe::buffer(moe::reduce_gradients_scratch<double>(steps, R)),
                                    soon()));
  return losses;
}

struct options {
  int steps = 30;
  std::vector<std::filesystem::path> text;

  options(int argc, char** argv) {
    for (int i = 1; i < argc; i += 2) {
      char* end = nullptr;
      if (i + 1 < argc && std::strcmp(argv[i], "--text") == 0)
        text.emplace_back(argv[i + 1]);
      else if (i + 1 < argc && std::strcmp(argv[i], "--steps") == 0 &&
               (steps = static_cast<int>(std::strtol(argv[i + 1], &end, 10))) > 0 && *end == '\0')
        continue;
      else
        throw text_error("usage: [--steps N] [--text FILE]...");
    }
    if (text.empty()) text = files_of(PR_MOE_TEXT_DEFAULT);
  }
};

/// @return Whether the curves are the same.
inline bool compare(std::vector<double> const& one, std::vector<double> const& many, int R) {
  double worst = 0;
  for (std::size_t i = 0; i < one.size(); ++i) {
    worst = std::max(worst, std::abs(one[i] - many[i]));
    if (i % 5 == 0 || i + 1 == one.size())
      std::printf("step %3zu: loss %.9f on one rank, %.9f on %d\n", i + 1, one[i], many[i], R);
  }
  std::printf("greatest difference %.1e\n", worst);
  return worst < 1e-6;
}

}  // namespace pr_moe_text
