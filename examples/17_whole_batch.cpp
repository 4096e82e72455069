// Five ways to share 512 tokens out among 8 experts that are not liked alike.
// SPDX-License-Identifier: MIT
//   g++ -std=c++20 -I include examples/17_whole_batch.cpp -o whole_batch && ./whole_batch
#include <cstdint>
#include <cstdio>
#include <vector>

#include <moe/core/random.hpp>
#include <moe/gate/balanced_assignment.hpp>
#include <moe/gate/bias_controllers.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/expert_choice.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/sinkhorn.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.hpp>
#include <moe/routing/statistics.hpp>

namespace {
constexpr int T = 512, E = 8;
std::vector<float> logits = std::vector<float>(T * E);

/// Prints what ids [T] make of the loads, and gives the greatest by the mean.
double show(char const* name, std::vector<std::int32_t> const& ids) {
  std::vector<std::int32_t> load(E);
  double liked = 0;
  for (std::size_t t = 0; t < T; ++t) {
    ++load[std::size_t(ids[t])];
    liked += double(logits[t * E + std::size_t(ids[t])]) / T;
  }
  double const imbalance = moe::measure_load(moe::vector_view<std::int32_t const>(load)).imbalance;
  std::printf("%-16s %8.2f %12.2f\n", name, imbalance, liked);
  return imbalance;
}
}  // namespace

int main() {
  for (int i = 0; i < T * E; ++i)
    logits[std::size_t(i)] =
        1.5f - 0.4f * float(i % E) +
        moe::normal(moe::token{.id = i / E, .seed = 1}, moe::stream::user, std::uint32_t(i % E));
  std::printf("%-16s %8s %12s\n", "", "max/mean", "mean logit");
  moe::cpu const exec;
  moe::matrix_view const view(logits, T, E);
  std::vector<std::int32_t> ids(T);
  // [assign]
  moe::buffer scratch(moe::sinkhorn_scratch(exec, T, E));
  moe::assign_by_sinkhorn(exec, {}, view, {.training = false}, scratch, {ids.data(), T, 1});
  double const top_1 = show("top 1", ids);
  moe::assign_by_sinkhorn(exec, {}, view, {.training = true}, scratch, {ids.data(), T, 1});
  double const sinkhorn = show("Sinkhorn", ids);
  scratch = moe::buffer(moe::auction_scratch(T, E));
  moe::assign_balanced(exec, view, {.training = true}, scratch, {ids.data(), T, 1});
  double const auction = show("auction", ids);
  // [/assign]
  // [experts]
  moe::expert_choice<> const gate{.capacity_factor = 1};
  moe::varying_routing_buffer<> routed(T, E, gate.pairs(T, E));
  scratch = moe::buffer(moe::route_scratch(exec, gate, T, E));
  moe::route(exec, gate, view, {}, scratch, routed);
  moe::table_buffer table(gate.shape(T, E));
  scratch = moe::buffer(moe::build_table_scratch(exec, table.room));
  moe::build_table(exec, routed, {}, scratch, table);  // and then as with any table
  // [/experts]
  auto const used = moe::measure_load(moe::vector_view<std::int32_t const>(table.used, E));
  std::printf("%-16s %8.2f\n", "expert choice", used.imbalance);
  std::vector<float> bias(E);
  moe::gate<moe::identity, moe::biased<moe::top_k<1>>, moe::as_scored> const by_bias{
      {}, {{}, bias.data()}, {}};
  moe::routing_buffer chosen(T, 1, E);
  scratch = moe::buffer(moe::route_scratch<decltype(by_bias)>(exec, E));
  for (int step = 0; step < 500; ++step) {
    moe::route(exec, by_bias, view, {}, scratch, chosen);
    std::vector<std::int32_t> counts(E);
    for (int t = 0; t < T; ++t) ++counts[std::size_t(chosen.expert[t])];
    moe::sign_controller{.rate = 0.01f}.update(moe::vector_view<std::int32_t const>(counts), bias);
  }
  double const sign = show("sign controller", {chosen.expert, chosen.expert + T});
  return top_1 > 2 && sinkhorn < 1.2 && auction == 1 && used.imbalance == 1 && sign < 1.1 ? 0 : 1;
}
