// Weights of kept pairs by kernels, on the block emulator: bitwise those of the CPU.
// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <vector>

#include <moe/routing/kept_weights.cuh>

#include "emulator/emulated_gpu.hpp"
#include "support/refusal.hpp"

namespace {

using moe::kept_weights;
using moe_test::emulated_gpu;

struct problem {
  std::vector<std::int32_t> row_of, token_begin;
  std::vector<double> weight, dout;
  moe::routing_table table;

  problem(std::int64_t T, int K, bool variable) {
    std::mt19937 random(static_cast<unsigned>(T));
    table.T = T;
    table.K = K;
    token_begin.push_back(0);
    for (std::int64_t t = 0; t < T; ++t)
      token_begin.push_back(token_begin.back() +
                            static_cast<std::int32_t>(random() % static_cast<unsigned>(K + 1)));
    if (variable) table.token_begin = token_begin.data();
    for (std::int64_t i = 0; i < table.pairs(); ++i) {
      auto const fate = static_cast<std::int32_t>(random() % 6);
      row_of.push_back(fate < 2 ? moe::dropped_row : fate == 2 ? -3 : fate);
      weight.push_back(random() % 5 == 0 ? 1e-9 : static_cast<double>(random() % 100) / 64);
      dout.push_back(static_cast<double>(random() % 100) / 64 - 1);
    }
    // A token whose sum is tiny, one that lost all.
    for (std::size_t i = 0; i < weight.size() && i < 6; ++i) weight[i] = 1e-12;
    for (std::size_t i = 6; i < weight.size() && i < 12; ++i) row_of[i] = moe::dropped_row;
    table.row_of = row_of.data();
  }
};

template <class V>
std::vector<V> as(std::vector<double> const& v) {
  return {v.begin(), v.end()};
}

template <class V>
void check(std::int64_t T, int K, bool variable) {
  problem const p(T, K, variable);
  auto const weight = as<V>(p.weight), dout = as<V>(p.dout);
  for (auto const rule : {kept_weights::as_routed, kept_weights::renormalised}) {
    std::vector<V> want(weight.size()), dwant(weight.size());
    weigh_kept(moe::cpu{}, rule, p.table, weight.data(), want.data());
    weigh_kept_backward(moe::cpu{}, rule, p.table, weight.data(), dout.data(), dwant.data());
    moe_test::on_emulator([&](emulated_gpu const& exec) {
      std::vector<V> found = weight, dfound = dout;  // in place
      if (found.empty()) found.reserve(1), dfound.reserve(1);
      V const* const in = weight.empty() ? found.data() : weight.data();
      weigh_kept(exec, rule, p.table, static_cast<V const*>(found.data()), found.data());
      weigh_kept_backward(exec, rule, p.table, in, static_cast<V const*>(dfound.data()),
                          dfound.data());
      CHECK(found == want);
      CHECK(dfound == dwant);
    });
  }
}

}  // namespace

TEST_CASE_TEMPLATE("emulator/kept_weights: as on the CPU", V, float, double) {
  for (std::int64_t const T : {0, 1, 64, 130})
    for (int const K : {1, 3, 8}) {
      if (moe_test::has_thread_sanitizer && (T != 130 || K != 3)) continue;
      check<V>(T, K, false);
      if (T > 0) check<V>(T, K, true);
    }
}

TEST_CASE("emulator/kept_weights: a token_begin that was refused names no memory") {
  std::vector<std::int32_t> row_of(6, moe::dropped_row),
      begin{0, 2, 2147483647, -2147483647, 4, 6, 6};
  std::vector<float> const weight(6, 1.0f);
  std::vector<float> out(6, 7.0f), dout(6, 7.0f);
  moe::routing_table table;
  table.T = 6;
  table.K = 2;
  table.row_of = row_of.data();
  table.token_begin = begin.data();
  moe_test::on_emulator([&](emulated_gpu const& exec) {
    weigh_kept(exec, kept_weights::renormalised, table, weight.data(), out.data());
    weigh_kept_backward(exec, kept_weights::renormalised, table, weight.data(), weight.data(),
                        dout.data());
  });
  CHECK(out == std::vector<float>{0, 0, 7, 7, 0, 0});
  CHECK(dout == out);
}

TEST_CASE("emulator/kept_weights: arrays that are missing are refused as on the CPU") {
  problem const p(3, 2, false);
  float* const none = nullptr;
  float const* const no_weight = nullptr;
  using moe_test::refusal;
  moe_test::says(refusal([&] {
                   weigh_kept(emulated_gpu(), kept_weights::as_routed, p.table, no_weight, none);
                 }),
                 "weigh_kept: row_of, weight and out are given; got pairs = 6");
  moe_test::says(refusal([&] {
                   weigh_kept_backward(emulated_gpu(), kept_weights::as_routed, p.table, no_weight,
                                       no_weight, none);
                 }),
                 "weigh_kept_backward: row_of, weight, dout and dweight are given");
}
