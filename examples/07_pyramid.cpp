// A pyramid of experts: what PR-MoE saves, counted before anything is built.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -I include examples/07_pyramid.cpp -o pyramid && ./pyramid
//
// Prints a table: experts, billions of parameters stored and active, billions of operations of one
// token's forward pass. "DeepSpeed-MoE" (arXiv 2201.05596) gives 1.3, 52 and 31 billion parameters;
// it does not give the pyramid without the residual MLP.
#include <cmath>
#include <cstdio>

#include <moe/schedule/accounting.hpp>
#include <moe/schedule/expert_parallel.hpp>
#include <moe/schedule/pyramid.hpp>

// [schedules]
// Everything here happens at compile time: a schedule is a value.
constexpr moe::transformer_shape gpt{.M = 2048, .vocabulary = 51'200, .positions = 2048};

constexpr auto dense = moe::expert_schedule::dense(24);
constexpr auto moe_128 = moe::expert_schedule::every_nth(24, 2, 128);
constexpr auto pyramid =
    moe::expert_schedule::pyramid({.layers = 24, .every = 2, .base = 64, .top = 128, .last = 2});
constexpr auto pr_moe = pyramid.with_residual();

static_assert(pr_moe.experts(19) == 64 && pr_moe.experts(21) == 128);
static_assert(total_parameters(gpt, pr_moe).experts < total_parameters(gpt, moe_128).experts);
// [/schedules]

// A schedule as a template argument: the logits of its widest layer fit this array.
template <moe::expert_schedule Schedule>
struct router_buffer {
  float logits[Schedule.max_experts()];
};
static_assert(sizeof(router_buffer<pr_moe>) == 128 * sizeof(float));

namespace {

double billions(std::int64_t count) {
  return static_cast<double>(count) / 1e9;
}

// One line of the table. False unless the size is the one expected, to its one decimal.
bool print(char const* name, moe::expert_schedule const& schedule, double expected) {
  std::int64_t const context_tokens = 1024;
  double const stored = billions(total_parameters(gpt, schedule).total());
  std::printf("%-20s %8lld %7.2f %7.2f %8.2f\n", name,
              static_cast<long long>(schedule.total_experts()), stored,
              billions(active_parameters_per_token(gpt, schedule).total()),
              billions(forward_flops_per_token(gpt, schedule, context_tokens).total()));
  return std::abs(stored - expected) < 0.05;
}

}  // namespace

int main() {
  std::printf("1.3B                  experts  stored  active  forward\n");
  bool right = print("dense", dense, 1.3);
  right &= print("MoE-128", moe_128, 52.5);
  right &= print("pyramid-64/128", pyramid, 31.0);
  right &= print("PR-MoE-64/128", pr_moe, 31.4);

  // 128 ranks: one expert of each layer on every rank, so lower layers have copies.
  auto const low = moe::spread_experts(pr_moe.experts(1), 128);
  auto const high = moe::spread_experts(pr_moe.experts(23), 128);
  std::printf("on 128 ranks: expert-parallel %d x data-parallel %d, then %d x %d\n",
              low.expert_parallel, low.data_parallel, high.expert_parallel, high.data_parallel);
  right &= low.data_parallel == 2 && high.data_parallel == 1;

  if (!right) std::fprintf(stderr, "not the sizes of the paper\n");
  return right ? 0 : 1;
}
