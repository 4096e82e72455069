// Rows of bf16 beside weights of bf16: exact where sums are, the same bits on every instruction set, rounding of
// rows, what is not finite.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_ffn.hpp>

#include "case.hpp"
#include "owned_packed.hpp"
#include "sets.hpp"
#include "support/same_bits.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::same_bits;

using moe::bf16;
using moe_test::owned_packed;

#if MOE_HAS_TARGETS
/// AVX-512 as on a processor without products of bf16.
struct avx512_by_floats {
  static constexpr char const* name = "avx512, floats";
  template <class W, class Rows, class Activation>
  static moe::detail::packed::kernels<W, Rows, Activation> const& packed() noexcept {
    return moe::detail::avx512::packed_table<W, Rows, Activation,
                                             moe::detail::packed::dots::floats>;
  }
};
#endif

/// Calls f<Set>() for each way that this processor can multiply rows of bf16.
template <class F>
void each_way(F const& f) {
  auto const call = [&]<class Set>(Set) {
    CAPTURE(Set::name);
    f.template operator()<Set>();
  };
  moe_test::for_each_set(call);
#if MOE_HAS_TARGETS
  if (moe::avx512_set::available()) call(avx512_by_floats{});
#endif
}

struct experts_of_bf16 {
  moe::ffn_shape shape;
  moe_test::owned_weights<float> weights;
  owned_packed<bf16> packed;

  experts_of_bf16(moe::ffn_shape const& s, bool gated)
      : shape(s), weights(s, gated, false), packed(s, gated) {}
  void pack() {
    for (float& v : weights.values) v = static_cast<float>(bf16(v));
    moe::pack(moe::cpu{}, weights.view, moe::orientation::in_out, packed.view);
  }
  template <class Set, class Activation>
  std::vector<float> run(moe::cpu const& exec, std::vector<float> const& x,
                         std::vector<std::int32_t> const& begin,
                         std::vector<std::int32_t> const& used) const {
    std::int64_t const M = shape.M, rows = static_cast<std::int64_t>(x.size()) / M;
    moe::packed_ffn<Activation, bf16, Set, bf16> const experts{};
    moe::buffer const scratch(experts.template forward_scratch_bytes<float>(exec, shape, rows));
    std::fill_n(scratch.data(), scratch.size(), std::byte{0xff});  // NaN
    std::vector<float> out(x.size(), 9.0f);
    experts.forward_rows(exec, experts.prepare(packed.view), {x, rows, M},
                         {static_cast<int>(shape.P), begin.data(), used.data()}, {out, rows, M}, {},
                         scratch);
    return out;
  }
};

}  // namespace

TEST_CASE("expert/packed_pairs: integers that bf16 can hold give exact results on every set") {
  std::mt19937 random(1);
  for (moe::ffn_shape const& shape :
       {moe::ffn_shape{2, 70, 33}, {2, 5, 7}, {2, 64, 300}, {2, 1, 1}, {2, 130, 64}}) {
    std::int64_t const M = shape.M;
    experts_of_bf16 e(shape, false);
    for (float& v : e.weights.values) v = static_cast<float>(static_cast<int>(random() % 3) - 1);
    e.pack();
    std::vector<std::int32_t> const begin = {0, 14}, used = {13, 30};
    std::vector<float> x(static_cast<std::size_t>(45 * M));
    for (float& v : x) v = static_cast<float>(static_cast<int>(random() % 3) - 1);
    std::vector<float> want(x.size(), 9.0f);
    for (std::int32_t r = 0; r < 44; ++r) {
      if (r == 13) continue;
      std::vector<double> const in(x.begin() + r * M, x.begin() + (r + 1) * M);
      auto const y = moe_test::apply_expert(moe::relu{}, e.weights.view, r < 13 ? 0 : 1, in);
      std::transform(y.begin(), y.end(), want.begin() + r * M,
                     [](double v) { return static_cast<float>(v); });
    }
    each_way([&]<class Set>() {
      CAPTURE(M);
      CHECK(e.run<Set, moe::relu>(moe::cpu{}, x, begin, used) == want);
    });
  }
}

TEST_CASE("expert/packed_pairs: rows are rounded to bf16, tokens and hidden ones") {
  std::mt19937 random(2);
  moe::ffn_shape const shape{1, 200, 150};
  experts_of_bf16 e(shape, true);
  auto const values =
      moe_test::random_values<float>(static_cast<std::int64_t>(e.weights.values.size()), random);
  std::transform(values.begin(), values.end(), e.weights.values.begin(),
                 [](float v) { return 0.2f * v; });
  e.pack();
  auto const x = moe_test::random_values<float>(9 * shape.M, random);
  std::vector<std::int32_t> const begin = {0}, used = {9};
  std::vector<double> want;
  auto const rounded = [](double v) {
    return static_cast<double>(static_cast<float>(bf16(static_cast<float>(v))));
  };
  for (std::int64_t r = 0; r < 9; ++r) {
    std::vector<double> hidden(static_cast<std::size_t>(shape.H));
    for (std::int64_t j = 0; j < shape.H; ++j) {
      double gate = 0, up = 0;
      for (std::int64_t k = 0; k < shape.M; ++k) {
        double const token = rounded(x[static_cast<std::size_t>(r * shape.M + k)]);
        gate += token * e.weights.view.gate[0](k, j);
        up += token * e.weights.view.up[0](k, j);
      }
      hidden[static_cast<std::size_t>(j)] = rounded(moe::swiglu{}(gate, up));
    }
    for (std::int64_t c = 0; c < shape.M; ++c) {
      double y = 0;
      for (std::int64_t j = 0; j < shape.H; ++j)
        y += hidden[static_cast<std::size_t>(j)] * e.weights.view.down[0](j, c);
      want.push_back(y);
    }
  }
  std::vector<float> first;
  each_way([&]<class Set>() {
    auto const out = e.run<Set, moe::swiglu>(moe::cpu{}, x, begin, used);
    double worst = 0, size = 0;
    for (std::size_t i = 0; i < out.size(); ++i) {
      worst = moe_test::worse(worst, std::fabs(out[i] - want[i]));
      size = std::max(size, std::fabs(want[i]));
    }
    // A hidden number next to a half may be rounded the other way: one of 150, by 2^-8 of itself.
    CHECK(worst < 2e-3 * size);
    moe::thread_team team(3);
    CHECK(same_bits(e.run<Set, moe::swiglu>(team, x, begin, used), out));
    if (first.empty()) first = out;
    worst = 0;
    for (std::size_t i = 0; i < out.size(); ++i)
      worst = moe_test::worse(worst, std::fabs(out[i] - first[i]));
    CHECK(worst < 2e-3 * size);
  });
  // Against rows of float: what rounding costs, and that it is done.
  moe::packed_ffn<moe::swiglu, bf16> const exact{};
  moe::buffer const scratch(exact.forward_scratch_bytes<float>(moe::cpu{}, shape, 9));
  std::vector<float> kept(x.size());
  exact.forward_rows(moe::cpu{}, exact.prepare(e.packed.view), {x, 9, shape.M},
                     {1, begin.data(), used.data()}, {kept, 9, shape.M}, {}, scratch);
  double off = 0, norm = 0;
  for (std::size_t i = 0; i < kept.size(); ++i) {
    off += std::pow(double(kept[i]) - first[i], 2);
    norm += double(kept[i]) * kept[i];
  }
  CHECK(std::sqrt(off / norm) < 6e-3);
  CHECK(std::sqrt(off / norm) > 1e-3);
}

TEST_CASE(
    "expert/packed_pairs: a NaN or an infinity in a row is seen in its results, and in no other") {
  std::mt19937 random(3);
  moe::ffn_shape const shape{1, 40, 50};
  experts_of_bf16 e(shape, false);
  for (float& v : e.weights.values) v = 0.1f + 0.01f * static_cast<float>(random() % 8);
  e.pack();
  auto x = moe_test::random_values<float>(14 * shape.M, random);
  x[static_cast<std::size_t>(2 * shape.M + 17)] = std::numeric_limits<float>::quiet_NaN();
  x[static_cast<std::size_t>(5 * shape.M + 39)] = std::numeric_limits<float>::infinity();
  x[static_cast<std::size_t>(7 * shape.M)] =
      std::numeric_limits<float>::max();  // rounds to infinity
  each_way([&]<class Set>() {
    auto const out = e.run<Set, moe::relu>(moe::cpu{}, x, {0}, {14});
    for (std::int64_t r = 0; r < 14; ++r) {
      CAPTURE(r);
      bool const finite = std::all_of(out.begin() + r * shape.M, out.begin() + (r + 1) * shape.M,
                                      [](float v) { return std::isfinite(v); });
      CHECK(finite == (r != 2 && r != 5 && r != 7));
    }
  });
}
