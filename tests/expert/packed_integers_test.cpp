// Products of integers: rows that are quantised and their products with blocks, on every instruction set
// against loops; errors of whole experts; rows with nothing, and with no numbers.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_blocks.hpp>
#include <moe/expert/packed_ffn.hpp>

#include "case.hpp"
#include "owned_packed.hpp"
#include "sets.hpp"
#include "support/same_bits.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::same_bits;

namespace packed = moe::detail::packed;
using moe::int8_blocks;
using moe_test::owned_packed;
using moe_test::random_values;
using moe_test::read_numbers;
using packed::dots;

/// Calls f(name, kernels, fused) for each way that this processor can multiply. Those that are fused do the
/// same operations for each number.
template <class W, class Activation, class F>
void each_way(F const& f) {
  namespace detail = moe::detail;
  using kernels = packed::kernels<W, int8_blocks, Activation>;
  auto const call = [&](char const* name, bool here, kernels const& k, bool fused) {
    CAPTURE(name);
    if (here) f(k, fused);
  };
  call("plain", true, moe::plain_set::packed<W, int8_blocks, Activation>(), false);
#if MOE_HAS_TARGETS
  bool const avx2 = moe::avx2_set::available(), avx512 = moe::avx512_set::available();
  call("avx2, pairs", avx2, detail::avx2::packed_table<W, int8_blocks, Activation, dots::pairs>,
       true);
  call("avx2, quads", avx2 && detail::has_avxvnni(),
       detail::avx2::packed_table<W, int8_blocks, Activation, dots::quads>, true);
  call("avx512, pairs", avx512,
       detail::avx512::packed_table<W, int8_blocks, Activation, dots::pairs>, true);
  call("avx512, quads", avx512 && detail::has_avx512vnni(),
       detail::avx512::packed_table<W, int8_blocks, Activation, dots::quads>, true);
#endif
#if MOE_HAS_AVX512
  call("plain, pairs", __builtin_cpu_supports("avx512bw"),
       detail::plain::packed_table<W, int8_blocks, Activation, dots::pairs>, false);
#endif
#if !defined(MOE_TEST_INSTRUMENTED)
  call("wide", true, moe_test::wide_set::packed<W, int8_blocks, Activation>(), false);
#endif
}

/// Packed rows as numbers: place (k, i) of a block of R rows, its scale, and the surplus of its 32.
struct rows_of_integers {
  std::vector<std::int32_t> words;
  int R;

  rows_of_integers(std::int64_t depth, int rows)
      : words(static_cast<std::size_t>(depth / 32 * 10 * rows), -1), R(rows) {}
  std::int32_t const* block(std::int64_t j) const { return words.data() + j / 32 * 10 * R; }
  float scale(std::int64_t j, int i) const { return std::bit_cast<float>(block(j)[i]); }
  std::int32_t surplus(std::int64_t j, int i) const { return block(j)[R + i]; }
  int value(std::int64_t j, int i) const {
    std::int32_t const word = block(j)[(2 + j % 32 / 4) * R + i];
    return static_cast<std::int8_t>(word >> (j % 4 * 8));
  }
};

/// Integers of x[0 .. 32) by the definition.
struct reference_block {
  float scale = 0;
  int value[32] = {};
  explicit reference_block(float const* x) {
    float most = 0;
    for (int j = 0; j < 32; ++j) {
      if (!std::isfinite(x[j])) most = std::numeric_limits<float>::quiet_NaN();
      if (!(std::fabs(x[j]) <= most)) most = std::isnan(most) ? most : std::fabs(x[j]);
    }
    scale = most / 127;
    if (std::isnan(most)) return;
    if (most < 127 * std::numeric_limits<float>::min()) {
      scale = 0;
      return;
    }
    for (int j = 0; j < 32; ++j) value[j] = static_cast<int>(std::lround(x[j] * (254 / most) / 2));
  }
};

int offset(moe::int8_blocks) {
  return 128;
}
int offset(moe::int4_blocks) {
  return 8;
}

}  // namespace

TEST_CASE_TEMPLATE("expert/packed_integers: rows become the integers of the definition", W,
                   moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(1);
  std::int64_t const k = 384;
  for (std::int64_t const k0 : {384, 300, 97, 1})
    for (int const R : {1, 4, 6}) {
      auto x = random_values<float>(R * k0, random);
      float* const last = x.data() + (R - 1) * k0;
      for (std::int64_t j = 0; j < k0; ++j) {
        if (j / 32 == 0) last[j] = static_cast<float>(static_cast<int>(j % 9) - 4) * 0.5f;
        if (j / 32 == 1) last[j] = 0;
        if (j / 32 == 2) last[j] *= 1e-37f;
        if (j / 32 == 3) last[j] *= 3e38f;
      }
      if (k0 > 0) last[0] = -127;  // halves are halves of its steps
      if (k0 > 170) last[161] = std::numeric_limits<float>::quiet_NaN();
      if (k0 > 200) last[192] = -std::numeric_limits<float>::infinity();
      std::vector<float const*> row;
      std::vector<float> factor;
      for (int i = 0; i < R; ++i) {
        row.push_back(x.data() + i * k0);
        factor.push_back(i == 1 ? 0.75f : 1.0f);
      }
      each_way<W, moe::relu>([&](auto const& kernels, bool) {
        rows_of_integers got(k, R);
        kernels.pack({row.data(), factor.data(), R, k0, k, got.words.data()});
        for (int i = 0; i < R; ++i)
          for (std::int64_t j = 0; j < k; j += 32) {
            float block[32] = {};
            for (std::int64_t c = 0; c < 32 && j + c < k0; ++c)
              block[c] =
                  row[static_cast<std::size_t>(i)][j + c] * factor[static_cast<std::size_t>(i)];
            reference_block const want(block);
            CAPTURE(j);
            if (std::isnan(want.scale))
              CHECK(std::isnan(got.scale(j, i)));
            else
              CHECK(got.scale(j, i) == want.scale);
            int sum = 0;
            bool same = true;
            for (int c = 0; c < 32; ++c) {
              sum += want.value[c];
              same = same && got.value(j + c, i) == want.value[c];
            }
            CHECK(same);
            CHECK(got.surplus(j, i) == -offset(W{}) * sum);
          }
      });
    }
}

TEST_CASE_TEMPLATE("expert/packed_integers: products equal loops in double, whatever multiplies", W,
                   moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(2);
  for (moe::ffn_shape const& shape : {moe::ffn_shape{1, 70, 300}, {1, 300, 33}, {1, 40, 1100}}) {
    std::int64_t const M = shape.M, H = shape.H;
    moe_test::owned_weights<float> w(shape, false, true, random, 0.3);
    // The greatest products there are: all weights and numbers of a block at the end of their range.
    for (std::int64_t i = 0; i < std::min<std::int64_t>(H, 32); ++i) {
      w.view.down[0](i, 3) = -0.3f;
      w.view.down[0](i, 4) = 0.3f;
      w.view.down[0](i, 5) = i == 0 ? -0.3f : 0.3f * 7 / 8;  // int4's 7
    }
    owned_packed<W> weights(shape, false);
    moe::pack(moe::cpu{}, w.view, moe::orientation::in_out, weights.view);
    packed::expert_layout<W> const layout(shape, false);
    if constexpr (std::is_same_v<W, int8_blocks>) {  // -128, which others may have written
      W* const block = weights.view.expert(0) + layout.input_size;
      auto column = packed::read_column(block, 3);
      CHECK(std::count(column.value, column.value + 32, -127) == 32);
      std::replace(column.value, column.value + 32, std::int8_t{-127}, std::int8_t{-128});
      packed::write_column(block, 3, column);
    }
    read_numbers(weights.view, w.view);
    for (std::int64_t const rows : {1, 2, 5, 6, 7, 13, 31}) {
      auto x = random_values<float>(rows * H, random);
      for (std::int64_t j = 0; j < std::min<std::int64_t>(H, 32); ++j)
        x[static_cast<std::size_t>(j)] = 1;
      std::vector<float> fused;
      each_way<W, moe::relu>([&](auto const& kernels, bool is_fused) {
        CAPTURE(rows);
        moe::detail::gemm::even_blocks const blocks(rows, kernels.block_rows);
        std::vector<std::int32_t> a(static_cast<std::size_t>(rows * layout.H / 32 * 10));
        std::vector<double> want(static_cast<std::size_t>(rows * M));
        for (std::int64_t b = 0; b < blocks.blocks; ++b) {
          std::vector<float const*> row;
          for (std::int64_t r = blocks.first(b); r < blocks.first(b + 1); ++r)
            row.push_back(x.data() + r * H);
          auto const R = static_cast<int>(row.size());
          rows_of_integers part(layout.H, R);
          kernels.pack({row.data(), nullptr, R, H, layout.H, part.words.data()});
          std::copy(part.words.begin(), part.words.end(),
                    a.begin() + blocks.first(b) * layout.H / 32 * 10);
          for (int i = 0; i < R; ++i)
            for (std::int64_t c = 0; c < M; ++c) {
              double y = w.view.down_bias(0, c);
              for (std::int64_t j = 0; j < H; ++j)
                y +=
                    static_cast<double>(part.scale(j, i)) * part.value(j, i) * w.view.down[0](j, c);
              want[static_cast<std::size_t>((blocks.first(b) + i) * M + c)] = y;
            }
        }
        std::vector<float> out(want.size(), 9.0f);
        std::vector<float> sums(packed::sum_elements, 7.0f);
        std::vector<std::int32_t> ids(static_cast<std::size_t>(rows));
        for (std::size_t r = 0; r < ids.size(); ++r) ids[r] = static_cast<std::int32_t>(r);
        packed::panels_task<W, int8_blocks> task{};
        task.a = a.data();
        task.b = weights.view.expert(0) + layout.input_size;
        task.k = layout.H;
        task.blocks = blocks;
        task.last_block = blocks.blocks;
        task.last_panel = layout.M / packed::panel_width;
        task.cols = M;
        task.bias = w.view.down_bias.row(0);
        task.out = {out, rows, M};
        task.ids = ids.data();
        task.sums = sums.data();
        kernels.down(task);
        double worst = 0, size = 0;
        for (std::size_t i = 0; i < out.size(); ++i) {
          double const off = std::fabs(out[i] - want[i]);
          worst = moe_test::worse(worst, off);
          size = std::max(size, std::fabs(want[i]));
        }
        CHECK(size > 0.1);
        CHECK(worst < 5e-7 * size);
        if (!is_fused) return;
        if (!fused.empty()) CHECK(same_bits(fused, out));
        fused = out;
      });
    }
  }
}

TEST_CASE_TEMPLATE("expert/packed_integers: experts beside loops in double with the float weights",
                   W, moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(3);
  bool const eight = offset(W{}) == 128;
  auto const check = [&]<class Activation>(Activation const& act, moe::ffn_shape const& shape,
                                           std::vector<std::int32_t> const& used) {
    double const scale = 1 / std::sqrt(static_cast<double>(shape.M));
    moe_test::owned_weights<float> w(shape, Activation::gated, true, random, scale);
    owned_packed<W> packed_weights(shape, Activation::gated);
    moe::pack(moe::cpu{}, w.view, moe::orientation::in_out, packed_weights.view);
    auto views = packed_weights.view;
    views.up_bias = w.view.up_bias;
    views.gate_bias = w.view.gate_bias;
    views.down_bias = w.view.down_bias;
    moe_test::owned_weights<float> numbers(shape, Activation::gated, true);
    numbers.values = w.values;
    read_numbers(packed_weights.view, numbers.view);
    std::vector<std::int32_t> begin;
    std::int32_t rows = 0;
    for (std::int32_t u : used) {
      begin.push_back(rows);
      rows += u;
    }
    auto const x = random_values<float>(rows * shape.M, random);
    std::vector<double> of_weights, of_numbers;
    for (std::size_t p = 0; p < used.size(); ++p)
      for (std::int32_t r = begin[p]; r < begin[p] + used[p]; ++r) {
        std::vector<double> const in(x.begin() + r * shape.M, x.begin() + (r + 1) * shape.M);
        auto const add = [&](auto const& weights, std::vector<double>& to) {
          auto const y = moe_test::apply_expert(act, weights, static_cast<std::int64_t>(p), in);
          to.insert(to.end(), y.begin(), y.end());
        };
        add(w.view, of_weights);
        add(numbers.view, of_numbers);
      }
    auto const error = [](std::vector<float> const& out, std::vector<double> const& want) {
      double off = 0, norm = 0;
      for (std::size_t i = 0; i < out.size(); ++i) {
        off += std::pow(out[i] - want[i], 2);
        norm += want[i] * want[i];
      }
      return std::sqrt(off / norm);
    };
    moe_test::for_each_set([&]<class Set>(Set) {
      CAPTURE(Set::name);
      CAPTURE(shape.M);
      CAPTURE(shape.H);
      auto const run = [&]<class Rows>(moe::cpu const& exec, Rows) {
        moe::packed_ffn<Activation, W, Set, Rows> const experts{act};
        moe::buffer const scratch(experts.template forward_scratch_bytes<float>(exec, shape, rows));
        std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN
        std::vector<float> out(x.size(), 9.0f);
        experts.forward_rows(exec, experts.prepare(views), {x, rows, shape.M},
                             {static_cast<int>(used.size()), begin.data(), used.data()},
                             {out, rows, shape.M}, {}, scratch);
        return out;
      };
      auto const out = run(moe::cpu{}, int8_blocks{});
      double const rounding = error(out, of_numbers), all = error(out, of_weights);
      CHECK(rounding < 0.015);
      CHECK(rounding > 1e-4);  // it is quantised
      CHECK(all < (eight ? 0.02 : 0.2));
      double const kept = error(run(moe::cpu{}, 0.0f), of_numbers);
      CHECK(kept < 1e-6);
      moe::thread_team team(3);
      CHECK(same_bits(run(team, int8_blocks{}), out));
    });
  };
  check(moe::swiglu{}, {3, 70, 45}, {2, 0, 9});
  check(moe::relu{}, {2, 129, 200}, {13, 1});
  check(moe::swiglu{}, {2, 256, 384}, {40, 3});
}

TEST_CASE("expert/packed_integers: a row's result does not depend on the other rows") {
  std::mt19937 random(4);
  moe::ffn_shape const shape{1, 130, 2100};  // depth beyond one pass
  moe_test::owned_weights<float> w(shape, true, false, random, 0.1);
  owned_packed<int8_blocks> weights(shape, true);
  moe::pack(moe::cpu{}, w.view, moe::orientation::in_out, weights.view);
  auto const x = random_values<float>(300 * shape.M, random);
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<moe::swiglu, int8_blocks, Set> const experts{};
    moe::buffer const scratch(
        experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, 300));
    auto const run = [&](std::int32_t begin, std::int32_t used) {
      std::vector<float> out(x.size(), 5.0f);
      experts.forward_rows(moe::cpu{}, experts.prepare(weights.view), {x, 300, shape.M},
                           {1, &begin, &used}, {out, 300, shape.M}, {}, scratch);
      return std::vector<float>(out.begin() + 17 * shape.M, out.begin() + 18 * shape.M);
    };
    auto const want = run(0, 300);
    for (std::int32_t used : {1, 2, 3, 4, 6, 7, 12, 13, 25}) CHECK(same_bits(run(17, used), want));
  });
}

TEST_CASE_TEMPLATE("expert/packed_integers: rows of zeros, and of what is no number", W,
                   moe::int8_blocks, moe::int4_blocks) {
  std::mt19937 random(5);
  moe::ffn_shape const shape{1, 100, 50};
  moe_test::owned_weights<float> w(shape, true, false, random, 0.3);
  owned_packed<W> weights(shape, true);
  moe::pack(moe::cpu{}, w.view, moe::orientation::in_out, weights.view);
  std::int64_t const rows = 8;
  auto x = random_values<float>(rows * shape.M, random);
  std::int32_t const begin[] = {0}, used[] = {8};
  moe_test::for_each_set([&]<class Set>(Set) {
    CAPTURE(Set::name);
    moe::packed_ffn<moe::swiglu, W, Set> const experts{};
    moe::buffer const scratch(
        experts.template forward_scratch_bytes<float>(moe::cpu{}, shape, rows));
    auto const run = [&](std::vector<float> const& in) {
      std::vector<float> out(x.size(), 5.0f);
      experts.forward_rows(moe::cpu{}, experts.prepare(weights.view), {in, rows, shape.M},
                           {1, begin, used}, {out, rows, shape.M}, {}, scratch);
      return out;
    };
    auto const good = run(x);
    auto bad = x;
    std::fill_n(bad.begin() + 2 * shape.M, shape.M, 0.0f);
    bad[static_cast<std::size_t>(4 * shape.M + 99)] = std::numeric_limits<float>::quiet_NaN();
    bad[static_cast<std::size_t>(6 * shape.M + 33)] = std::numeric_limits<float>::infinity();
    auto const out = run(bad);
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < shape.M; ++c) {
        auto const i = static_cast<std::size_t>(r * shape.M + c);
        CAPTURE(r);
        if (r == 4 || r == 6)
          CHECK(std::isnan(out[i]));
        else
          CHECK(out[i] == (r == 2 ? 0.0f : good[i]));
      }
  });
}
