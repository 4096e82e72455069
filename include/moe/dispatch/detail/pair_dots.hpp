// The pass of both backwards: a block reads the rows of one token, and takes their dot products.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/chunk.hpp>
#include <moe/dispatch/detail/token_pairs.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// dot(row of a pair, x) for all pairs of one token, x a vector of the token's.
///
/// Thread n of the block has columns [Vector n, Vector n + Vector) and those that follow each
/// Threads * Vector columns later. It adds the products of each such range apart, then the ranges; the
/// lanes are added as a butterfly, then the warps in order. So the bits depend on M, Threads and Vector.
template <class S, int Vector, int Threads>
struct pair_dots {
  using A = accumulate_t<S>;
  using values = A[Vector];
  using vector = chunk<S, Vector>;

  static constexpr int warps = Threads / warp_size;
  /// Rows of a thread that are on their way at the same time.
  static constexpr int batch = 8;

  struct shared {
    A partial[warps][max_choices];
  };

  /// For each chunk of columns calls column(c, live, x, each), where c is the first column, live whether
  /// there is one, and x the chunk; it calls each(f), which calls f(i, mine, y) for each pair i of
  /// the token in order: if `mine`, y is the chunk of its row.
  /// @param source   The lane's pair's row, or null: no product, dweight 0.
  /// @param dweight  Out: one value for each pair.
  template <thread_block B, class Column>
  MOE_HOST_DEVICE static void run(B& b, shared& s, token_pairs::range pairs, S const* source,
                                  S const* x_row, std::int64_t M, A* dweight,
                                  Column const& column) {
    int const lane = b.thread() % warp_size;
    int const warp = b.thread() / warp_size;
    std::uint32_t const has = b.ballot(all_lanes, source != nullptr);
    A dot[max_choices] = {};
    for (std::int64_t c0 = warp * warp_size * Vector; c0 < M; c0 += Threads * Vector) {
      std::int64_t const c = c0 + lane * Vector;
      bool const live = c < M;
      std::int64_t const at = live ? c : M - Vector;
      values x;
      widen(x, load<vector>(x_row + at));
      column(c, live, x, [&](auto const& f) {
        MOE_UNROLL
        for (int first = 0; first < max_choices; first += batch) {
          if (first >= pairs.count) break;
          vector rows[batch];
          MOE_UNROLL
          for (int j = 0; j < batch; ++j) {
            // Where there is nothing to load: x again, which nobody writes meanwhile.
            bool const mine = live && (has >> (first + j) & 1u) != 0;
            S const* const row = shuffle_pointer(b, source, first + j);
            rows[j] = load_once<vector>((mine ? row : x_row) + at);
          }
          MOE_UNROLL
          for (int j = 0; j < batch; ++j) {
            bool const mine = live && (has >> (first + j) & 1u) != 0;
            values y;
            widen(y, rows[j]);
            if (mine) {
              A sum = x[0] * y[0];
              MOE_UNROLL
              for (int v = 1; v < Vector; ++v) sum = multiply_add(x[v], y[v], sum);
              dot[first + j] += sum;
            }
            f(first + j, mine, y);
          }
        }
      });
    }

    MOE_UNROLL
    for (int i = 0; i < max_choices; ++i) {
      if (i >= pairs.count) break;
      A sum = dot[i];
      MOE_UNROLL
      for (int bits = warp_size / 2; bits > 0; bits /= 2)
        sum += b.shuffle_xor(all_lanes, sum, bits);
      if (lane == 0) s.partial[warp][i] = sum;
    }
    b.sync();
    if (b.thread() >= pairs.count) return;
    A sum = s.partial[0][b.thread()];
    MOE_UNROLL
    for (int w = 1; w < warps; ++w) sum += s.partial[w][b.thread()];
    dweight[pairs.first + b.thread()] = sum;
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
