// The path of gating and tables, once, for a tool that counts instructions: counted CASE.
// SPDX-License-Identifier: MIT
#include <cstdint>
#include <cstdio>
#include <string_view>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.hpp>

namespace {

constexpr std::int64_t T = 512;

// What is counted is what runs in here.
template <class F>
[[gnu::noinline]] void counted_part(F const& f) {
  f();
}

/// Numbers in [-2, 2) without a library's random numbers: the same anywhere.
std::vector<float> make_logits(int E) {
  std::vector<float> logits;
  std::uint32_t bits = 1;
  for (std::int64_t i = 0; i < T * E; ++i) {
    bits = bits * 1664525u + 1013904223u;
    logits.push_back(static_cast<float>(bits >> 8) * 0x1p-22f - 2);
  }
  return logits;
}

template <int K>
void run(bool tables, int E, moe::table_rules const& rules) {
  using gate_type = moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised>;
  gate_type const gate;
  auto const logits = make_logits(E);
  moe::matrix_view<float const> const view(logits.data(), T, E);
  moe::cpu const exec;
  moe::routing_buffer routed(T, K, E);
  moe::buffer const gate_scratch(moe::route_scratch<gate_type, float>(exec, E));
  moe::table_shape bounds{.T = T, .K = K, .E = E};
  bounds.max_rows = moe::max_rows(rules, bounds);
  moe::table_buffer table(bounds);
  moe::buffer const table_scratch(moe::build_table_scratch(exec, bounds));
  auto const route = [&] { moe::route(exec, gate, view, moe::batch{}, gate_scratch, routed); };
  if (!tables) return counted_part(route);
  route();
  counted_part([&] { moe::build_table(exec, routed, rules, table_scratch, table); });
}

}  // namespace

int main(int argc, char** argv) {
  std::string_view const name = argc == 2 ? argv[1] : "";
  moe::table_rules const packed,
      dropping{.cap = moe::capacity::deepspeed({.factor = 1, .eval_factor = 1})};
  if (name == "gate_8_2")
    run<2>(false, 8, packed);
  else if (name == "gate_64_8")
    run<8>(false, 64, packed);
  else if (name == "gate_256_8")
    run<8>(false, 256, packed);
  else if (name == "table_8_2")
    run<2>(true, 8, packed);
  else if (name == "table_64_8")
    run<8>(true, 64, packed);
  else if (name == "table_256_8")
    run<8>(true, 256, packed);
  else if (name == "dropping_64_8")
    run<8>(true, 64, dropping);
  else
    return std::puts("usage: counted CASE"), 2;
  return 0;
}
