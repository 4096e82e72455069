// How fast this machine copies: the roof for whatever only moves memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <memory>
#include <new>
#include <vector>

#include <moe/core/cpu.hpp>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace moe_bench {

template <class F>
double seconds(F const& f) {
  auto const start = std::chrono::steady_clock::now();
  f();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  auto const middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// memcpy, written with stores that do not read their lines first.
inline void copy_non_temporal(void* to, void const* from, std::size_t bytes) {
#if defined(__SSE2__)
  auto* out = static_cast<__m128i*>(to);
  auto const* in = static_cast<__m128i const*>(from);
  std::size_t const lines = bytes / 64;
  for (std::size_t i = 0; i < lines; ++i, in += 4, out += 4) {
    __m128i const a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    __m128i const c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  _mm_sfence();
  std::memcpy(out, in, bytes % 64);
#else
  std::memcpy(to, from, bytes);
#endif
}

/// Plain copies by all threads of an executor, of as much as some operation moves.
class copy_roof {
 public:
  /// @param bytes  Read and written together.
  copy_roof(moe::cpu const& exec, std::int64_t bytes)
      : exec_(exec), half_((bytes / 2 + 63) / 64 * 64), from_(allocate()), to_(allocate()) {
    exec_.split(half_, page, [&](std::int64_t first, std::int64_t last, int) {
      auto const size = static_cast<std::size_t>(last - first);
      std::memset(from_.get() + first, 1, size);
      std::memset(to_.get() + first, 1, size);
    });
  }

  void by_memcpy() const {
    run([](void* to, void const* from, std::size_t size) { std::memcpy(to, from, size); });
  }
  void by_non_temporal() const { run(copy_non_temporal); }

 private:
  static constexpr std::int64_t page = 4096;

  struct free {
    void operator()(std::byte* data) const { ::operator delete(data, std::align_val_t{page}); }
  };
  using storage = std::unique_ptr<std::byte, free>;

  storage allocate() const {
    auto const bytes = static_cast<std::size_t>(half_ + page);
    return storage(static_cast<std::byte*>(::operator new(bytes, std::align_val_t{page})));
  }

  template <class Copy>
  void run(Copy const& copy) const {
    exec_.split(half_, page, [&](std::int64_t first, std::int64_t last, int) {
      copy(to_.get() + first, from_.get() + first, static_cast<std::size_t>(last - first));
    });
  }

  moe::cpu exec_;
  std::int64_t half_;
  storage from_, to_;
};

/// Seconds of what ran undisturbed, or of all if nothing did.
class samples {
 public:
  explicit samples(int threads) : threads_(threads) {}

  /// @return the seconds that f took.
  template <class F>
  double take(F const& f) {
    std::clock_t const start = std::clock();
    double const wall = seconds(f);
    double const processor = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    all_.push_back(wall);
    // Other processes took no time from its threads.
    if (processor >= 0.95 * threads_ * wall) undisturbed_.push_back(wall);
    return wall;
  }
  double seconds_each() const { return median(undisturbed_.empty() ? all_ : undisturbed_); }
  double share_undisturbed() const {
    return static_cast<double>(undisturbed_.size()) / static_cast<double>(all_.size());
  }

 private:
  int threads_;
  std::vector<double> all_, undisturbed_;
};

/// Times f against plain copies of as many bytes, taken in turn with it, so that all three meet the
/// same machine. For benchmarks with UseManualTime.
///
/// Counters: bytes/s of f; memcpy and non_temporal, the same for the copies; percent_of_roof, of the
/// better of the two. All of medians over the samples that other processes did not disturb;
/// `undisturbed` is the share of them.
/// @param bytes  That f must read and write at least, together.
template <class F>
void run_against_copy(benchmark::State& state, moe::cpu const& exec, std::int64_t bytes,
                      F const& f) {
  copy_roof const roof(exec, bytes);
  samples own(exec.threads()), cached(exec.threads()), past(exec.threads());
  f();
  for (auto _ : state) {
    state.SetIterationTime(own.take(f));
    cached.take([&] { roof.by_memcpy(); });
    past.take([&] { roof.by_non_temporal(); });
  }
  auto const rate = [&](samples const& s) {
    return benchmark::Counter(static_cast<double>(bytes) / s.seconds_each(),
                              benchmark::Counter::kDefaults, benchmark::Counter::kIs1000);
  };
  state.counters["bytes/s"] = rate(own);
  state.counters["memcpy"] = rate(cached);
  state.counters["non_temporal"] = rate(past);
  state.counters["percent_of_roof"] =
      100 * std::min(cached.seconds_each(), past.seconds_each()) / own.seconds_each();
  state.counters["undisturbed"] = own.share_undisturbed();
}

}  // namespace moe_bench
