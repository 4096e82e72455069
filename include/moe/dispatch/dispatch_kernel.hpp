// The bodies of the kernels that dispatch: tokens to rows, and the gradients of weighted rows back.
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

/// What `dispatch` does, as a kernel body: a warp reads a slice of a token, once, and writes it to each
/// row of the token. The first blocks zero the padding.
///
/// No block outlives its slices, so that the last ones are spread over the whole device, and few tokens
/// are cut into enough slices to fill it.
/// @tparam Vector  Elements that a thread moves at once: 16 bytes, for which all rows have to be aligned
///                 (see detail::in_vectors), or 1.
template <scalar S, int Vector, bool Weighted, int Threads = 128>
struct dispatch_kernel {
  static constexpr int threads = Threads;
  /// Chunks of a thread, which are on their way at the same time.
  static constexpr int depth = 4;
  struct shared {};

  using A = accumulate_t<S>;
  using vector = detail::chunk<S, Vector>;

  /// @param weight  One for each pair; not read unless Weighted.
  /// @param cut     Slices of warp_size * Vector * depth columns or less.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, matrix_view<S const> tokens,
                                  detail::token_pairs pairs, A const* weight, detail::padding empty,
                                  detail::slices cut, bool streaming, matrix_view<S> rows) const {
    b.wait_for_previous();
    b.let_next_start();
    if (b.block() < empty.blocks) {
      empty.template clear<Vector>(b, rows, streaming);
      return;
    }
    auto const unit = static_cast<std::uint32_t>(b.block() - empty.blocks) * (Threads / warp_size) +
                      static_cast<std::uint32_t>(b.thread() / warp_size);
    if (unit >= pairs.T * cut.of_row) return;
    auto const [t, first, last] = cut.of(unit, rows.cols());

    int const lane = b.thread() % warp_size;
    S const* const token = tokens.row(t);
    std::int64_t column[depth];
    vector x[depth];
    MOE_UNROLL
    for (int d = 0; d < depth; ++d) {
      column[d] = first + (d * warp_size + lane) * Vector;
      x[d] = detail::load<vector>(token + (column[d] < last ? column[d] : last - Vector));
    }

    detail::lane_pair<A> const own(lane, pairs, t, Weighted ? weight : nullptr);
    S* const to = own.row >= 0 ? rows.row(own.row) : nullptr;
    std::uint32_t const has = b.ballot(all_lanes, to != nullptr);
    for (int i = 0; i < own.all.count; ++i) {
      S* const row = detail::shuffle_pointer(b, to, i);
      A w = 1;
      if constexpr (Weighted) w = b.shuffle(all_lanes, own.weight, i);
      if ((has >> i & 1u) == 0) continue;
      MOE_UNROLL
      for (int d = 0; d < depth; ++d)
        if (column[d] < last) detail::store(row + column[d], scaled(x[d], w), streaming);
    }
  }

 private:
  MOE_HOST_DEVICE static vector scaled(vector const& x, [[maybe_unused]] A w) noexcept {
    if constexpr (!Weighted) {
      return x;
    } else {
      A wide[Vector];
      detail::widen(wide, x);
      MOE_UNROLL
      for (int v = 0; v < Vector; ++v) wide[v] *= w;
      return detail::narrow<S>(wide);
    }
  }
};

/// What `dispatch_backward` with weights does, as a kernel body: a block for each token.
/// @tparam Vector  As for dispatch_kernel.
template <scalar S, int Vector, int Threads = 256>
struct dispatch_backward_kernel {
  static constexpr int threads = Threads;

  using A = accumulate_t<S>;
  using dots = detail::pair_dots<S, Vector, Threads>;
  using shared = typename dots::shared;

  /// @param add  Whether the sums are added to what dtokens holds.
  template <thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<S const> drows,
                                  matrix_view<S const> tokens, detail::token_pairs pairs,
                                  A const* weight, bool add, bool streaming, matrix_view<S> dtokens,
                                  A* dweight) const {
    b.wait_for_previous();
    b.let_next_start();
    std::int64_t const t = b.block();
    detail::lane_pair<A> const own(b.thread() % warp_size, pairs, t, weight);
    S const* const source = own.addend(drows, {}, t);
    A const start = b.ballot(all_lanes, source != nullptr) != 0 ? -A(0) : A(0);
    S* const out = dtokens.row(t);
    dots::run(b, s, own.all, source, tokens.row(t), dtokens.cols(), dweight,
              [&](std::int64_t c, bool live, auto const&, auto const& each) {
                A sum[Vector];
                MOE_UNROLL
                for (int v = 0; v < Vector; ++v) sum[v] = start;
                if (add && live)
                  detail::widen(sum, detail::load<detail::chunk<S, Vector>>(out + c));
                each([&](int i, bool mine, auto const& y) {
                  A const w = b.shuffle(all_lanes, own.weight, i);
                  if (!mine) return;
                  MOE_UNROLL
                  for (int v = 0; v < Vector; ++v) sum[v] = detail::multiply_add(w, y[v], sum[v]);
                });
                if (live) detail::store(out + c, detail::narrow<S>(sum), streaming);
              });
  }
};

}  // namespace moe::inline MOE_ABI
