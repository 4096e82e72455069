// packed_blocks and packed_fp8: ggml's blocks there and back, quantising, products on every instruction set, bad input.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_ffn.hpp>
#include <moe/expert/packed_fp8.hpp>
#include <moe/expert/packed_int8.hpp>

#include "case.hpp"
#include "owned_packed.hpp"
#include "sets.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::owned_packed;

template <class W>
using ggml_of = typename moe::detail::packed::blocks_of<W>::ggml;

/// Block b dequantised by ggml's definition, written down once more.
float value_of(moe::q8_0 const& b, int i) {
  return static_cast<float>(b.scale) * static_cast<float>(b.value[i]);
}
float value_of(moe::q4_0 const& b, int i) {
  int const n = i < 16 ? b.pair[i] & 15 : b.pair[i - 16] >> 4;
  return static_cast<float>(b.scale) * static_cast<float>(n - 8);
}

template <class B>
struct blocks {
  std::vector<B> values;
  moe::ffn_weights<B> view;

  blocks(moe::ffn_shape const& shape, bool gated) {
    auto const [P, M, H] = shape;
    std::int64_t const each = P * M * H / 32;
    values.resize(static_cast<std::size_t>(each * (gated ? 3 : 2)));
    view.up = {values.data(), P, H, M / 32};
    view.down = {values.data() + each, P, M, H / 32};
    if (gated) view.gate = {values.data() + 2 * each, P, H, M / 32};
  }
  void fill(std::mt19937& random) {
    for (B& b : values) {
      auto* const bytes = reinterpret_cast<unsigned char*>(&b);
      for (std::size_t i = 0; i < sizeof b; ++i) bytes[i] = static_cast<unsigned char>(random());
      b.scale = moe::half(0.001f + 0.01f * static_cast<float>(random() % 100));
      if constexpr (std::same_as<B, moe::q8_0>)
        for (auto& v : b.value) v = std::max<std::int8_t>(v, -127);
    }
  }
};

/// ggml's blocks as numbers, [in, out].
template <class B>
moe_test::owned_weights<float>& dequantise(blocks<B> const& from,
                                           moe_test::owned_weights<float>& to) {
  auto const part = [](moe::stacked_view<B> const& m, moe::stacked_view<float> const& out) {
    for (std::int64_t p = 0; p < out.count(); ++p)
      for (std::int64_t k = 0; k < out.rows(); ++k)
        for (std::int64_t j = 0; j < out.cols(); ++j)
          out[p](k, j) = value_of(m[p](j, k / 32), static_cast<int>(k % 32));
  };
  part(from.view.up, to.view.up);
  part(from.view.down, to.view.down);
  if (!from.view.gate.absent()) part(from.view.gate, to.view.gate);
  return to;
}

/// fp8 e4m3fn by its definition.
double value_of_fp8(int code) {
  int const exponent = code >> 3 & 15, fraction = code & 7;
  if ((code & 127) == 127) return std::numeric_limits<double>::quiet_NaN();
  double const v =
      exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 7 - 3);
  return code < 128 ? v : -v;
}

/// One expert of fp8 without a gate. Its hidden row is the token: up is the identity.
struct fp8_identity {
  std::int64_t n;
  std::vector<moe::fp8_e4m3> up, down;
  std::vector<float> scale;
  moe::ffn_shape shape{1, n, n};
  owned_packed<moe::fp8_blocks> packed;

  fp8_identity(std::int64_t width, float down_scale)
      : n(width),
        up(static_cast<std::size_t>(n * n), moe::fp8_e4m3{0}),
        down(up),
        scale(static_cast<std::size_t>((n + 127) / 128 * ((n + 127) / 128)), down_scale),
        packed(shape, false) {
    for (std::int64_t i = 0; i < n; ++i) at(up, i, i) = 0x38;
  }
  std::uint8_t& at(std::vector<moe::fp8_e4m3>& m, std::int64_t column, std::int64_t k) const {
    return m[static_cast<std::size_t>(column * n + k)].bits;
  }
  /// Results of the tokens with a single 1, one for each place: [n,n].
  template <class Set>
  std::vector<float> run(Set) {
    std::vector<float> const ones(scale.size(), 1.0f);
    moe::ffn_weights<moe::fp8_e4m3 const> source;
    moe::ffn_weights<float const> scales;
    std::int64_t const s = (n + 127) / 128;
    source.up = {up.data(), 1, n, n};
    source.down = {down.data(), 1, n, n};
    scales.up = {ones.data(), 1, s, s};
    scales.down = {scale.data(), 1, s, s};
    moe::pack(moe::cpu{}, source, scales, packed.view);
    moe::packed_ffn<moe::relu, moe::fp8_blocks, Set> const experts{};
    moe::buffer const scratch(experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, n));
    std::vector<float> x(static_cast<std::size_t>(n * n)), out(x.size(), 9.0f);
    for (std::int64_t i = 0; i < n; ++i) x[static_cast<std::size_t>(i * n + i)] = 1;
    std::int32_t const begin = 0, used = static_cast<std::int32_t>(n);
    experts.forward_rows(moe::cpu{}, experts.prepare(packed.view), {x, n, n}, {1, &begin, &used},
                         {out, n, n}, {}, scratch);
    return out;
  }
};

}  // namespace

TEST_CASE_TEMPLATE("expert/packed_blocks: ggml's blocks there and back are the same bytes", W,
                   moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(1);
  moe::thread_team team(3);
  for (moe::ffn_shape const& shape : {moe::ffn_shape{2, 32, 64}, {3, 96, 160}, {1, 128, 128}})
    for (bool gated : {false, true}) {
      blocks<ggml_of<W>> from(shape, gated), back(shape, gated);
      from.fill(random);
      owned_packed<W> packed(shape, gated), one_by_one(shape, gated);
      moe::pack(team, from.view, packed.view);
      moe::unpack(team, packed.view, back.view);
      CHECK(std::memcmp(from.values.data(), back.values.data(),
                        from.values.size() * sizeof(from.values[0])) == 0);
      for (std::int64_t p = 0; p < shape.P; ++p)
        moe::pack(moe::cpu{}, from.view.expert(p), one_by_one.view, p);
      CHECK(std::memcmp(packed.bytes.data(), one_by_one.bytes.data(), packed.bytes.size()) == 0);
    }
}

TEST_CASE_TEMPLATE(
    "expert/packed_blocks: rows of float equal loops in double on every instruction set", W,
    moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(2);
  moe::ffn_shape const shape{3, 160, 96};
  blocks<ggml_of<W>> from(shape, true);
  from.fill(random);
  for (auto& b : from.values) b.scale = moe::half(static_cast<float>(b.scale) * 0.01f);
  moe_test::owned_weights<float> numbers(shape, true, false);
  dequantise(from, numbers);
  owned_packed<W> packed(shape, true);
  moe::pack(moe::cpu{}, from.view, packed.view);
  std::int32_t const begin[] = {0, 1, 6}, used[] = {1, 5, 30};
  std::int64_t const rows = 36;
  auto const x = moe_test::random_values<float>(rows * shape.M, random);
  std::vector<double> want;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::vector<double> const in(x.begin() + r * shape.M, x.begin() + (r + 1) * shape.M);
    auto const y = moe_test::apply_expert(moe::swiglu{}, numbers.view,
                                          r < 1   ? 0
                                          : r < 6 ? 1
                                                  : 2,
                                          in);
    want.insert(want.end(), y.begin(), y.end());
  }
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<moe::swiglu, W, Set, float> const experts{};
    auto const run = [&](moe::cpu const& exec) {
      moe::buffer const scratch(experts.template forward_scratch_bytes<float>(exec, shape, rows));
      std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN
      std::vector<float> out(x.size(), 9.0f);
      experts.forward_rows(exec, experts.prepare(packed.view), {x, rows, shape.M}, {3, begin, used},
                           {out, rows, shape.M}, {}, scratch);
      return out;
    };
    auto const out = run(moe::cpu{});
    double worst = 0, size = 1;
    for (std::size_t i = 0; i < out.size(); ++i) {
      double const off = std::fabs(out[i] - want[i]);
      worst = moe_test::worse(worst, off);
      size = std::max(size, std::fabs(want[i]));
    }
    CHECK(worst < 1e-5 * size);
    moe::thread_team team(3);
    CHECK(run(team) == out);
  });
}

namespace {

/// Rows of 17 tokens through two packed experts on every instruction set, beside loops in double over the
/// numbers that their bits stand for.
template <class Rows, class Activation, class W>
void check_against_loops(owned_packed<W> const& packed,
                         moe_test::owned_weights<float> const& numbers, moe::ffn_shape const& shape,
                         std::mt19937& random, double tolerance) {
  std::int32_t const begin[] = {0, 3}, used[] = {3, 14};
  std::int64_t const rows = 17, M = shape.M;
  auto const x = moe_test::random_values<float>(rows * M, random);
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<Activation, W, Set, Rows> const experts{};
    moe::buffer const scratch(
        experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, rows));
    std::vector<float> out(x.size());
    experts.forward_rows(moe::cpu{}, experts.prepare(packed.view), {x, rows, M}, {2, begin, used},
                         {out, rows, M}, {}, scratch);
    double worst = 0, size = 0;
    for (std::int64_t r = 0; r < rows; ++r) {
      std::vector<double> const in(x.begin() + r * M, x.begin() + (r + 1) * M);
      auto const want = moe_test::apply_expert(Activation{}, numbers.view, r < 3 ? 0 : 1, in);
      for (std::int64_t j = 0; j < M; ++j) {
        double const y = want[static_cast<std::size_t>(j)];
        double const off = std::fabs(out[static_cast<std::size_t>(r * M + j)] - y);
        worst = moe_test::worse(worst, off);
        size = std::max(size, std::fabs(y));
      }
    }
    CHECK(size > 0.1);
    CHECK(worst < tolerance * size);
  });
}

}  // namespace

TEST_CASE("expert/packed_blocks: int8 with a scale for each output equals loops in double") {
  std::mt19937 random(6);
  moe::ffn_shape const shape{2, 70, 130};
  auto const P = shape.P, M = shape.M, H = shape.H;
  std::vector<std::int8_t> bytes(static_cast<std::size_t>(3 * P * M * H));
  for (std::size_t i = 0; i < bytes.size(); ++i)  // all there are
    bytes[i] = static_cast<std::int8_t>(i * 37);
  std::vector<float> values(static_cast<std::size_t>(P * (2 * H + M)));
  for (float& v : values) v = 0.0005f + 0.0001f * static_cast<float>(random() % 8);
  moe::ffn_weights<std::int8_t const> source;
  moe::output_scales scales;
  moe_test::owned_weights<float> numbers(shape, true, false);
  auto const part = [&](int i, std::int64_t in, std::int64_t out,
                        moe::stacked_view<float> const& to) {
    moe::stacked_view<std::int8_t const> const from(bytes.data() + i * P * M * H, P, out, in);
    moe::matrix_view<float const> const scale(values.data() + i * P * H, P, out);
    for (std::int64_t p = 0; p < P; ++p)
      for (std::int64_t k = 0; k < in; ++k)
        for (std::int64_t j = 0; j < out; ++j)
          to[p](k, j) =
              static_cast<float>(from[p](j, k)) * static_cast<float>(moe::half(scale(p, j)));
    return std::pair(from, scale);
  };
  std::tie(source.up, scales.up) = part(0, M, H, numbers.view.up);
  std::tie(source.gate, scales.gate) = part(1, M, H, numbers.view.gate);
  std::tie(source.down, scales.down) = part(2, H, M, numbers.view.down);
  owned_packed<moe::int8_blocks> packed(shape, true);
  moe::pack(moe::cpu{}, source, scales, packed.view);
  check_against_loops<float, moe::swiglu>(packed, numbers, shape, random, 1e-5);
  // Rows of integers, too, though -128 has no magnitude of eight bits with a sign.
  check_against_loops<moe::int8_blocks, moe::gated_linear<moe::relu>>(packed, numbers, shape,
                                                                      random, 0.03);
  auto const refused = [&] {
    CHECK_THROWS_AS(moe::pack(moe::cpu{}, source, scales, packed.view), moe::precondition_error);
  };
  for (float const scale : {65520.0f, -65520.0f, std::numeric_limits<float>::quiet_NaN()}) {
    values.back() = scale;  // of the last output of down
    refused();
  }
  values.back() = 65519.0f;  // rounds to the greatest half
  moe::pack(moe::cpu{}, source, scales, packed.view);
  scales.down = {values.data(), P, H};
  refused();
}

TEST_CASE("expert/packed_blocks: fp8 with scales of 128 x 128 equals loops in double") {
  std::mt19937 random(4);
  moe::ffn_shape const shape{2, 200, 130};
  auto const P = shape.P, M = shape.M, H = shape.H;
  std::vector<moe::fp8_e4m3> bytes(static_cast<std::size_t>(3 * P * M * H));
  for (std::size_t i = 0; i < bytes.size(); ++i)  // all that are numbers
    bytes[i].bits = static_cast<std::uint8_t>(i * 7 % 127 | (random() & 128));
  std::vector<float> scale_values(3 * 2 * 2 * 2);
  for (float& v : scale_values) v = 0.0005f + 0.0001f * static_cast<float>(random() % 8);
  moe::ffn_weights<moe::fp8_e4m3 const> source;
  moe::ffn_weights<float const> scales;
  moe_test::owned_weights<float> numbers(shape, true, false);
  auto const part = [&](int i, std::int64_t in, std::int64_t out,
                        moe::stacked_view<float> const& to) {
    moe::stacked_view<moe::fp8_e4m3 const> const from(bytes.data() + i * P * M * H, P, out, in);
    moe::stacked_view<float const> const scale(scale_values.data() + i * 8, P, 2, 2);
    for (std::int64_t p = 0; p < P; ++p)
      for (std::int64_t k = 0; k < in; ++k)
        for (std::int64_t j = 0; j < out; ++j)
          to[p](k, j) =
              static_cast<float>(value_of_fp8(from[p](j, k).bits) * scale[p](j / 128, k / 128));
    return std::pair(from, scale);
  };
  std::tie(source.up, scales.up) = part(0, M, H, numbers.view.up);
  std::tie(source.gate, scales.gate) = part(1, M, H, numbers.view.gate);
  std::tie(source.down, scales.down) = part(2, H, M, numbers.view.down);
  owned_packed<moe::fp8_blocks> packed(shape, true);
  moe::pack(moe::cpu{}, source, scales, packed.view);

  check_against_loops<float, moe::swiglu>(packed, numbers, shape, random, 1e-5);
  scales.up = {scale_values.data(), P, 1, 2};
  CHECK_THROWS_AS(moe::pack(moe::cpu{}, source, scales, packed.view), moe::precondition_error);
}

TEST_CASE("expert/packed_blocks: each code of fp8 is its number, at each place of a block") {
  fp8_identity of(256, 0x1p-3f);
  auto const code = [](std::int64_t column, std::int64_t k) {
    auto const c = static_cast<int>((column + k) % 256);
    return (c & 127) == 127 ? 0 : c;  // a NaN would be all of its column
  };
  for (std::int64_t j = 0; j < of.n; ++j)
    for (std::int64_t k = 0; k < of.n; ++k)
      of.at(of.down, j, k) = static_cast<std::uint8_t>(code(j, k));
  moe_test::for_each_set([&]<class Set>(Set set) {
    CAPTURE(Set::name);
    auto const out = of.run(set);
    int wrong = 0;
    for (std::int64_t r = 0; r < of.n; ++r)
      for (std::int64_t j = 0; j < of.n; ++j)
        wrong += out[static_cast<std::size_t>(r * of.n + j)] != value_of_fp8(code(j, r)) * 0x1p-3
                     ? 1
                     : 0;
    CHECK(wrong == 0);
  });
}

TEST_CASE("expert/packed_blocks: a NaN of fp8 makes its column NaN, and no other") {
  std::int64_t const n = 90;  // no multiple of a block
  for (int const nan : {0x7f, 0xff})
    for (auto const& at : {std::pair(0, 0), std::pair(37, 31), std::pair(89, 89)}) {
      std::int64_t const column = at.first, k = at.second;
      fp8_identity of(n, 1);
      for (std::size_t i = 0; i < of.down.size(); ++i)
        of.down[i].bits = static_cast<std::uint8_t>(i * 7 % 127);
      moe_test::for_each_set([&]<class Set>(Set set) {
        CAPTURE(Set::name);
        auto& place = of.at(of.down, column, k);
        auto const was = std::exchange(place, static_cast<std::uint8_t>(nan));
        auto const out = of.run(set);
        place = was;
        int wrong = 0;
        for (std::int64_t r = 0; r < n; ++r)
          for (std::int64_t j = 0; j < n; ++j) {
            float const y = out[static_cast<std::size_t>(r * n + j)];
            wrong +=
                (j == column ? std::isnan(y) : y == value_of_fp8(of.at(of.down, j, r))) ? 0 : 1;
          }
        CHECK(wrong == 0);
      });
    }
}

TEST_CASE_TEMPLATE("expert/packed_blocks: quantising rounds to the nearest, in any orientation", W,
                   moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(3);
  moe::ffn_shape const shape{2, 70, 45};  // no multiples of 32
  moe_test::owned_weights<float> const w(shape, true, false, random, 0.3);
  std::vector<float> turned(w.values.size());
  moe::ffn_weights<float> out_in;
  float* next = turned.data();
  auto const turn = [&](moe::stacked_view<float> const& m) {
    moe::stacked_view<float> const to(next, m.count(), m.cols(), m.rows());
    next += m.count() * m.rows() * m.cols();
    for (std::int64_t p = 0; p < m.count(); ++p)
      for (std::int64_t k = 0; k < m.rows(); ++k)
        for (std::int64_t j = 0; j < m.cols(); ++j) to[p](j, k) = m[p](k, j);
    return to;
  };
  out_in.up = turn(w.view.up);
  out_in.gate = turn(w.view.gate);
  out_in.down = turn(w.view.down);
  owned_packed<W> packed(shape, true), again(shape, true);
  moe::pack(moe::cpu{}, w.view, moe::orientation::in_out, packed.view);
  moe::pack(moe::cpu{}, out_in, moe::orientation::out_in, again.view);
  CHECK(std::memcmp(packed.bytes.data(), again.bytes.data(), packed.bytes.size()) == 0);

  double error = 0, norm = 0;
  std::int64_t seen = 0;
  moe::detail::packed::each_column(
      moe::cpu{}, packed.view, 0, shape.P,
      [&](moe::detail::packed::part which, std::int64_t p, std::int64_t block, std::int64_t column,
          W const* place, int c) {
        auto const q = moe::detail::packed::read_column(place, c);
        auto const& m = moe::detail::packed::matrix_of(w.view, which);
        for (std::int64_t i = 0; i < 32; ++i) {
          float const got = q.scale * static_cast<float>(q.value[i]);
          if (column < 0 || block * 32 + i >= m.rows()) {
            CHECK(got == 0.0f);
            continue;
          }
          ++seen;
          double const want = m[p](block * 32 + i, column);
          // Half a step; a scale that was rounded, and +8 that is cut to 7, take more.
          double const step = std::fabs(q.scale);
          CHECK(std::fabs(got - want) <= step * (std::same_as<W, moe::int4_blocks> ? 1.01 : 0.57));
          error += (got - want) * (got - want);
          norm += want * want;
        }
      });
  CHECK(seen == shape.P * 3 * shape.M * shape.H);
  double const relative = std::sqrt(error / norm);
  MESSAGE("relative error of the weights: " << relative);
  CHECK(relative < (std::same_as<W, moe::int8_blocks> ? 0.006 : 0.1));
  CHECK(relative > (std::same_as<W, moe::int8_blocks> ? 0.002 : 0.03));
}

TEST_CASE("expert/packed_blocks: bad input is refused with the values") {
  moe::ffn_shape const shape{2, 64, 32}, odd{2, 60, 32};
  blocks<moe::q8_0> const from(shape, true), ungated(shape, false);
  owned_packed<moe::int8_blocks> packed(shape, true), uneven(odd, true);
  using moe_test::refuse;
  refuse([&] { moe::pack(moe::cpu{}, from.view, packed.view, 1); },
         "among P; got first = 1, experts = 2, P = 2");
  refuse([&] { moe::pack(moe::cpu{}, ungated.view, packed.view); }, "blocks are [P,H,M/32]");
  refuse([&] { moe::pack(moe::cpu{}, from.view, uneven.view); }, "M = 60, H = 32");
}
