// How fast this machine copies: the roof for whatever only moves memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/dispatch/detail/lanes.hpp>
#include <moe/dispatch/detail/streaming.hpp>

namespace moe_bench {

template <class F>
double seconds(F const& f) {
  auto const start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// Other programs only ever add time: of many samples the fastest tenth tells most.
inline double fast_decile(std::vector<double> values) {
  if (values.empty()) return 0;
  auto const tenth = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 10);
  std::nth_element(values.begin(), tenth, values.end());
  return *tenth;
}

/// What an operation reads and writes at least, in passes over [T,M] arrays of `bytes` each.
struct traffic {
  int reads, writes;
  std::int64_t bytes;

  std::int64_t total() const { return (reads + writes) * bytes; }
};

/// Plain loops by all threads of an executor that move as much as some operation.
class copy_roof {
 public:
  copy_roof(moe::cpu const& exec, traffic const& moved)
      : exec_(exec),
        moved_(moved),
        stream_((moved.bytes + page - 1) / page * page),
        size_(stream_ *
              std::max({moved.reads, moved.writes, (moved.reads + moved.writes + 1) / 2})),
        from_(allocate(size_)),
        to_(allocate(size_)),
        other_(allocate(cache)) {}

  /// The cache forgets the arrays of all others.
  void evict() const {
    exec_.split(cache, page, [&](std::int64_t first, std::int64_t last, int) {
      long sum = 0;
      for (std::int64_t i = first; i < last; i += 64) sum += static_cast<long>(other_.get()[i]);
      benchmark::DoNotOptimize(sum);
    });
  }

  void by_memcpy() const {
    each_range(moved_.total() / 2, [&](std::int64_t first, std::int64_t last) {
      std::memcpy(to_.get() + first, from_.get() + first, static_cast<std::size_t>(last - first));
    });
  }
  /// Half of the bytes are read and half are written, past the cache.
  void by_copy() const {
    each_range(moved_.total() / 2,
               [&](std::int64_t first, std::int64_t last) { stream(first, last, 1, 1); });
  }
  /// As many are read and as many written as the operation does: streams side by side.
  void by_streams() const {
    each_range(moved_.bytes, [&](std::int64_t first, std::int64_t last) {
      stream(first, last, moved_.reads, moved_.writes);
    });
  }

 private:
  static constexpr std::int64_t page = 4096;
  static constexpr std::int64_t cache = std::int64_t{64} << 20;  ///< more than a cache holds

  struct free {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{page}); }
  };
  using storage = std::unique_ptr<std::byte, free>;

  storage allocate(std::int64_t bytes) const {
    auto const size = static_cast<std::size_t>(bytes);
    storage data(static_cast<std::byte*>(::operator new(size, std::align_val_t{page})));
    exec_.split(bytes, page, [&](std::int64_t first, std::int64_t last, int) {
      std::memset(data.get() + first, 1, static_cast<std::size_t>(last - first));
    });
    return data;
  }

  template <class F>
  void each_range(std::int64_t bytes, F const& f) const {
    exec_.split(bytes, page, [&](std::int64_t first, std::int64_t last, int) { f(first, last); });
  }

  /// to[w] = the sum of from[r] over the streams r, for each stream w; 64 bytes at a time.
  void stream(std::int64_t first, std::int64_t last, int reads, int writes) const {
    constexpr std::int64_t step = 64, register_bytes = moe::detail::vector_bytes;
    constexpr int registers = step / register_bytes;
    auto const float_at = [](std::byte* data, std::int64_t i) {
      return reinterpret_cast<float*>(data + i);
    };
    for (std::int64_t i = first; i + step <= last; i += step) {
      moe::detail::lanes<float>::vector sum[registers];
      for (int l = 0; l < registers; ++l)
        sum[l] = moe::detail::load_vector(float_at(from_.get(), i + l * register_bytes));
      for (int r = 1; r < reads; ++r)
        for (int l = 0; l < registers; ++l)
          sum[l] +=
              moe::detail::load_vector(float_at(from_.get(), r * stream_ + i + l * register_bytes));
      for (int w = 0; w < writes; ++w)
        for (int l = 0; l < registers; ++l)
          moe::detail::store_vector<true>(to_.get() + w * stream_ + i + l * register_bytes, sum[l]);
    }
    moe::detail::store_fence();
  }

  moe::cpu exec_;
  traffic moved_;
  std::int64_t stream_, size_;
  storage from_, to_, other_;
};

/// Times f against plain loops that move as many bytes, taken in turn with it and each from memory
/// that no cache holds, so that all meet the same machine. For benchmarks with UseManualTime.
///
/// Counters: bytes/s of f; memcpy, copy and streams, the same for the loops (see copy_roof);
/// percent_of_roof, of the best of the three; percent_of_copy, of the copy. Fast deciles.
template <class F>
void run_against_copy(benchmark::State& state, moe::cpu const& exec, traffic const& moved,
                      F const& f) {
  copy_roof const roof(exec, moved);
  std::vector<double> own, cached, copied, streamed;
  auto const take = [&](std::vector<double>& into, auto const& run) {
    roof.evict();
    into.push_back(seconds(run));
    return into.back();
  };
  f();
  for (auto _ : state) {
    state.SetIterationTime(take(own, f));
    take(cached, [&] { roof.by_memcpy(); });
    take(copied, [&] { roof.by_copy(); });
    take(streamed, [&] { roof.by_streams(); });
  }
  auto const rate = [&](std::vector<double> const& samples) {
    return static_cast<double>(moved.total()) / fast_decile(samples);
  };
  auto const counter = [&](std::vector<double> const& samples) {
    return benchmark::Counter(rate(samples), benchmark::Counter::kDefaults,
                              benchmark::Counter::kIs1000);
  };
  state.counters["bytes/s"] = counter(own);
  state.counters["memcpy"] = counter(cached);
  state.counters["copy"] = counter(copied);
  state.counters["streams"] = counter(streamed);
  state.counters["percent_of_copy"] = 100 * rate(own) / rate(copied);
  state.counters["percent_of_roof"] =
      100 * rate(own) / std::max({rate(cached), rate(copied), rate(streamed)});
}

}  // namespace moe_bench
