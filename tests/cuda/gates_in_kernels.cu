// Compiled only: policies and gates in device code, and presets in the host code of a CUDA file. Without
// --expt-relaxed-constexpr, so that nothing on the device calls a host function.
// SPDX-License-Identifier: MIT
#include <cstdint>

#include <moe/core/score_row.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/candidates.hpp>
#include <moe/gate/fixed_experts.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/group_limited.hpp>
#include <moe/gate/learned_noise.hpp>
#include <moe/gate/model_presets.hpp>
#include <moe/gate/noise.hpp>
#include <moe/gate/presets.hpp>
#include <moe/gate/relu_normalised.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/top_p.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/overflow.hpp>

namespace {

/// One token for each thread: forward, and the gradient of every weight.
template <class Gate, class V>
__global__ void gate_tokens(Gate gate, V* rows, V* room, int E, std::int32_t* expert, V* weight,
                            moe::batch tokens) {
  int const t = static_cast<int>(threadIdx.x);
  V* const own = room + t * Gate::copies * E;
  moe::row_room<V> copies{own, Gate::copies};
  moe::array_row<V> row(rows + 2 * t * E, E, &copies);
  moe::choices<Gate::max_k, V> chosen, dchosen;
  gate(row, chosen, tokens.at(t));
  dchosen.k = chosen.k;
  for (int j = 0; j < chosen.k; ++j) {
    dchosen.weight[j] = 1;
    expert[t * chosen.k + j] = chosen.expert[j];
    weight[t * chosen.k + j] = chosen.weight[j];
  }
  copies = {own, Gate::copies};
  moe::array_row<V> grad(rows + (2 * t + 1) * E, E, &copies);
  gate.backward(row, chosen, dchosen, grad, tokens.at(t));
}

/// What else policies and passes call on the device.
__global__ void call_functions(std::int64_t* out, moe::capacity_rule rule, moe::token t) {
  moe::drawing_token draws(t);
  out[0] = moe::rows_of(rule, 100, 8, 2, true, 50) + moe::is_static(rule);
  out[1] =
      static_cast<std::int64_t>(moe::detail::priority_key(moe::gumbel(t, moe::stream::user, 1), 2));
  out[2] = moe::random_bits(draws, moe::stream::user, 1);
  out[3] = moe::is_invalid_logit(moe::normal(draws, moe::stream::user, 3));
}

template <class Gate, class V>
void launch(Gate const& gate) {
  gate_tokens<Gate, V><<<1, 1>>>(gate, nullptr, nullptr, 8, nullptr, nullptr, moe::batch{});
}
template <class Gate>
void launch_both(Gate const& gate = {}) {
  launch<Gate, float>(gate);
  launch<Gate, double>(gate);
}

}  // namespace

void all_gates() {
  using namespace moe;
  launch_both(deepspeed_top1().gate);
  launch_both(deepspeed_top2().gate);
  launch_both(deepspeed_topk().gate);
  launch_both(tutel_topk().gate);
  launch_both(switch_transformer().gate);
  launch_both(gshard().gate);
  launch_both<gate<sigmoid, visible<top_k<8>>, scaled<renormalised>>>();
  launch_both<gate<identity, replayed<4>, softmax_of_selected>>();
  launch_both<gate<noisy<softmax, gumbel_noise<>>, sampled<visible<top_k<2>>>, as_scored>>();
  launch_both<gate<noisy<sigmoid, uniform_noise<>>, sampled<top_k<3>, normal_noise<stream::user>>,
                   renormalised>>();
  launch_both(mixtral().gate);
  launch_both(deepseek_v2().gate);
  launch_both(deepseek_v3().gate);
  launch_both(deepseek_v4().gate);
  launch_both(deepseek_v4_hash({}, nullptr, {}).gate);
  launch_both(llama4().gate);
  launch_both(gpt_oss().gate);
  launch_both(longcat().gate);
  launch_both(moe_plus_plus().gate);
  launch_both<gate<learned_noise<identity>, listed<top_k<2>>, softmax_of_selected>>();
  launch_both<gate<softmax, top_p<4>, renormalised>>();
  launch_both<gate<identity, by_hash<2>, constant_weight>>();
  launch_both<gate<sigmoid, visible_to<top_k<2>>, as_scored>>();
  launch_both<gate<relu_normalised<>, top_k<2>, as_scored>>();
  call_functions<<<1, 1>>>(nullptr, capacity::deepspeed(), token{});
}

namespace {

/// Both ways of a preset on the CPU, compiled by nvcc.
template <class Preset>
double run_on_host(Preset const& preset) {
  moe::cpu const exec;
  moe::routing_buffer routing(1, preset.gate.k(), 8);
  moe::table_buffer table(moe::preset_table_shape(preset, 1, 8));
  moe::buffer const scratch(moe::preset_scratch(exec, preset, 1, 8));
  float logits[8] = {}, dlogits[8] = {}, weights[moe::max_choices] = {};
  moe::matrix_view const in(logits, 1, 8), out(dlogits, 1, 8);
  moe::vector_view const used(weights, preset.gate.k());
  double const loss =
      moe::apply_preset(exec, preset, in, moe::batch{}, {}, scratch, routing, table, used);
  moe::apply_preset_backward(exec, preset, in, routing, table, used, 1.0, scratch, out);
  return loss;
}

}  // namespace

double all_presets() {
  using namespace moe;
  auto const by_weight = [](routed_pair<float> const& pair) { return pair.weight; };
  return run_on_host(deepspeed_top1()) + run_on_host(deepspeed_top2()) +
         run_on_host(deepspeed_topk()) + run_on_host(tutel_topk()) +
         run_on_host(switch_transformer()) + run_on_host(gshard()) +
         run_on_host(deepspeed_topk().with_overflow(by_weight)) + run_on_host(deepseek_v3());
}
