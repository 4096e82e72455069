// The body of the kernel that multiplies a few tokens by the router and routes them, in one launch.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/lane_row.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/route_kernel.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// to[i] = from[i], i < N. `from` lies at a multiple of 16 bytes.
template <int N, class T>
MOE_HOST_DEVICE void load_packets(T const* from, float (&to)[N]) {
  constexpr int at_once = 16 / static_cast<int>(sizeof(T));
  static_assert(N % at_once == 0);
  struct alignas(16) packet {
    T value[at_once];
  };
  MOE_UNROLL
  for (int i = 0; i < N; i += at_once) {
    packet const p = *reinterpret_cast<packet const*>(from + i);
    MOE_UNROLL
    for (int j = 0; j < at_once; ++j) to[i + j] = static_cast<float>(p.value[j]);
  }
}

/// to[i] = from[i], i < N, and 0 from `count` on.
template <int N, class T>
MOE_HOST_DEVICE void load_some(T const* from, std::int64_t count, float (&to)[N]) {
  MOE_UNROLL
  for (int i = 0; i < N; ++i) to[i] = i < count ? static_cast<float>(from[i]) : 0.0f;
}

/// Adds value over the lanes of a warp: value[0 .. N / 32) become elements lane N / 32, ... of the
/// sums. Lanes halve what they keep in each step, so that N values take N shuffles instead of 5 N.
template <int Bits = warp_size / 2, thread_block B, int N>
MOE_HOST_DEVICE void scatter_sums(B& b, float (&value)[N]) {
  if constexpr (Bits > 0) {
    constexpr int half = N * Bits / warp_size;  // N / 2, N / 4, ...
    bool const upper = (b.thread() & Bits) != 0;
    MOE_UNROLL
    for (int i = 0; i < half; ++i) {
      float const low = value[i], high = value[i + half];
      value[i] = (upper ? high : low) + b.shuffle_xor(all_lanes, upper ? low : high, Bits);
    }
    scatter_sums<Bits / 2>(b, value);
  }
}

}  // namespace detail

/// How `project_and_route_kernel` divides its work: block (tile, split) has the experts of a tile and
/// every splits-th part of the model width. A function of the problem alone, as sums depend on it.
struct router_split {
  static constexpr int most_tokens = 16;
  static constexpr int experts = 4;                  ///< Of one warp.
  static constexpr int elements = 8;                 ///< Of one lane at once.
  static constexpr int unit = warp_size * elements;  ///< Of the model width, of one warp at once.
  static constexpr int parts = 2;  ///< Warps of a block that share experts: each has other units.

  std::int64_t tiles = 0, splits = 0;

  /// @param tile  Experts of a block.
  static constexpr router_split of(std::int64_t E, std::int64_t M, int tile) noexcept {
    std::int64_t const tiles = (E + tile - 1) / tile;
    std::int64_t const most = (M + parts * unit - 1) / (parts * unit);
    std::int64_t const splits = 128 / tiles;  // blocks for most of a GPU; a guess
    return {tiles, splits < 1 || most < 1 ? 1 : splits < most ? splits : most};
  }
};

/// What `project_and_route` does, as a kernel body, in split.tiles * split.splits blocks.
///
/// The block that ends last adds the parts of the logits in their order and runs the gate.
/// Never run on a GPU yet.
/// @tparam Home  A `row_home` with room for E, of whole warps.
template <class Gate, class Home>
struct project_and_route_kernel {
  using home = Home;

  static constexpr int threads = home::threads;
  static_assert(home::width == warp_size);
  static constexpr int experts = router_split::experts, most_T = router_split::most_tokens;
  static constexpr int parts = router_split::parts;
  static constexpr int groups = threads / warp_size / parts;  ///< Of experts.
  static constexpr int tile = groups * experts;

  struct shared {
    typename home::shared exchange;
    float part[parts][tile][most_T];
    bool is_last;
  };

  [[no_unique_address]] Gate gate{};

  /// @param x        [T,M] in, T <= 16.
  /// @param router   [E,M] in.
  /// @param aligned  Whether all rows of both lie at multiples of 16 bytes, and M is one of 8.
  /// @param partial  [splits,T,E] to work in.
  /// @param ticket   0 before and after.
  /// @param logits   [T,E] out, or absent.
  template <thread_block B, class A, class W>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<A> x, matrix_view<W> router,
                                  router_split split, bool aligned, float* partial,
                                  std::int32_t* ticket, basic_routing<float> out,
                                  matrix_view<float> logits, matrix_view<float> scores) const {
    b.wait_for_previous();
    b.let_next_start();
    auto const T = static_cast<int>(x.rows());
    multiply(b, s, x, router, split, aligned, partial);
    b.sync();
    if (b.thread() == 0) s.is_last = b.arrive(ticket) == b.blocks() - 1;
    b.sync();
    if (!s.is_last) return;

    if (b.thread() == 0) *ticket = 0;
    auto lanes = home::lanes_of(b, s.exchange);
    for (int t = home::row_of(b); t < T; t += home::rows) {
      bool broken = false;
      typename home::template row<B> row(lanes, out.E, [&](int e) {
        float const* const from = partial + std::int64_t(t) * out.E + e;
        float l = from[0];
        for (std::int64_t n = 1; n < split.splits; ++n) l += from[n * T * out.E];
        broken |= detail::is_no_logit(l);
        if (!logits.absent()) logits(t, e) = l;
        return l;
      });
      bool const valid = lanes.highest(std::uint32_t(broken)) == 0;
      detail::route_row<warp_size>(gate, row, lanes.rank(), valid, t, out, scores, [](int, int) {});
    }
  }

 private:
  template <thread_block B, class A, class W>
  MOE_HOST_DEVICE static void multiply(B& b, shared& s, matrix_view<A> x, matrix_view<W> router,
                                       router_split split, bool aligned, float* partial) {
    constexpr int elements = router_split::elements;
    auto const T = static_cast<int>(x.rows());
    std::int64_t const E = router.rows(), M = router.cols();
    std::int64_t const first_of_tile = b.block() / split.splits * tile;
    std::int64_t const n = b.block() % split.splits;
    int const warp = b.thread() / warp_size, lane = b.thread() % warp_size;
    int const group = warp / parts, part = warp % parts;
    W* weights[experts];  // those beyond the last repeat it
    MOE_UNROLL
    for (int i = 0; i < experts; ++i) {
      std::int64_t const e = first_of_tile + group * experts + i;
      weights[i] = router.row(e < E ? e : E - 1);
    }
    float sum[experts * most_T] = {};  // [experts,T]
    std::int64_t const stride = split.splits * parts * router_split::unit;
    auto const add_units = [&](auto const& load) {
      for (std::int64_t m = (n * parts + part) * router_split::unit + lane * elements; m < M;
           m += stride) {
        float w[experts][elements];
        MOE_UNROLL
        for (int i = 0; i < experts; ++i) load(weights[i] + m, M - m, w[i]);
        A* from = x.data() + m;
        MOE_UNROLL
        for (int t = 0; t < most_T; ++t, from += x.ld()) {
          if (t >= T) continue;
          float a[elements];
          load(from, M - m, a);
          MOE_UNROLL
          for (int i = 0; i < experts; ++i) {
            MOE_UNROLL
            for (int j = 0; j < elements; ++j) sum[i * most_T + t] += a[j] * w[i][j];
          }
        }
      }
    };
    if (aligned)
      add_units([](auto const* from, std::int64_t, float(&to)[elements]) {
        detail::load_packets(from, to);
      });
    else
      add_units([](auto const* from, std::int64_t count, float(&to)[elements]) {
        detail::load_some(from, count, to);
      });
    detail::scatter_sums(b, sum);
    // Lane l has two tokens of one expert.
    constexpr int held = experts * most_T / warp_size;
    MOE_UNROLL
    for (int i = 0; i < held; ++i) {
      int const place = lane * held + i;
      s.part[part][group * experts + place / most_T][place % most_T] = sum[i];
    }
    b.sync();
    for (int i = b.thread(); i < T * tile; i += threads) {
      int const t = i / tile, e = i % tile;
      float total = s.part[0][e][t];
      for (int p = 1; p < parts; ++p) total += s.part[p][e][t];
      if (first_of_tile + e < E) partial[(n * T + t) * E + first_of_tile + e] = total;
    }
  }
};

}  // namespace moe::inline MOE_ABI
