// How far the results of each type of weights are from those in double with the weights before they were
// rounded, and with the numbers that their bits stand for; printed as the table of docs/cpu.md.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstdio>
#include <doctest/doctest.h>
#include <random>
#include <type_traits>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_ffn.hpp>
#include <moe/expert/packed_fp8.hpp>

#include "case.hpp"
#include "owned_packed.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::owned_packed;

#if defined(MOE_TEST_INSTRUMENTED)
moe::ffn_shape const shape{2, 1024, 256};
#else
moe::ffn_shape const shape{2, 1024, 2816};
#endif
constexpr std::int64_t T = 8, K = 2;
constexpr std::int64_t outlier_channels[] = {5, 77, 130, 201};
constexpr float outlier = 50;

std::vector<float> normal_values(std::int64_t n, std::mt19937& random, double deviation) {
  std::normal_distribution<float> law(0, static_cast<float>(deviation));
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& v : values) v = law(random);
  return values;
}

/// Two experts, tokens and their routing.
struct model {
  std::mt19937 random{11};
  moe_test::owned_weights<float> weights{shape, true, false};
  moe_test::table_of routed{T, static_cast<int>(K), 2, {}, random};
  std::vector<float> ordinary = normal_values(T * shape.M, random, 1), outliers = ordinary;

  model() {
    std::int64_t const inputs = 2 * shape.P * shape.M * shape.H;
    auto const up_and_gate =
        normal_values(inputs, random, 1 / std::sqrt(static_cast<double>(shape.M)));
    auto const down =
        normal_values(inputs / 2, random, 1 / std::sqrt(static_cast<double>(shape.H)));
    auto const part = [](moe::stacked_view<float> const& to, float const* from) {
      std::copy_n(from, to.count() * to.rows() * to.cols(), to.data());
    };
    part(weights.view.up, up_and_gate.data());
    part(weights.view.gate, up_and_gate.data() + inputs / 2);
    part(weights.view.down, down.data());
    // As of language models: the same few channels of all tokens are far greater than the others.
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t const channel : outlier_channels)
        outliers[static_cast<std::size_t>(t * shape.M + channel)] *= outlier;
  }
};

/// The layer in double.
std::vector<double> in_double(moe::ffn_weights<float> const& w, std::vector<float> const& x,
                              moe_test::table_of const& routed) {
  std::int64_t const M = shape.M, H = shape.H;
  std::vector<double> out(static_cast<std::size_t>(T * M));
  for (std::int64_t i = 0; i < T * K; ++i) {
    std::vector<double> up(static_cast<std::size_t>(H)), gate(up);
    std::int64_t const p = routed.routing.expert[i], t = i / K;
    for (std::int64_t k = 0; k < M; ++k) {
      double const v = x[static_cast<std::size_t>(t * M + k)];
      float const *const u = w.up[p].row(k), *const g = w.gate[p].row(k);
      for (std::int64_t j = 0; j < H; ++j) {
        up[static_cast<std::size_t>(j)] += v * u[j];
        gate[static_cast<std::size_t>(j)] += v * g[j];
      }
    }
    for (std::int64_t j = 0; j < H; ++j) {
      auto const at = static_cast<std::size_t>(j);
      double const h =
          static_cast<double>(routed.routing.weight[i]) * moe::swiglu{}(gate[at], up[at]);
      float const* const d = w.down[p].row(j);
      for (std::int64_t c = 0; c < M; ++c) out[static_cast<std::size_t>(t * M + c)] += h * d[c];
    }
  }
  return out;
}

double relative_error(std::vector<float> const& out, std::vector<double> const& want) {
  double off = 0, norm = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    off += std::pow(out[i] - want[i], 2);
    norm += want[i] * want[i];
  }
  return std::sqrt(off / norm);
}

template <class W, class Rows>
std::vector<float> run(owned_packed<W> const& packed, std::vector<float> const& x,
                       moe_test::table_of const& routed, Rows) {
  moe::thread_team team(2);
  moe::cpu const exec(team);
  moe::packed_ffn<moe::swiglu, W, moe::best_set, Rows> const experts{};
  moe::buffer const scratch(
      experts.template forward_scratch_bytes<float>(exec, shape, routed.table.max_rows));
  std::vector<float> out(x.size());
  experts.forward(exec, experts.prepare(packed.view), {x, T, shape.M}, routed.table,
                  {routed.routing.weight, T * K}, {out, T, shape.M}, {}, scratch);
  return out;
}

/// The nearest number of fp8, ties to even.
std::uint8_t nearest_fp8(float v) {
  float const a = std::fabs(v);
  int code = 0;
  if (a < 0x1p-6f) {
    code = static_cast<int>(std::nearbyint(a * 0x1p9f));
  } else {
    int const e = std::ilogb(a);
    code = (e + 7) * 8 + static_cast<int>(std::nearbyint(std::ldexp(a, 3 - e))) - 8;
  }
  return static_cast<std::uint8_t>(std::min(code, 0x7e) | (std::signbit(v) ? 128 : 0));
}
float value_of_fp8(std::uint8_t code) {
  int const exponent = code >> 3 & 15, fraction = code & 7;
  float const v = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
  return code < 128 ? v : -v;
}

/// Packs as W; `numbers` out: what the bits of the packed weights stand for.
template <class W>
void pack(moe::ffn_weights<float> const& from, owned_packed<W> const& to,
          moe::ffn_weights<float> const& numbers) {
  moe::cpu const exec;
  if constexpr (moe::weight_number<W>) {
    moe::pack(exec, from, moe::orientation::in_out, to.view);
    auto const part = [](moe::stacked_view<float> const& m, moe::stacked_view<float> const& out) {
      for (std::int64_t i = 0; i < m.count() * m.rows() * m.cols(); ++i)
        out.data()[i] = static_cast<float>(static_cast<W>(m.data()[i]));
    };
    part(from.up, numbers.up);
    part(from.gate, numbers.gate);
    part(from.down, numbers.down);
  } else if constexpr (moe::weight_blocks<W>) {
    moe::pack(exec, from, moe::orientation::in_out, to.view);
    moe_test::read_numbers(to.view, numbers);
  } else {
    // As checkpoints are made: the greatest of 128 x 128 becomes 448.
    std::vector<moe::fp8_e4m3> codes(static_cast<std::size_t>(3 * shape.P * shape.M * shape.H));
    std::vector<float> scales(codes.size() / 128 / 128);
    moe::ffn_weights<moe::fp8_e4m3 const> source;
    moe::ffn_weights<float const> scale_views;
    moe::fp8_e4m3* code = codes.data();
    float* scale = scales.data();
    auto const part = [&](moe::stacked_view<float> const& m, moe::stacked_view<float> const& out,
                          auto& code_view, auto& scale_view) {
      std::int64_t const in = m.rows(), width = m.cols();
      moe::stacked_view<moe::fp8_e4m3> const c(code, m.count(), width, in);
      moe::stacked_view<float> const s(scale, m.count(), width / 128, in / 128);
      for (std::int64_t p = 0; p < m.count(); ++p) {
        for (std::int64_t k = 0; k < in; ++k)
          for (std::int64_t j = 0; j < width; ++j) {
            float& most = s[p](j / 128, k / 128);
            most = std::max(most, std::fabs(m[p](k, j)) / 448);
          }
        for (std::int64_t k = 0; k < in; ++k)
          for (std::int64_t j = 0; j < width; ++j) {
            float const by = s[p](j / 128, k / 128);
            c[p](j, k).bits = nearest_fp8(m[p](k, j) / by);
            out[p](k, j) = value_of_fp8(c[p](j, k).bits) * by;
          }
      }
      code_view = c;
      scale_view = s;
      code += m.count() * in * width;
      scale += m.count() * (in / 128) * (width / 128);
    };
    part(from.up, numbers.up, source.up, scale_views.up);
    part(from.gate, numbers.gate, source.gate, scale_views.gate);
    part(from.down, numbers.down, source.down, scale_views.down);
    moe::pack(exec, source, scale_views, to.view);
  }
}

/// That measured, give or take a quarter: other numbers and other shapes.
void check_error(double error, double measured) {
  CHECK(error < 1.25 * measured);
  CHECK(error > 0.8 * measured);
}
constexpr double of_float_sums = 2e-6;  // at most

/// Relative errors that were measured.
struct measured {
  double of_weights;   ///< Against the weights before they were rounded,
  double of_outliers;  ///< of tokens with outliers,
  double of_rows = 0;  ///< and against the numbers that weights became: 0 = of sums in float alone.
};

}  // namespace

TEST_CASE("expert/packed_accuracy: each type of weights beside double") {
  model const m;
  auto const want = in_double(m.weights.view, m.ordinary, m.routed);
  auto const want_outliers = in_double(m.weights.view, m.outliers, m.routed);
  moe_test::owned_weights<float> const numbers(shape, true, false);
  std::printf(
      "| weights | rows | float weights | numbers of the bits | float weights, outliers |\n"
      "|---|---|---|---|---|\n");
  auto const check = [&]<class W>(W, char const* name, measured const& of_float,
                                  measured const& of_rounded = {}) {
    owned_packed<W> const packed(shape, true);
    pack(m.weights.view, packed, numbers.view);
    auto const of_numbers = in_double(numbers.view, m.ordinary, m.routed);
    auto const with = [&]<class Rows>(Rows rows, char const* rows_name, measured const& expected) {
      auto const out = run(packed, m.ordinary, m.routed, rows);
      double const all = relative_error(out, want), own = relative_error(out, of_numbers);
      double const outliers =
          relative_error(run(packed, m.outliers, m.routed, rows), want_outliers);
      std::printf("| %s | %s | %.1e | %.1e | %.1e |\n", name, rows_name, all, own, outliers);
      CAPTURE(name);
      CAPTURE(rows_name);
      if (expected.of_rows > 0)
        check_error(own, expected.of_rows);
      else
        CHECK(own < of_float_sums);
      if (std::same_as<W, float>) {
        CHECK(moe_test::worse(all, outliers) < of_float_sums);
      } else {
        check_error(all, expected.of_weights);
        check_error(outliers, expected.of_outliers);
      }
    };
    with(0.0f, "float", of_float);
    if constexpr (moe::weight_blocks<W>) with(moe::int8_blocks{}, "integers", of_rounded);
    if constexpr (std::is_same_v<W, moe::bf16>) with(moe::bf16{}, "bf16", of_rounded);
  };
  check(float{}, "`float`", {});
  check(moe::half{}, "`half`", {3.6e-4, 3.6e-4});
  check(moe::bf16{}, "`bf16`", {2.9e-3, 2.9e-3}, {4.1e-3, 4.4e-3, 3.0e-3});
  check(moe::fp8_blocks{}, "`fp8_blocks`", {4.6e-2, 4.5e-2});
  check(moe::int8_blocks{}, "`int8_blocks`", {9.3e-3, 9.2e-3}, {1.5e-2, 2.1e-2, 1.2e-2});
  check(moe::int4_blocks{}, "`int4_blocks`", {1.5e-1, 1.5e-1}, {1.5e-1, 1.5e-1, 1.2e-2});
}

TEST_CASE("expert/packed_accuracy: outliers whose weights are as much smaller") {
  // Their share of the results is that of any other channel, but their scale is that of 32.
  model m;
  for (std::int64_t p = 0; p < shape.P; ++p)
    for (std::int64_t const channel : outlier_channels)
      for (std::int64_t j = 0; j < shape.H; ++j) {
        m.weights.view.up[p](channel, j) /= outlier;
        m.weights.view.gate[p](channel, j) /= outlier;
      }
  auto const want = in_double(m.weights.view, m.outliers, m.routed);
  moe_test::owned_weights<float> const numbers(shape, true, false);
  auto const check = [&]<class W>(W, char const* name, double of_float, double of_integers) {
    owned_packed<W> const packed(shape, true);
    pack(m.weights.view, packed, numbers.view);
    double const floats = relative_error(run(packed, m.outliers, m.routed, 0.0f), want);
    double const integers =
        relative_error(run(packed, m.outliers, m.routed, moe::default_rows<W>{}), want);
    std::printf("| outliers of small weights | %s | %.1e | %.1e |\n", name, floats, integers);
    CAPTURE(name);
    check_error(floats, of_float);
    check_error(integers, of_integers);
  };
  check(moe::bf16{}, "bf16", 2.9e-3, 2.9e-3);
  check(moe::fp8_blocks{}, "fp8_blocks", 4.6e-2, 4.6e-2);
  check(moe::int8_blocks{}, "int8_blocks", 2.4e-2, 6.0e-2);
  check(moe::int4_blocks{}, "int4_blocks", 1.7e-1, 1.8e-1);
}
