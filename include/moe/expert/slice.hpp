// Expert slicing: a shard of every expert as views on the whole; the shards' outputs add up.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn_weights.hpp>

namespace moe::inline MOE_ABI {

/// Hidden columns [first, last) of an expert.
struct hidden_range {
  std::int64_t first, last;
};

/// Whether slices must be equally wide.
enum class slice_width {
  equal,  ///< H % slices == 0, or an exception.
  uneven  ///< Widths differ by one at most.
};

/// The hidden columns of slice `index` of `slices`.
/// @throws precondition_error unless 0 <= index < slices, and slices divides H if widths must be equal.
constexpr hidden_range slice_range(std::int64_t H, std::int64_t index, std::int64_t slices,
                                   slice_width width = slice_width::equal,
                                   call_site site = call_site::here()) {
  expects(slices >= 1 && index >= 0 && index < slices, "slice: 0 <= index < slices", site,
          {{"index", index}, {"slices", slices}});
  expects(width == slice_width::uneven || H % slices == 0, "slice: slices divide H", site,
          {{"H", H}, {"slices", slices}});
  return {H * index / slices, H * (index + 1) / slices};
}

/// Slice `index` of every expert: columns of up and gate and their biases, rows of down. The down bias
/// goes with slice 0 alone, so that it is added once. Works for weights and for their gradients.
///
/// @post   The outputs of all slices add up to the output of the whole, and so do the gradients of the
///         tokens and of the router weights; the gradient of each parameter comes from its one slice.
/// @throws precondition_error as slice_range.
/// @cost   O(1): views with the leading dimensions of the whole.
template <class V>
constexpr ffn_weights<V> slice(ffn_weights<V> const& whole, std::int64_t index, std::int64_t slices,
                               slice_width width = slice_width::equal,
                               call_site site = call_site::here()) {
  hidden_range const range = slice_range(whole.shape().H, index, slices, width, site);
  std::int64_t const first = range.first, n = range.last - range.first;
  auto const columns = [&](stacked_view<V> const& m) {
    return m.absent()
               ? m
               : stacked_view<V>(m.data() + first, m.count(), m.rows(), n, m.ld(), m.stride());
  };
  auto const bias = [&](matrix_view<V> const& b) {
    return b.absent() ? b : matrix_view<V>(b.data() + first, b.rows(), n, b.ld());
  };
  stacked_view<V> const& down = whole.down;
  return {columns(whole.up),
          columns(whole.gate),
          {down.data() + first * down.ld(), down.count(), n, down.cols(), down.ld(), down.stride()},
          bias(whole.up_bias),
          bias(whole.gate_bias),
          index == 0 ? whole.down_bias : matrix_view<V>()};
}

}  // namespace moe::inline MOE_ABI
