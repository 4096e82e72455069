// Weights of kept pairs: by hand, gradients by central differences, threads.
// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <support/table_case.hpp>
#include <vector>

#include <moe/routing/kept_weights.hpp>

using moe::kept_weights;

namespace {

/// A table that only says which pairs have rows.
moe::routing_table fate_table(std::int64_t T, int K, std::vector<std::int32_t>& row_of) {
  moe::routing_table table;
  table.T = T;
  table.K = K;
  table.row_of = row_of.data();
  return table;
}

constexpr std::int32_t copied = moe::no_row(moe::expert_kind::copy);

}  // namespace

TEST_CASE("routing/kept_weights: dropped pairs weigh nothing, others share the rest if asked to") {
  std::vector<std::int32_t> row_of{0, 1, 2, -1, -1, -1, copied, -1};
  auto const table = fate_table(4, 2, row_of);
  std::vector<double> const weight{0.5, 0.25, 0.6, 0.4, 0.7, 0.3, 0.25, 0.75};
  std::vector<double> out(8);
  weigh_kept(moe::cpu{}, kept_weights::as_routed, table, weight.data(), out.data());
  CHECK(out == std::vector<double>{0.5, 0.25, 0.6, 0, 0, 0, 0.25, 0});
  weigh_kept(moe::cpu{}, kept_weights::renormalised, table, weight.data(), out.data());
  CHECK(out == std::vector<double>{0.5 / 0.75, 0.25 / 0.75, 1, 0, 0, 0, 1, 0});
  out = weight;  // in place
  weigh_kept(moe::cpu{}, kept_weights::renormalised, table, out.data(), out.data());
  CHECK(out == std::vector<double>{0.5 / 0.75, 0.25 / 0.75, 1, 0, 0, 0, 1, 0});
}

TEST_CASE("routing/kept_weights: a tiny sum is not blown up") {
  std::vector<std::int32_t> row_of{0, 1};
  float const weight[] = {1e-9f, 0.0f}, dout[] = {1.0f, 2.0f};
  float out[2];
  auto const table = fate_table(1, 2, row_of);
  weigh_kept(moe::cpu{}, kept_weights::renormalised, table, weight, out);
  CHECK(out[0] == 1e-9f / std::numeric_limits<float>::epsilon());
  CHECK(out[1] == 0.0f);
  weigh_kept_backward(moe::cpu{}, kept_weights::renormalised, table, weight, dout, out);
  CHECK(out[0] == 1 / std::numeric_limits<float>::epsilon());
  CHECK(out[1] == 2 / std::numeric_limits<float>::epsilon());
}

TEST_CASE("routing/kept_weights: the gradient is that of central differences") {
  std::mt19937 random(1);
  auto const uniform = [&] { return 0.05 + static_cast<double>(random() % 1000) / 1000; };
  for (int n = 0; n < 40; ++n)
    for (auto rule : {kept_weights::as_routed, kept_weights::renormalised}) {
      constexpr int T = 5, K = 3, pairs = T * K;
      std::vector<std::int32_t> row_of;
      std::vector<double> weight, dout, dweight(pairs), out(pairs);
      for (int i = 0; i < pairs; ++i) {
        std::int32_t const fates[] = {i, -1, copied};
        row_of.push_back(fates[random() % 3]);
        weight.push_back(uniform());
        dout.push_back(uniform() - 0.5);
      }
      auto const table = fate_table(T, K, row_of);
      weigh_kept_backward(moe::cpu{}, rule, table, weight.data(), dout.data(), dweight.data());
      auto const loss = [&] {
        weigh_kept(moe::cpu{}, rule, table, weight.data(), out.data());
        double sum = 0;
        for (int i = 0; i < pairs; ++i)
          sum += out[static_cast<std::size_t>(i)] * dout[static_cast<std::size_t>(i)];
        return sum;
      };
      for (std::size_t i = 0; i < pairs; ++i) {
        double const w = weight[i], h = 1e-6;
        weight[i] = w + h;
        double const above = loss();
        weight[i] = w - h;
        double const below = loss();
        weight[i] = w;
        CHECK(dweight[i] == doctest::Approx((above - below) / (2 * h)).epsilon(1e-6));
      }
      std::vector<double> in_place = dout;
      weigh_kept_backward(moe::cpu{}, rule, table, weight.data(), in_place.data(), in_place.data());
      CHECK(in_place == dweight);
    }
}

TEST_CASE("routing/kept_weights: variable K, and any number of threads") {
  std::mt19937 random(2);
  std::vector<std::int32_t> begin{0}, row_of;
  std::vector<float> weight, dout;
  constexpr int T = 3000;
  for (int t = 0; t < T; ++t)
    begin.push_back(begin.back() + static_cast<std::int32_t>(random() % 4));
  for (std::int32_t i = 0; i < begin.back(); ++i) {
    row_of.push_back(random() % 3 == 0 ? -1 : i);
    weight.push_back(static_cast<float>(random() % 100));
    dout.push_back(static_cast<float>(random() % 100));
  }
  auto table = fate_table(T, 3, row_of);
  table.token_begin = begin.data();
  std::vector<float> out(weight.size()), dweight(weight.size());
  weigh_kept(moe::cpu{}, kept_weights::renormalised, table, weight.data(), out.data());
  weigh_kept_backward(moe::cpu{}, kept_weights::renormalised, table, weight.data(), dout.data(),
                      dweight.data());
  for (std::size_t t = 0; t < T; ++t) {
    double sum = 0, kept = 0;
    for (auto i = static_cast<std::size_t>(begin[t]); i < static_cast<std::size_t>(begin[t + 1]);
         ++i) {
      sum += out[i];
      if (row_of[i] >= 0) kept += weight[i];
    }
    CHECK(sum == doctest::Approx(kept > 0 ? 1.0 : 0.0));
  }
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    std::vector<float> again(out.size());
    weigh_kept(team, kept_weights::renormalised, table, weight.data(), again.data());
    CHECK(again == out);
    weigh_kept_backward(team, kept_weights::renormalised, table, weight.data(), dout.data(),
                        again.data());
    CHECK(again == dweight);
  }
}

TEST_CASE("routing/kept_weights: missing arrays are refused, none are needed for no pairs") {
  std::vector<std::int32_t> row_of{0, 1};
  auto table = fate_table(1, 2, row_of);
  float w[2] = {};
  float const* const none = nullptr;
  CHECK_THROWS_WITH_AS(weigh_kept(moe::cpu{}, kept_weights::as_routed, table, none, w),
                       doctest::Contains("weigh_kept: row_of, weight and out are given"),
                       moe::precondition_error);
  CHECK_THROWS_AS(weigh_kept_backward(moe::cpu{}, kept_weights::as_routed, table, w, none, w),
                  moe::precondition_error);
  table.T = 0;
  CHECK_NOTHROW(weigh_kept(moe::cpu{}, kept_weights::as_routed, table, none, w));
}
