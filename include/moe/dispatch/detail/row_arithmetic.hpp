// Arithmetic on rows: weighted sums, scaled copies and dot products.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>
#include <moe/dispatch/detail/lanes.hpp>
#include <moe/dispatch/detail/streaming.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Asks for the lines that load_lanes(from) will read.
template <class S>
void load_lanes_ahead(S const* from) noexcept {
  constexpr int step = static_cast<int>(cache_line / static_cast<std::int64_t>(sizeof(S)));
  for (int l = 0; l < lane_count<S>; l += step) load_ahead(from + l);
}

/// Writes columns [0, M) of a row: out[c] = one(c), or `many(c)` lanes from column c. Past: whole
/// lanes go past the cache, and start at a line. Inlined, and given what it needs by value: a load
/// from the stack waits for the stores past the cache that look like stores to it.
template <bool Past, class S, class One, class Many>
[[gnu::always_inline]] inline void write_row(S* out, std::int64_t M, One one, Many many) noexcept {
  constexpr auto size = static_cast<std::int64_t>(sizeof(S));
  std::int64_t const head = Past ? std::min(M, bytes_to_line(out) / size) : 0;
  std::int64_t const end = M - (M - head) % lane_count<S>;
  // Lines that other rows share are stored through the cache, when they have been loaded.
  if (head > 0) __builtin_prefetch(out, 1);
  if (Past && end < M) __builtin_prefetch(out + M - 1, 1);
  for (std::int64_t c = head; c < end; c += lane_count<S>) store_lanes<Past>(out + c, many(c));
  for (std::int64_t c = 0; c < head; ++c) out[c] = one(c);
  for (std::int64_t c = end; c < M; ++c) out[c] = one(c);
}

/// Copies bytes; blocks that start at a line of `to` go past the cache.
inline void copy_past_cache(void* to, void const* from, std::int64_t bytes) noexcept {
  constexpr std::int64_t block = 4 * vector_bytes;
  auto* const target = static_cast<unsigned char*>(to);
  auto const* const source = static_cast<unsigned char const*>(from);
  auto const load = [](unsigned char const* at) __attribute__((always_inline)) {
    return load_vector(reinterpret_cast<float const*>(at));
  };
  // A line that other rows share is stored through the cache, and last, when it has been loaded.
  std::int64_t const head = std::min(bytes, bytes_to_line(target));
  std::int64_t const end = bytes - (bytes - head) % block;
  if (head > 0) __builtin_prefetch(target, 1);
  if (end < bytes) __builtin_prefetch(target + bytes - 1, 1);
  for (std::int64_t i = head; i < end; i += block) {
    auto const a = load(source + i), b = load(source + i + vector_bytes);
    auto const c = load(source + i + 2 * vector_bytes), d = load(source + i + 3 * vector_bytes);
    store_vector<true>(target + i, a);
    store_vector<true>(target + i + vector_bytes, b);
    store_vector<true>(target + i + 2 * vector_bytes, c);
    store_vector<true>(target + i + 3 * vector_bytes, d);
  }
  if (head > 0) std::memcpy(target, source, static_cast<std::size_t>(head));
  if (end < bytes) std::memcpy(target + end, source + end, static_cast<std::size_t>(bytes - end));
}

/// out[c] = from[c].
template <class S>
void copy_row(S* out, S const* from, std::int64_t M, bool past_cache) noexcept {
  std::int64_t const bytes = M * static_cast<std::int64_t>(sizeof(S));
  if (past_cache)
    copy_past_cache(out, from, bytes);
  else
    std::memcpy(out, from, static_cast<std::size_t>(bytes));
}

/// out[c] = weight * from[c], rounded once.
template <class S>
void scale_row(S* out, S const* from, accumulate_t<S> weight, std::int64_t M,
               bool past_cache) noexcept {
  using A = accumulate_t<S>;
  auto const one = [=](std::int64_t c) { return static_cast<S>(weight * static_cast<A>(from[c])); };
  auto const many = [=](std::int64_t c) __attribute__((always_inline)) {
    return lanes<A>::product(weight, load_lanes(from + c));
  };
  if (past_cache) return write_row<true>(out, M, one, many);
  write_row<false>(out, M, one, many);
}

/// Rows and their weights, to be summed in this order.
template <class S>
struct addends {
  static constexpr int most = 16;

  int count = 0;
  S const* row[most];
  accumulate_t<S> weight[most];

  void push(S const* r, accumulate_t<S> w) noexcept {
    row[count] = r;
    weight[count] = w;
    ++count;
  }
};

/// The same where they are.
template <class S>
struct addends_view {
  int count;
  S const* const* row;
  accumulate_t<S> const* weight;
};

/// N addends, which compilers keep in registers: combine 1.1 times as fast (Zen 3, T = 4096, K = 2,
/// M = 1024, 2026-11). Each N takes its time to compile, so there are few.
template <class S, int N>
struct few_addends {
  static constexpr int count = N;
  S const* row[N];
  accumulate_t<S> weight[N];

  explicit few_addends(addends<S> const& all) noexcept {
    std::copy_n(all.row, N, row);
    std::copy_n(all.weight, N, weight);
  }
};

/// out[c] (=|+=) the sum of weight * row[c], from left to right, rounded once.
template <bool Past, bool Add, class S, class Terms>
void sum_row(S* out, Terms const terms, std::int64_t M) noexcept {
  using A = accumulate_t<S>;
  constexpr int start = Add ? 0 : 1;
  write_row<Past>(
      out, M,
      [=](std::int64_t c) {
        A sum = Add ? static_cast<A>(out[c]) : A(0);
        if (!Add && terms.count > 0) sum = terms.weight[0] * static_cast<A>(terms.row[0][c]);
        for (int k = start; k < terms.count; ++k)
          sum += terms.weight[k] * static_cast<A>(terms.row[k][c]);
        return static_cast<S>(sum);
      },
      [=](std::int64_t c) __attribute__((always_inline)) {
        lanes<A> sum{};
        if (Add) sum = load_lanes(out + c);
        if (!Add && terms.count > 0)
          sum = lanes<A>::product(terms.weight[0], load_lanes(terms.row[0] + c));
        for (int k = start; k < terms.count; ++k)
          sum.add(terms.weight[k], load_lanes(terms.row[k] + c));
        return sum;
      });
}

/// The sum of a[c] * b[c], in an order that M and the width of registers fix. Calls each(c, lanes of b
/// from column c), too, where there are whole lanes. `ahead`: null, or a row that is loaded
/// meanwhile, because prefetchers of the hardware do not cross pages: the backwards 1.1 times as fast
/// in float, 1.2 times in bf16 (Zen 3, T = 4096, K = 2, M = 1024, 2026-11).
template <class S, class Each>
accumulate_t<S> dot(S const* a, S const* b, std::int64_t M, S const* ahead,
                    Each const each) noexcept {
  using A = accumulate_t<S>;
  lanes<A> sums{};
  std::int64_t c = 0;
  for (; c + lane_count<S> <= M; c += lane_count<S>) {
    if (ahead != nullptr) load_lanes_ahead(ahead + c);
    lanes<A> const y = load_lanes(b + c);
    sums.add(load_lanes(a + c), y);
    each(c, y);
  }
  A sum = sums.total();
  for (; c < M; ++c) sum += static_cast<A>(a[c]) * static_cast<A>(b[c]);
  return sum;
}
template <class S>
accumulate_t<S> dot(S const* a, S const* b, std::int64_t M, S const* ahead) noexcept {
  return dot(a, b, M, ahead, [](std::int64_t, auto const&) {});
}

/// dot(a, b), and out[c] = weight * b[c] in the same pass, which is 1.2 times as fast as two. `out` may
/// be a.
template <class S>
accumulate_t<S> dot_and_scale(S* out, S const* a, S const* b, accumulate_t<S> weight,
                              std::int64_t M, S const* ahead, bool past_cache) noexcept {
  using A = accumulate_t<S>;
  if (past_cache && bytes_to_line(out) > 0) {
    A const sum = dot(a, b, M, ahead);
    scale_row(out, b, weight, M, true);
    return sum;
  }
  auto const pass = [=](auto past) {
    return dot(a, b, M, ahead, [=](std::int64_t c, auto const& y) __attribute__((always_inline)) {
      store_lanes<past()>(out + c, lanes<A>::product(weight, y));
    });
  };
  A const sum = past_cache ? pass(std::true_type{}) : pass(std::false_type{});
  for (std::int64_t c = M - M % lane_count<S>; c < M; ++c)
    out[c] = static_cast<S>(weight * static_cast<A>(b[c]));
  return sum;
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
