// Small MoE layers with random values and any table layout, for the tests of expert/.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

#include <moe/core/memory.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/routing/build_table.hpp>

namespace moe_test {

template <class V>
std::vector<V> random_values(std::int64_t n, std::mt19937& random, double scale = 1) {
  std::vector<V> values(static_cast<std::size_t>(n));
  for (V& v : values)
    v = static_cast<V>((static_cast<double>(random() >> 8) * 0x1p-23 - 1.0) * scale);
  return values;
}

template <class S>
std::vector<S> rounded(std::vector<float> const& values) {
  std::vector<S> to(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) to[i] = static_cast<S>(values[i]);
  return to;
}

/// A routing and its table. Expert E - 1 is chosen by nobody if `idle`.
struct table_of {
  moe::basic_routing_buffer<float> routing;
  moe::buffer scratch;
  moe::table_buffer table;

  static moe::table_shape shape(std::int64_t T, int K, int E, moe::table_rules const& rules,
                                int sources) {
    moe::table_shape s{.T = T, .K = K, .E = E, .sources = sources};
    s.max_rows = moe::max_rows(rules, s);
    return s;
  }

  table_of(std::int64_t T, int K, int E, moe::table_rules const& rules, std::mt19937& random,
           bool idle = false, int sources = 1, moe::expert_map const& map = {})
      : routing(T, K, E),
        scratch(moe::build_table_scratch(moe::cpu{}, shape(T, K, E, rules, sources))),
        table(shape(T, K, E, rules, sources)),
        source(static_cast<std::size_t>(T)) {
    auto const choices = static_cast<std::uint32_t>(idle ? E - 1 : E);
    for (std::int64_t t = 0; t < T; ++t) {
      source[static_cast<std::size_t>(t)] =
          static_cast<std::int32_t>(random() % static_cast<std::uint32_t>(sources));
      auto const draw = [&] { return static_cast<std::uint32_t>(random()) % choices; };
      std::uint32_t const first = std::min(draw(), draw());  // skewed
      for (int j = 0; j < K; ++j) {
        routing.expert[t * K + j] =
            static_cast<std::int32_t>((first + static_cast<std::uint32_t>(j)) % choices);
        routing.weight[t * K + j] = static_cast<float>(random() % 1000) / 1000.0f;
      }
    }
    if (sources > 1) routing.tokens.source = source.data();
    moe::build_table(moe::cpu{}, routing, rules, map, scratch, table);
  }

  std::vector<std::int32_t> source;
};

/// Rules of every layout; the last one drops.
inline std::vector<moe::table_rules> all_layouts() {
  moe::table_rules packed, padded, aligned, tight;
  padded.rows = moe::layout::padded;
  padded.cap = moe::capacity::fixed(40);
  aligned.rows = moe::layout::aligned;
  aligned.align = 8;
  tight.rows = moe::layout::padded;
  tight.cap = moe::capacity::fixed(3);
  return {packed, padded, aligned, tight};
}

/// Parameters or gradients that own their memory.
template <class V>
struct owned_weights {
  std::vector<V> values;
  moe::ffn_weights<V> view;

  owned_weights(moe::ffn_shape const& shape, bool gated, bool bias, V fill = 0)
      : values(static_cast<std::size_t>(moe::ffn_elements(shape, gated, bias)), fill),
        view(moe::carve_ffn(values.data(), shape, gated, bias)) {}
  owned_weights(moe::ffn_shape const& shape, bool gated, bool bias, std::mt19937& random,
                double scale)
      : owned_weights(shape, gated, bias) {
    values = random_values<V>(static_cast<std::int64_t>(values.size()), random, scale);
    view = moe::carve_ffn(values.data(), shape, gated, bias);
  }
  owned_weights(owned_weights const&) = delete;
  owned_weights& operator=(owned_weights const&) = delete;
};

/// One expert on one token, in double: the definition, in loops.
template <class Activation, class V>
std::vector<double> apply_expert(Activation const& act, moe::ffn_weights<V> const& w,
                                 std::int64_t p, std::vector<double> const& x) {
  std::int64_t const M = w.shape().M, H = w.shape().H;
  auto const at = [](auto n) { return static_cast<std::size_t>(n); };
  std::vector<double> h(at(H)), y(at(M));
  for (std::int64_t j = 0; j < H; ++j) {
    double u = w.up_bias.absent() ? 0 : w.up_bias(p, j);
    double g = w.gate_bias.absent() ? 0 : w.gate_bias(p, j);
    for (std::int64_t i = 0; i < M; ++i) {
      u += x[at(i)] * w.up[p](i, j);
      if (Activation::gated) g += x[at(i)] * w.gate[p](i, j);
    }
    if constexpr (Activation::gated)
      h[at(j)] = act(g, u);
    else
      h[at(j)] = act(u);
  }
  for (std::int64_t i = 0; i < M; ++i) {
    y[at(i)] = w.down_bias.absent() ? 0 : w.down_bias(p, i);
    for (std::int64_t j = 0; j < H; ++j) y[at(i)] += h[at(j)] * w.down[p](j, i);
  }
  return y;
}

}  // namespace moe_test
