// Calls of a backward over packed weights, which must not compile: REFUSED chooses one. With `nothing` it
// is the forward alone, which has to.
// SPDX-License-Identifier: MIT
#include <moe/expert/packed_ffn.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>

namespace {

enum class call { nothing, experts, rows, layer };
constexpr call refused = call::REFUSED;
using packed = moe::packed_ffn<moe::swiglu, moe::bf16>;
using layer = moe::moe_layer<decltype(moe::tutel_topk({})), packed>;

}  // namespace

int main() {
  moe::cpu const exec;
  moe::matrix_view<float const> const x;
  moe::matrix_view<float> const out;
  moe::memory const none;

  packed const experts{};
  moe::packed_weights<moe::bf16> const weights;
  auto const handle = experts.prepare(weights);
  moe::routing_table const table;
  moe::row_segments const segments(0, nullptr, nullptr);
  experts.forward(exec, handle, x, table, {}, out, none, none);
  experts.forward_rows(exec, handle, x, segments, out, none, none);
  if constexpr (refused == call::experts)
    experts.backward(exec, handle, x, x, table, moe::vector_view<float const>(), none, out,
                     moe::vector_view<float>(), weights, moe::update::assign, none);
  if constexpr (refused == call::rows)
    experts.backward_rows(exec, handle, x, moe::vector_view<float const>(), x, segments, none, out,
                          moe::vector_view<float>(), weights, moe::update::assign, none);

  layer const whole(moe::tutel_topk({}), experts, {.T = 1, .M = 8, .H = 8, .E = 2});
  auto const parameters = whole.carve(static_cast<float*>(nullptr));
  auto saved = whole.carve_saved<float>(none);
  whole.forward<float>(exec, parameters, x, {}, out, saved, none);
  if constexpr (refused == call::layer)
    whole.backward<float>(exec, parameters, x, x, {}, saved, out, parameters, moe::update::assign,
                          none);
}
