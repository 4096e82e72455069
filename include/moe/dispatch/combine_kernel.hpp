// The bodies of the kernels that combine: rows to tokens, and the gradients of tokens back.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/detail/chunk.hpp>
#include <moe/dispatch/detail/padding.hpp>
#include <moe/dispatch/detail/pair_dots.hpp>
#include <moe/dispatch/detail/slices.hpp>
#include <moe/dispatch/detail/token_pairs.hpp>

namespace moe::inline MOE_ABI {

/// What `combine` and `dispatch_backward` without weights do, as a kernel body: a warp sums a slice of
/// one token, in the order of its pairs, and rounds once.
/// @tparam Vector  Elements that a thread moves at once: 16 bytes, for which all rows have to be aligned
///                 (see detail::in_vectors), or 1.
/// @tparam Batch   Rows that are on their way at the same time: more than that take another turn.
template <scalar S, int Vector, int Batch, int Threads = 128>
struct combine_kernel {
  static constexpr int threads = Threads;
  /// Chunks of each row: 8 loads of a thread are on their way, or what that is in single elements.
  static constexpr int depth = Vector == 1 ? 4 : 8 / Batch;
  static constexpr int step = warp_size * Vector * depth;  ///< Columns of a warp at once.
  struct shared {};

  using A = accumulate_t<S>;
  using vector = detail::chunk<S, Vector>;

  /// @param weight  One for each pair, or null = 1.
  /// @param tokens  What pairs at copy experts add, or absent: nothing.
  /// @param cut     Slices of whole steps.
  /// @param add     Whether the sums are added to what out holds.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, matrix_view<S const> rows,
                                  detail::token_pairs pairs, A const* weight,
                                  matrix_view<S const> tokens, detail::slices cut, bool add,
                                  bool streaming, matrix_view<S> out) const {
    b.wait_for_previous();
    b.let_next_start();
    auto const unit = static_cast<std::uint32_t>(b.block()) * (Threads / warp_size) +
                      static_cast<std::uint32_t>(b.thread() / warp_size);
    if (unit >= pairs.T * cut.of_row) return;
    auto const [t, first, last] = cut.of(unit, out.cols());

    int const lane = b.thread() % warp_size;
    detail::lane_pair<A> const own(lane, pairs, t, weight);
    S const* source = own.addend(rows, tokens, t);
    std::uint32_t const has = b.ballot(all_lanes, source != nullptr);
    int const pairs_to_add = has == 0 ? 0 : own.all.count;
    A const start = has != 0 ? -A(0) : A(0);  // -0 + x is x, for -0, too
    // Pairs without an addend load one that another pair loads: see load_once.
    if (has != 0) {
      S const* const some = detail::shuffle_pointer(b, source, detail::lowest_lane(has));
      if (source == nullptr) source = some;
    }

    for (std::int64_t c = first + lane * Vector; c - lane * Vector < last; c += step) {
      A sum[depth][Vector];
      std::int64_t at[depth];
      MOE_UNROLL
      for (int d = 0; d < depth; ++d) {
        at[d] = column(c, d) < last ? column(c, d) : last - Vector;
        MOE_UNROLL
        for (int v = 0; v < Vector; ++v) sum[d][v] = start;
        if (add && column(c, d) < last)
          detail::widen(sum[d], detail::load<vector>(out.row(t) + column(c, d)));
      }
      for (int i = 0; i < pairs_to_add; i += Batch) {
        vector x[Batch][depth];
        A w[Batch];
        MOE_UNROLL
        for (int j = 0; j < Batch; ++j) {
          S const* const row = detail::shuffle_pointer(b, source, i + j);
          w[j] = b.shuffle(all_lanes, own.weight, i + j);
          MOE_UNROLL
          for (int d = 0; d < depth; ++d) x[j][d] = detail::load_once<vector>(row + at[d]);
        }
        MOE_UNROLL
        for (int j = 0; j < Batch; ++j) {
          if ((has >> (i + j) & 1u) == 0) continue;
          MOE_UNROLL
          for (int d = 0; d < depth; ++d) {
            A wide[Vector];
            detail::widen(wide, x[j][d]);
            MOE_UNROLL
            for (int v = 0; v < Vector; ++v)
              sum[d][v] = detail::multiply_add(w[j], wide[v], sum[d][v]);
          }
        }
      }
      MOE_UNROLL
      for (int d = 0; d < depth; ++d)
        if (column(c, d) < last)
          detail::store(out.row(t) + column(c, d), detail::narrow<S>(sum[d]), streaming);
    }
  }

 private:
  /// Of chunk d of the lane whose chunk 0 starts at c.
  MOE_HOST_DEVICE static std::int64_t column(std::int64_t c, int d) noexcept {
    return c + d * warp_size * Vector;
  }
};

/// What `combine_backward` does, as a kernel body: a block for each token, after those that zero
/// the padding of drows.
/// @tparam Vector  As for combine_kernel.
template <scalar S, int Vector, int Threads = 256>
struct combine_backward_kernel {
  static constexpr int threads = Threads;

  using A = accumulate_t<S>;
  using dots = detail::pair_dots<S, Vector, Threads>;
  using shared = typename dots::shared;

  /// @param tokens   What pairs at copy experts added, or absent: nothing.
  /// @param dtokens  Out, or absent.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<S const> dout,
                                  matrix_view<S const> rows, detail::token_pairs pairs,
                                  A const* weight, matrix_view<S const> tokens,
                                  detail::padding empty, bool streaming, matrix_view<S> drows,
                                  A* dweight, matrix_view<S> dtokens) const {
    b.wait_for_previous();
    b.let_next_start();
    if (b.block() < empty.blocks) {
      empty.template clear<Vector>(b, drows, streaming);
      return;
    }
    std::int64_t const t = b.block() - empty.blocks;
    detail::lane_pair<A> const own(b.thread() % warp_size, pairs, t, weight);
    std::uint32_t const has = b.ballot(all_lanes, own.row >= 0);
    S* const to = own.row >= 0 ? drows.row(own.row) : nullptr;
    A copied = 0;
    for (int i = 0; i < own.all.count && !dtokens.absent(); ++i) {
      A const w = b.shuffle(all_lanes, own.weight, i);
      if (b.shuffle(all_lanes, own.row, i) == no_row(expert_kind::copy)) copied += w;
    }
    dots::run(b, s, own.all, own.addend(rows, tokens, t), dout.row(t), dout.cols(), dweight,
              [&](std::int64_t c, bool live, auto const& x, auto const& each) {
                each([&](int i, bool, auto const&) {
                  A const w = b.shuffle(all_lanes, own.weight, i);
                  S* const row = detail::shuffle_pointer(b, to, i);
                  if (live && (has >> i & 1u) != 0) store_product(row + c, w, x, streaming);
                });
                if (live && !dtokens.absent()) store_product(dtokens.row(t) + c, copied, x, false);
              });
  }

 private:
  MOE_HOST_DEVICE static void store_product(S* to, A w, A const (&x)[Vector],
                                            bool streaming) noexcept {
    A product[Vector];
    MOE_UNROLL
    for (int v = 0; v < Vector; ++v) product[v] = w * x[v];
    detail::store(to, detail::narrow<S>(product), streaming);
  }
};

}  // namespace moe::inline MOE_ABI
