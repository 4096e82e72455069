// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/expert/activation.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/interleaved.hpp>
#include <moe/expert/segments.hpp>

namespace {

using moe_test::refusal;
using moe_test::says;

constexpr std::int64_t P = 2, M = 3, H = 4;

struct checkpoint {
  std::vector<double> gate_up = moe_test::normals(P * M * 2 * H, 1, 0, 3);
  std::vector<double> bias = moe_test::normals(P * 2 * H, 2, 0, 3);

  moe::interleaved_projection<double> view() {
    return {{gate_up.data(), P, M, 2 * H}, {bias.data(), P, 2 * H}};
  }
};

}  // namespace

TEST_CASE("expert/interleaved: even columns are the gate's, and there is a way back") {
  std::vector<double> both{1, 10, 2, 20, 3, 30, 4, 40}, bias{5, 50, 6, 60};  // M = 2, H = 2
  std::vector<float> values(static_cast<std::size_t>(moe::ffn_elements({1, 2, 2}, true, true)));
  auto const w = moe::carve_ffn(values.data(), {1, 2, 2}, true, true);
  moe::interleaved_projection<double> const from{{both.data(), 1, 2, 4}, {bias.data(), 1, 4}};
  moe::split_interleaved(from, w);
  CHECK(w.gate[0](0, 1) == 2);
  CHECK(w.gate[0](1, 0) == 3);
  CHECK(w.up[0](0, 0) == 10);
  CHECK(w.up[0](1, 1) == 40);
  CHECK(w.gate_bias(0, 1) == 6);
  CHECK(w.up_bias(0, 0) == 50);
  CHECK(w.down[0](0, 0) == 0);  // not touched
  auto const before = both, bias_before = bias;
  std::fill(both.begin(), both.end(), 0.0);
  std::fill(bias.begin(), bias.end(), 0.0);
  moe::join_interleaved(w, from);
  CHECK(both == before);
  CHECK(bias == bias_before);
}

TEST_CASE("expert/interleaved: gpt-oss's expert as its formula") {
  // g = min(gate, 7), u = clamp(up, -7, 7): (u + 1) g sigmoid(1.702 g), and the down bias before any
  // router weight.
  checkpoint c;
  std::vector<double> values(static_cast<std::size_t>(moe::ffn_elements({P, M, H}, true, true)));
  auto const w = moe::carve_ffn(values.data(), {P, M, H}, true, true);
  moe::split_interleaved(c.view(), w);
  auto const down = moe_test::normals(P * H * M, 3), down_bias = moe_test::normals(P * M, 4);
  std::copy(down.begin(), down.end(), w.down.data());
  std::copy(down_bias.begin(), down_bias.end(), w.down_bias.data());
  std::int64_t const T = 20;
  auto const x = moe_test::normals(T * M, 5, 0, 2);
  moe::ffn<moe::clamped_swiglu> const experts;
  moe::cpu const exec;
  int clamped = 0;
  for (std::int64_t p = 0; p < P; ++p) {
    auto const one = w.expert(p);
    std::vector<double> y(x.size());
    moe::buffer const saved(experts.saved_bytes<double>(one.shape(), T));
    moe::buffer const scratch(experts.forward_scratch_bytes<double>(exec, one.shape(), T));
    experts.forward_rows(exec, experts.prepare(moe::ffn_weights<double const>(one)),
                         {x.data(), T, M}, moe::all_rows(T), moe::matrix_view(y, T, M), saved,
                         scratch);
    for (std::int64_t t = 0; t < T; ++t) {
      std::vector<double> expected(down_bias.begin() + p * M, down_bias.begin() + (p + 1) * M);
      for (std::int64_t h = 0; h < H; ++h) {
        double g = c.bias[std::size_t(p * 2 * H + 2 * h)];
        double u = c.bias[std::size_t(p * 2 * H + 2 * h + 1)];
        for (std::int64_t m = 0; m < M; ++m) {
          g += x[std::size_t(t * M + m)] * c.gate_up[std::size_t((p * M + m) * 2 * H + 2 * h)];
          u += x[std::size_t(t * M + m)] * c.gate_up[std::size_t((p * M + m) * 2 * H + 2 * h + 1)];
        }
        clamped += g > 7 || std::abs(u) > 7 ? 1 : 0;
        g = std::min(g, 7.0);
        u = std::min(std::max(u, -7.0), 7.0);
        double const a = (u + 1) * g / (1 + std::exp(-1.702 * g));
        for (std::int64_t m = 0; m < M; ++m)
          expected[std::size_t(m)] += a * down[std::size_t((p * H + h) * M + m)];
      }
      for (std::int64_t m = 0; m < M; ++m)
        CHECK(y[std::size_t(t * M + m)] == doctest::Approx(expected[std::size_t(m)]));
    }
  }
  CHECK(clamped > 20);
}

TEST_CASE("expert/interleaved: shapes and biases that do not fit are refused") {
  checkpoint c;
  std::vector<double> values(static_cast<std::size_t>(moe::ffn_elements({P, M, H}, true, true)));
  auto w = moe::carve_ffn(values.data(), {P, M, H}, true, true);
  auto both = c.view();
  both.weights = {c.gate_up.data(), P, M, 2 * H - 1, 2 * H, M * 2 * H};
  says(refusal([&] { moe::split_interleaved(both, w); }),
       "interleaved: up and gate are [P,M,H], the projection is [P,M,2H]");
  both = c.view();
  w.up_bias = {};
  says(refusal([&] { moe::split_interleaved(both, w); }),
       "interleaved: biases are [P,2H] and [P,H], or all absent");
  w.gate_bias = {};
  says(refusal([&] { moe::join_interleaved(w, both); }), "interleaved: biases are");
  both.bias = {};
  CHECK_NOTHROW(moe::split_interleaved(both, w));
  w.gate = {};
  says(refusal([&] { moe::split_interleaved(both, w); }), "interleaved: up and gate are");
}
