// Rows that say where they come from and where they go, and exchanges of them that check themselves.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/coordinated.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/topology.hpp>

namespace moe_test {

using counts = std::vector<std::vector<std::int64_t>>;  // [source][destination]

inline std::size_t at(int i) {
  return static_cast<std::size_t>(i);
}

/// Far enough for a machine that is busy; nothing here waits for it.
inline moe::deadline late() {
  return moe::within(std::chrono::seconds(60));
}

inline constexpr int M = 3;

/// Rows are numbers that say where they come from and where they go.
inline void append_rows(std::vector<float>& rows, int s, int d, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i)
    for (int c = 0; c < M; ++c) rows.push_back(static_cast<float>(((s * 32 + d) * 32 + i) * M + c));
}

enum class skew { none, zeros, one_hot, nothing };

inline counts random_counts(int R, skew kind, unsigned seed) {
  std::mt19937 random(seed);
  counts n(at(R), std::vector<std::int64_t>(at(R)));
  int const hot = static_cast<int>(random()) & 0xffff;
  for (auto& row : n)
    for (int d = 0; d < R; ++d) {
      auto const any = static_cast<std::int64_t>(random() % 20);
      bool const none = kind == skew::nothing || (kind == skew::zeros && random() % 3 != 0) ||
                        (kind == skew::one_hot && d != hot % R);
      row[at(d)] = none ? 0 : any;
    }
  return n;
}

/// There and back, as rank r: true if all rows were right.
template <class C>
bool exchange_both_ways(C& comm, moe::exchange_plan const& plan, counts const& n) {
  int const R = comm.size(), r = comm.rank();
  std::vector<float> rows, expected;
  for (int i = 0; i < R; ++i) {
    append_rows(rows, r, i, n[at(r)][at(i)]);
    append_rows(expected, i, r, n[at(i)][at(r)]);
  }
  moe::exchange_plan const back_plan = transpose(plan);
  moe::bound_plan there(plan), back(back_plan);
  moe::rank_exchange exchange(comm);
  if (!exchange.bind(there, n[at(r)], late())) return false;
  for (int s = 0; s < R; ++s)
    if (there.output_counts()[s] != n[at(s)][at(r)]) return false;
  back.bind_back(there);
  std::int64_t const received = there.output_rows();
  std::vector<float> out(at(static_cast<int>(received) * M)), home(rows.size());
  for (int repeat = 0; repeat < 2; ++repeat) {
    std::fill(out.begin(), out.end(), -1.f);
    if (!exchange.template run<float>(there, {rows, there.input_rows(), M}, {out, received, M},
                                      late()))
      return false;
    if (out != expected) return false;
    if (!exchange.template run<float>(back, {out, received, M}, {home, back.output_rows(), M},
                                      late()))
      return false;
    if (home != rows) return false;
  }
  return true;
}

/// Dispatch and combine of coordinated groups, as this rank: true if all rows were right.
template <class C>
bool exchange_coordinated(C& comm, moe::topology const& ranks, int L, moe::shared_by form) {
  int const S = comm.size() / L;
  int const g = comm.rank() / L, l = comm.rank() % L;
  auto const plans = moe::make_coordinated_plans(ranks, L, form, comm.rank());
  moe::bound_plan dispatch(plans.dispatch), combine(plans.combine);
  moe::rank_exchange exchange(comm);
  auto const n = [](int from, int to, int part) { return (from + 2 * to + part) % 4; };
  std::vector<std::int64_t> sent, returned;
  std::vector<float> rows, expected, home, home_expected;
  for (int s = 0; s < S; ++s) {
    sent.push_back(n(g, s, l));
    append_rows(rows, g, s * L + l, sent.back());
  }
  if (!exchange.bind(dispatch, sent, late())) return false;
  int const gathered = form == moe::shared_by::expert ? 1 : L;
  for (int t = 0; t < gathered; ++t)
    for (int s = 0; s < S; ++s) {
      int const part = form == moe::shared_by::expert ? l : t;
      append_rows(expected, s, g * L + part, n(s, g, part));
    }
  std::int64_t const N = dispatch.output_rows();
  std::vector<float> out(at(static_cast<int>(N) * M));
  if (!exchange.template run<float>(dispatch, {rows, dispatch.input_rows(), M}, {out, N, M},
                                    late()) ||
      out != expected)
    return false;
  // Back goes what belongs to this rank's part.
  for (int s = 0; s < S; ++s) {
    returned.push_back(n(s, g, l));
    append_rows(home, s, g * L + l, returned.back());
  }
  for (int t = 0; t < L; ++t)
    for (int s = 0; s < S; ++s) append_rows(home_expected, g, s * L + t, n(g, s, t));
  if (!exchange.bind(combine, returned, late())) return false;
  std::vector<float> all(at(static_cast<int>(combine.output_rows()) * M));
  return exchange.template run<float>(combine, {home, combine.input_rows(), M},
                                      {all, combine.output_rows(), M}, late()) &&
         all == home_expected;
}

}  // namespace moe_test
