// build_table against sorting and against copying: layouts, overflow rules, threads.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <benchmark/benchmark.h>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include <moe/routing/build_table.hpp>

#include "support/roof.hpp"

namespace {

struct shape {
  std::int64_t T;
  int E, K;
};

constexpr shape shapes[] = {{64, 256, 8}, {4096, 64, 2}, {16384, 256, 8}};

/// A routing of K different experts for each token, some experts more popular than others.
moe::routing_buffer make_routing(shape const& s, unsigned seed = 1) {
  moe::routing_buffer r(s.T, s.K, s.E);
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(0, 1);
  for (std::int64_t t = 0; t < s.T; ++t)
    for (int j = 0; j < s.K; ++j) {
      std::int64_t const i = t * s.K + j;
      bool again = true;
      while (again) {
        float const u = uniform(random);
        r.expert[i] = std::min(
            s.E - 1, static_cast<int>((0.5f * u + 0.5f * u * u) * static_cast<float>(s.E)));
        again = std::find(r.expert + t * s.K, r.expert + i, r.expert[i]) != r.expert + i;
      }
      r.weight[i] = r.score[i] = uniform(random);
    }
  return r;
}

struct variant {
  char const* name;
  moe::table_rules rules;
};

std::vector<variant> variants() {
  using namespace moe;
  auto const drop = capacity::deepspeed({.factor = 1, .eval_factor = 1});
  return {
      {"packed", {}},
      {"packed/choice_major", {.rank = order::choice_major}},
      {"padded/deepspeed", {.rows = layout::padded, .cap = drop}},
      {"aligned", {.rows = layout::aligned, .align = 16}},
      {"packed/score", {.cap = drop, .when_full = overflow::score}},
      {"packed/random", {.cap = drop, .when_full = overflow::random}},
      {"packed/batch_prioritised", {.cap = drop, .when_full = overflow::batch_prioritised}},
  };
}

/// What is timed at once: many routings where one is small, so that a branch predictor cannot learn
/// their ids by heart, which makes a sort of 512 pairs three times as fast as it is on new ones.
std::vector<moe::routing_buffer> make_routings(shape const& s) {
  std::vector<moe::routing_buffer> all;
  auto const count = std::max<std::int64_t>(1, 65536 / (s.T * s.K));
  for (unsigned seed = 1; seed <= count; ++seed) all.push_back(make_routing(s, seed));
  return all;
}

/// Times make(routing) for all routings, in turn with the roof: plain copies of as many bytes as a
/// packed table needs at least. Each id is read once, row_of and pair_of are written once, and so are
/// begin, used and wanted of each expert.
template <class Make>
void run(benchmark::State& state, shape const& s, moe::cpu const& exec,
         std::vector<moe::routing_buffer> const& routings, Make const& make) {
  std::int64_t const pairs = s.T * s.K, bytes = 12 * pairs + 12 * s.E;
  auto const times = static_cast<double>(routings.size());
  moe_bench::copy_roof const roof(exec, {.reads = 1, .writes = 1, .bytes = bytes / 2});
  std::vector<double> own, cached, past;
  auto const take = [](std::vector<double>& into, auto const& f) {
    into.push_back(moe_bench::seconds(f));
    return into.back();
  };
  for (auto _ : state) {
    state.SetIterationTime(take(own, [&] {
      for (moe::routing const& r : routings) make(r);
    }));
    take(cached, [&] {
      for (std::size_t n = 0; n < routings.size(); ++n) roof.by_memcpy();
    });
    take(past, [&] {
      for (std::size_t n = 0; n < routings.size(); ++n) roof.by_copy();
    });
  }
  double const own_time = moe_bench::fast_decile(own), seconds = own_time / times;
  state.counters["s/pair"] = seconds / static_cast<double>(pairs);
  state.counters["tokens/s"] = static_cast<double>(s.T) / seconds;
  state.counters["bytes/s"] =
      benchmark::Counter(static_cast<double>(bytes) / seconds, benchmark::Counter::kDefaults,
                         benchmark::Counter::kIs1000);
  state.counters["percent_of_roof"] =
      100 * std::min(moe_bench::fast_decile(cached), moe_bench::fast_decile(past)) / own_time;
}

void run_build_table(benchmark::State& state, shape const& s, moe::table_rules const& rules,
                     int threads) {
  auto const routings = make_routings(s);
  moe::thread_team team(threads);
  moe::cpu const exec = threads == 1 ? moe::cpu{} : moe::cpu(team);
  moe::table_shape bounds{.T = s.T, .K = s.K, .E = s.E};
  bounds.max_rows = moe::max_rows(rules, bounds);
  moe::table_buffer table(bounds);
  moe::buffer scratch(moe::build_table_scratch(exec, bounds));
  run(state, s, exec, routings, [&](moe::routing const& r) {
    moe::build_table(exec, r, rules, scratch, table);
    benchmark::ClobberMemory();
  });
}

/// The same packed table from a permutation that sorts pairs by expert, in token-major order.
class sorted_table {
 public:
  explicit sorted_table(shape const& s)
      : keys_(static_cast<std::size_t>(s.T * s.K)),
        pair_of_(keys_.size()),
        row_of_(keys_.size()),
        begin_(static_cast<std::size_t>(s.E) + 1) {}

  /// The obvious way: a stable sort of pair ids by expert. Allocates inside.
  void stable_sort(moe::routing const& r) {
    std::iota(pair_of_.begin(), pair_of_.end(), 0);
    std::stable_sort(pair_of_.begin(), pair_of_.end(),
                     [&](std::int32_t a, std::int32_t b) { return r.expert[a] < r.expert[b]; });
    finish(r);
  }

  /// The fairer way: a sort of words that hold the expert above the pair.
  void sort_words(moe::routing const& r) {
    for (std::size_t i = 0; i < keys_.size(); ++i)
      keys_[i] = static_cast<std::uint64_t>(r.expert[i]) << 32 | i;
    std::sort(keys_.begin(), keys_.end());
    for (std::size_t i = 0; i < keys_.size(); ++i)
      pair_of_[i] = static_cast<std::int32_t>(keys_[i]);
    finish(r);
  }

  bool equals(moe::routing_table const& table) const {
    return std::equal(pair_of_.begin(), pair_of_.end(), table.pair_of) &&
           std::equal(row_of_.begin(), row_of_.end(), table.row_of) &&
           std::equal(begin_.begin(), begin_.end(), table.begin);
  }

 private:
  void finish(moe::routing const& r) {
    std::size_t e = 0;
    for (std::size_t row = 0; row < pair_of_.size(); ++row) {
      auto const i = static_cast<std::size_t>(pair_of_[row]);
      row_of_[i] = static_cast<std::int32_t>(row);
      while (e <= static_cast<std::size_t>(r.expert[i]))
        begin_[e++] = static_cast<std::int32_t>(row);
    }
    while (e < begin_.size()) begin_[e++] = static_cast<std::int32_t>(pair_of_.size());
  }

  std::vector<std::uint64_t> keys_;
  std::vector<std::int32_t> pair_of_, row_of_, begin_;
};

void run_sort(benchmark::State& state, shape const& s,
              void (sorted_table::*sort)(moe::routing const&)) {
  auto const routings = make_routings(s);
  sorted_table table(s);
  run(state, s, moe::cpu{}, routings, [&](moe::routing const& r) {
    (table.*sort)(r);
    benchmark::ClobberMemory();
  });
}

void verify_against_sort(shape const& s) {
  moe::routing_buffer const r = make_routing(s);
  moe::table_buffer table({.T = s.T, .K = s.K, .E = s.E, .max_rows = s.T * s.K});
  moe::buffer scratch(moe::build_table_scratch(moe::cpu{}, table.room));
  moe::build_table(moe::cpu{}, r, moe::table_rules{}, scratch, table);
  sorted_table a(s), b(s);
  a.stable_sort(r);
  b.sort_words(r);
  if (!a.equals(table) || !b.equals(table)) std::abort();
}

int const registered = [] {
  for (shape const& s : shapes) {
    verify_against_sort(s);
    std::string const at =
        "/T:" + std::to_string(s.T) + "/E:" + std::to_string(s.E) + "/K:" + std::to_string(s.K);
    for (variant const& v : variants())
      for (int threads : {1, 2}) {
        if (threads > 1 && s.T < 2048) continue;  // build_table would not wake the second
        benchmark::RegisterBenchmark(
            ("build_table/" + std::string(v.name) + at + "/threads:" + std::to_string(threads))
                .c_str(),
            [s, v, threads](benchmark::State& state) {
              run_build_table(state, s, v.rules, threads);
            })
            ->UseManualTime();
      }
    for (bool words : {true, false})
      benchmark::RegisterBenchmark(
          ((words ? "sort_words" : "stable_sort") + ("/packed" + at + "/threads:1")).c_str(),
          [s, words](benchmark::State& state) {
            run_sort(state, s, words ? &sorted_table::sort_words : &sorted_table::stable_sort);
          })
          ->UseManualTime();
  }
  return 0;
}();

}  // namespace
