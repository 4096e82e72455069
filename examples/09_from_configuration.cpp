// Choose the gate and the shape of a layer at run time, from a configuration that is read as text.
// SPDX-License-Identifier: MIT
//
//   g++ -std=c++20 -O2 -I include examples/09_from_configuration.cpp -o layer -pthread && ./layer
//
// Prints what two configurations give, and how a third one is refused.
#include <cmath>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/visit_preset.hpp>

// [read]
struct configuration {
  std::string gate;
  moe::preset_options router;
  moe::layer_shape shape{.T = 32, .M = 8};
};

configuration read(std::string const& text) {
  configuration c;
  std::istringstream in(text);
  double number = 0;
  for (std::string key; in >> key;)
    if (key == "gate")
      in >> c.gate;
    else if (in >> number; key == "k")
      c.router.k = static_cast<int>(number);
    else if (key == "capacity_factor")
      c.router.capacity_factor = number;
    else if (key == "experts")
      c.router.experts = c.shape.E = static_cast<int>(number);
    else if (key == "hidden")
      c.shape.H = static_cast<std::int64_t>(number);
  return c;
}
// [/read]

/// Tokens that the experts take in a forward of random tokens. From here on all types are known.
template <class Layer>
int run(Layer const& layer) {
  std::int64_t const T = layer.shape().T, M = layer.shape().M;
  std::vector<float> values(static_cast<std::size_t>(layer.parameter_elements()));
  std::vector<float> x(static_cast<std::size_t>(T * M)), out(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(0.7f * static_cast<float>(i));
  float angle = 0;
  for (float& v : values) v = std::cos(angle += 1.3f);
  moe::buffer const saved_bytes(layer.template saved_bytes<float>());
  auto saved = layer.template carve_saved<float>(saved_bytes);
  layer.forward(moe::cpu{}, layer.carve(values.data()), {x.data(), T, M}, {}, {out.data(), T, M},
                saved, moe::buffer(layer.template scratch_bytes<float>({})));
  return static_cast<int>(saved.table.counts->kept);
}

// [visit]
int build_and_run(std::string const& text) {
  configuration const c = read(text);
  return moe::visit_preset(c.gate, c.router, [&](auto const& preset) {
    return run(moe::moe_layer(preset, moe::ffn<moe::swiglu>{}, c.shape));
  });
}
// [/visit]

int main() {
  int const top2 = build_and_run("gate deepspeed_top2 experts 4 hidden 16 capacity_factor 0.5");
  int const top3 = build_and_run("gate tutel_topk k 3 experts 6 hidden 12 capacity_factor 0");
  std::printf("top2: %d of 64 pairs kept\ntop3: %d of 96 pairs kept\n", top2, top3);
  try {
    build_and_run("gate top9 experts 4 hidden 16");
    return 1;
  } catch (moe::precondition_error const& error) {
    std::puts(error.what());
  }
  return top2 > 0 && top2 < 64 && top3 == 96 ? 0 : 1;
}
