// Which thread multiplies which rows with which panels: three passes over the packed experts.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/detail/packed_shapes.hpp>
#include <moe/expert/detail/task_list.hpp>
#include <moe/expert/packed_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI::detail::packed {

inline constexpr char const* scratch_rule = "packed_ffn: scratch >= forward_scratch_bytes";

/// Where a row comes from, and what it is multiplied by.
template <class S>
struct source_row {
  S const* data;
  float scale;
};

/// Elements for the rows of the blocks that are being gathered, if they have to be widened.
template <class S>
std::int64_t wide_elements(cpu const& exec, std::int64_t M) noexcept {
  return std::is_same_v<S, float> ? 0 : exec.threads() * most_block_rows * M;
}

/// Bytes of scratch for up to max_rows rows of S.
template <class W, class X, class S>
std::size_t schedule_bytes(cpu const& exec, ffn_shape const& shape,
                           std::int64_t max_rows) noexcept {
  std::int64_t const M = padded(shape.M), H = padded(shape.H);
  return memory_size()
      .add<std::int64_t>(shape.P + 1)
      .add<std::int64_t>(shape.P + 1)
      .template add<row_element<X>>(max_rows * row_layout<X>::size(M))
      .template add<row_element<X>>(max_rows * row_layout<X>::size(H))
      .template add<float>(exec.threads() * (sum_elements + pending_elements))
      .template add<float>(wide_elements<S>(exec, shape.M))
      .bytes();
}

/// out[r] = expert of r applied to source(r), for each row r of the segments.
///
/// The panels of an expert are cut into groups that depend on the number of threads; no value does.
/// @param source  Gives a source_row<S>.
template <class W, class X, class S, class Activation, class Source>
void run_experts(cpu const& exec, kernels<W, X, Activation> const& set, Activation const& act,
                 packed_weights<W const> const& weights, row_segments const& segments,
                 std::int64_t max_rows, Source const& source, matrix_view<float> out,
                 memory scratch, call_site site) {
  auto const P = static_cast<int>(weights.shape().P);
  auto* const first_row = scratch.take<std::int64_t>(P + 1, scratch_rule, site);
  auto* const first_task = scratch.take<std::int64_t>(P + 1, scratch_rule, site);
  expert_layout<W> const layout(weights.shape(), weights.gated());
  std::int64_t const M = row_layout<X>::size(layout.M), H = row_layout<X>::size(layout.H);
  auto* const rows = scratch.take<row_element<X>>(max_rows * M, scratch_rule, site);
  auto* const hidden = scratch.take<row_element<X>>(max_rows * H, scratch_rule, site);
  float* const sums =
      scratch.take<float>(exec.threads() * (sum_elements + pending_elements), scratch_rule, site);
  std::int64_t const cols = weights.shape().M;
  float* const wide = scratch.take<float>(wide_elements<S>(exec, cols), scratch_rule, site);

  first_row[0] = 0;
  std::int64_t chunks = 0;
  auto const blocks_of = [&](int p) {
    return gemm::even_blocks(first_row[p + 1] - first_row[p], set.block_rows);
  };
  // Rows are cut between blocks.
  auto const chunks_of = [&](int p) {
    return gemm::even_blocks(blocks_of(p).blocks, most_rows / set.block_rows);
  };
  for (int p = 0; p < P; ++p) {
    first_row[p + 1] = first_row[p] + segments.rows(p);
    chunks += chunks_of(p).blocks;
  }
  expects(first_row[P] <= max_rows, "packed_ffn: the segments have at most N rows", site,
          {{"rows", first_row[P]}, {"N", max_rows}});

  auto const gather = [&](int p, std::int64_t block, int member) {
    std::int64_t const first = blocks_of(p).first(block), last = blocks_of(p).first(block + 1);
    float const* row[most_block_rows];
    float scale[most_block_rows];
    row_cursor ids(segments, p, first);
    for (std::int64_t r = first; r < last; ++r) {
      source_row<S> const from = source(ids.next());
      if constexpr (std::is_same_v<S, float>) {
        row[r - first] = from.data;
      } else {
        float* const to = wide + (member * most_block_rows + r - first) * cols;
        for (std::int64_t k = 0; k < cols; ++k) to[k] = static_cast<float>(from.data[k]);
        row[r - first] = to;
      }
      scale[r - first] = from.scale;
    }
    set.pack({row, scale, static_cast<int>(last - first), cols, layout.M,
              rows + (first_row[p] + first) * M});
  };
  auto const bias = [](matrix_view<float const> all, int p) {
    return all.absent() ? nullptr : all.row(p);
  };
  // The rows of a chunk times some panels.
  struct product {
    int expert;
    std::int64_t chunk, first_panel, last_panel;
  };
  auto const task_of = [&](product const& which, int member) {
    panels_task<W, X> task{};
    task.blocks = blocks_of(which.expert);
    task.first_block = chunks_of(which.expert).first(which.chunk);
    task.last_block = chunks_of(which.expert).first(which.chunk + 1);
    task.first_panel = which.first_panel;
    task.last_panel = which.last_panel;
    task.sums = sums + member * (sum_elements + pending_elements);
    task.pending = task.sums + sum_elements;
    return task;
  };
  auto const multiply_in = [&](product const& which, int member) {
    int const p = which.expert;
    panels_task<W, X> task = task_of(which, member);
    task.a = rows + first_row[p] * M;
    task.b = weights.expert(p);
    task.k = layout.M;
    task.cols = weights.shape().H;
    task.bias = bias(weights.up_bias, p);
    task.gate_bias = bias(weights.gate_bias, p);
    task.hidden = hidden + first_row[p] * H;
    task.hidden_k = layout.H;
    set.hidden(task, act);
  };
  auto const multiply_out = [&](product const& which, int member) {
    int const p = which.expert;
    panels_task<W, X> task = task_of(which, member);
    task.a = hidden + first_row[p] * H;
    task.b = weights.expert(p) + layout.input_size;
    task.k = layout.H;
    task.cols = weights.shape().M;
    task.bias = bias(weights.down_bias, p);
    task.out = out;
    std::int32_t ids[most_rows];
    std::int64_t const first = task.blocks.first(task.first_block);
    std::int64_t const count = task.blocks.first(task.last_block) - first;
    row_cursor cursor(segments, p, first);
    for (std::int64_t r = 0; r < count; ++r) ids[r] = static_cast<std::int32_t>(cursor.next());
    task.ids = ids;
    set.down(task);
  };
  std::int64_t const in_panels = layout.input_panels, out_panels = layout.M / panel_width;

  // Many chunks: each from its rows to its results, while they are in the second-level cache.
  if (chunks >= 16 * std::int64_t{exec.threads()}) {
    gemm::task_list const tasks(P, 1, [&](int p) { return chunks_of(p).blocks; }, first_task);
    exec.each(tasks.size(), [&](std::int64_t i, int member) {
      auto const [p, chunk, unused] = tasks[i];
      for (std::int64_t b = chunks_of(p).first(chunk); b < chunks_of(p).first(chunk + 1); ++b)
        gather(p, b, member);
      multiply_in({p, chunk, 0, in_panels}, member);
      multiply_out({p, chunk, 0, out_panels}, member);
    });
    return;
  }
  gemm::task_list const blocks(P, 1, [&](int p) { return blocks_of(p).blocks; }, first_task);
  exec.each(blocks.size(),
            [&](std::int64_t i, int member) { gather(blocks[i].expert, blocks[i].chunk, member); });
  // Few: tasks of several panels, but enough of them that threads end together.
  auto const multiply = [&](std::int64_t panels, auto const& f) {
    std::int64_t group = 8;
    while (group > 2 && chunks * (panels / group) < 8 * std::int64_t{exec.threads()}) group /= 2;
    std::int64_t const groups = (panels + group - 1) / group;
    gemm::task_list const tasks(P, groups, [&](int p) { return chunks_of(p).blocks; }, first_task);
    exec.each(tasks.size(), [&](std::int64_t i, int member) {
      auto const [p, chunk, which] = tasks[i];
      f(product{p, chunk, which * group, std::min(panels, (which + 1) * group)}, member);
    });
  };
  multiply(in_panels, multiply_in);
  multiply(out_panels, multiply_out);
}

}  // namespace moe::inline MOE_ABI::detail::packed
