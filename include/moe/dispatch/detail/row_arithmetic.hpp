// Arithmetic on rows: weighted sums, scaled copies and dot products, in an order that M alone fixes.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>
#include <moe/dispatch/detail/streaming.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Elements of a cache line. Loops of this constant length become vector code at -O2 too, where
/// g++ 12 leaves others alone.
template <class S>
inline constexpr int lanes = static_cast<int>(cache_line / static_cast<std::int64_t>(sizeof(S)));

/// Columns that are worked on at a time: their sums stay in the first-level cache. A guess.
inline constexpr std::int64_t block_columns = 256;

/// Calls f(first column, columns) for blocks of [0, M). All but the first start at a cache line of
/// `out`, so that no line is stored in two parts.
template <class S, class F>
void for_blocks(S const* out, std::int64_t M, F const& f) {
  std::int64_t const skew = elements_to_line(out);
  for (std::int64_t c = 0; c < M;) {
    std::int64_t const columns =
        std::min(M - c, c == 0 && skew > 0 ? block_columns - lanes<S> + skew : block_columns);
    f(c, columns);
    c += columns;
  }
}

/// to[c] = from[c] for one line of To, rounded if To is narrower.
template <class To, class From>
void convert_line(To* __restrict to, From const* from) noexcept {
  for (int l = 0; l < lanes<To>; ++l) to[l] = static_cast<To>(from[l]);
}
#if defined(__SSE2__)
/// The same bits as bf16(float). Compilers narrow 32 to 16 bits by shuffles where one instruction
/// does, given values in the range of its saturation.
inline void convert_line(bf16* __restrict to, float const* from) noexcept {
  std::int32_t upper[lanes<bf16>];
  for (int l = 0; l < lanes<bf16>; ++l) {
    auto const bits = __builtin_bit_cast(std::uint32_t, from[l]);
    std::uint32_t const nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    std::uint32_t const chosen = from[l] == from[l] ? nearest : bits | 0x400000u;
    upper[l] = static_cast<std::int32_t>(chosen) >> 16;
  }
  auto const* wide = reinterpret_cast<__m128i const*>(upper);
  for (int l = 0; l < lanes<bf16>; l += 8, wide += 2)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + l),
                     _mm_packs_epi32(_mm_loadu_si128(wide), _mm_loadu_si128(wide + 1)));
}
#endif

/// One addend of a weighted sum of rows.
template <class S>
struct term {
  S const* row;  ///< [M]
  accumulate_t<S> weight;
};

/// Rows that are read at the same time: enough streams to keep the memory busy.
inline constexpr int max_terms = 4;

// The loops below are functions of their own, never inlined: g++ 12 forgets __restrict when it
// inlines, and with it the vector code.

/// sum[c] (=|+=) weight_0 row_0[first + c] + weight_1 row_1[first + c] + ..., from left to right.
template <bool Add, class S, std::size_t... J>
[[gnu::noinline]] void add_terms(accumulate_t<S>* __restrict sum, term<S> const* terms,
                                 std::int64_t first, std::int64_t columns,
                                 std::index_sequence<J...>) noexcept {
  using A = accumulate_t<S>;
  term<S> const t[] = {{terms[J].row + first, terms[J].weight}...};
  auto const total = [&](std::int64_t c) {
    A s = Add ? sum[c] : t[0].weight * static_cast<A>(t[0].row[c]);
    ((Add || J > 0 ? void(s += t[J].weight * static_cast<A>(t[J].row[c])) : void()), ...);
    return s;
  };
  std::int64_t c = 0;
  for (; c + lanes<S> <= columns; c += lanes<S>)
    for (int l = 0; l < lanes<S>; ++l) sum[c + l] = total(c + l);
  for (; c < columns; ++c) sum[c] = total(c);
}

/// The same for `count` terms, known at run time: 1 <= count <= max_terms.
template <bool Add, class S>
void add_terms(accumulate_t<S>* sum, term<S> const* terms, int count, std::int64_t first,
               std::int64_t columns) noexcept {
  static_assert(max_terms == 4);
  switch (count) {
    case 1:
      return add_terms<Add>(sum, terms, first, columns, std::make_index_sequence<1>());
    case 2:
      return add_terms<Add>(sum, terms, first, columns, std::make_index_sequence<2>());
    case 3:
      return add_terms<Add>(sum, terms, first, columns, std::make_index_sequence<3>());
    default:
      return add_terms<Add>(sum, terms, first, columns, std::make_index_sequence<4>());
  }
}

/// to[c] = from[c], rounded if To is narrower.
template <class To, class From>
[[gnu::noinline]] void convert(To* __restrict to, From const* from, std::int64_t columns) noexcept {
  std::int64_t c = 0;
  for (; c + lanes<To> <= columns; c += lanes<To>) convert_line(to + c, from + c);
  for (; c < columns; ++c) to[c] = static_cast<To>(from[c]);
}

/// to[c] = weight * from[c], rounded once.
template <class S>
[[gnu::noinline]] void scale(S* __restrict to, S const* from, accumulate_t<S> weight,
                             std::int64_t columns) noexcept {
  using A = accumulate_t<S>;
  std::int64_t c = 0;
  for (; c + lanes<S> <= columns; c += lanes<S>) {
    if constexpr (std::is_same_v<S, A>) {
      for (int l = 0; l < lanes<S>; ++l) to[c + l] = weight * from[c + l];
    } else {
      A line[lanes<S>];
      for (int l = 0; l < lanes<S>; ++l) line[l] = weight * static_cast<A>(from[c + l]);
      convert_line(to + c, line);
    }
  }
  for (; c < columns; ++c) to[c] = static_cast<S>(weight * static_cast<A>(from[c]));
}

/// Stores a block, past the cache or not.
template <class S>
void store_block(S* to, S const* block, std::int64_t columns, bool past_cache) noexcept {
  std::int64_t const bytes = columns * static_cast<std::int64_t>(sizeof(S));
  if (past_cache)
    copy_past_cache(to, block, bytes);
  else
    std::memcpy(to, block, static_cast<std::size_t>(bytes));
}

/// out[c] = weight * from[c] for a whole row.
template <class S>
void scale_row(S* out, S const* from, accumulate_t<S> weight, std::int64_t M,
               bool past_cache) noexcept {
  if (!past_cache) return scale(out, from, weight, M);
  for_blocks(out, M, [&](std::int64_t c, std::int64_t columns) {
    alignas(cache_line) S block[block_columns];
    scale(block, from + c, weight, columns);
    copy_past_cache(out + c, block, columns * static_cast<std::int64_t>(sizeof(S)));
  });
}

/// The sum of a[c] * b[c]. Column c is added to partial sum c mod lanes, these as a butterfly.
template <class S>
[[gnu::noinline]] accumulate_t<S> dot(S const* a, S const* b, std::int64_t M) noexcept {
  using A = accumulate_t<S>;
  A partial[lanes<S>] = {};
  std::int64_t c = 0;
  for (; c + lanes<S> <= M; c += lanes<S>)
    for (int l = 0; l < lanes<S>; ++l)
      partial[l] += static_cast<A>(a[c + l]) * static_cast<A>(b[c + l]);
  for (int l = 0; c + l < M; ++l) partial[l] += static_cast<A>(a[c + l]) * static_cast<A>(b[c + l]);
  for (int width = lanes<S> / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) partial[l] += partial[l + width];
  return partial[0];
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
