// Grouped matrix products: each expert's rows times that expert's weights, and both gradients.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/detail/expect_shapes.hpp>
#include <moe/expert/detail/gemm_shapes.hpp>
#include <moe/expert/detail/task_list.hpp>
#include <moe/expert/instruction_sets.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// Grouped products by the kernels of an instruction set. Weights are read where they lie, [P, in, out]
/// row-major, and packed on the fly: no copy of them outlives a call, so changed weights are always seen.
///
/// Work is cut into (expert, rows, columns) tasks that threads take when they are free. Results are bitwise
/// equal for any number of threads. `forward`, moreover, gives a row the same bits whatever other rows its
/// expert has.
/// @tparam Set  `best_set`; or one set, for the same bits on every processor that has it.
template <class Set>
struct gemm_on {
  /// Bytes of scratch for any of the products over P experts.
  template <std::floating_point V>
  static std::size_t scratch_bytes(cpu const& exec, int P) noexcept {
    return memory_size{}
        .add<std::int64_t>(P + 1)
        .add<V>(exec.threads() * detail::gemm::room_elements<V>)
        .bytes();
  }

  /// c[r] = a[r] b[p] + bias[p] for each row r of expert p.
  ///
  /// @param a     [N,in]. Rows outside the segments are not read, nor those of c written.
  /// @param b     [P,in,out]
  /// @param bias  [P,out], or absent.
  /// @param c     [N,out] out. Must not overlap a, b, bias.
  /// @throws precondition_error if shapes disagree or scratch is too small.
  template <std::floating_point V>
  static void forward(cpu const& exec, matrix_view<std::type_identity_t<V> const> a,
                      stacked_view<std::type_identity_t<V> const> b,
                      matrix_view<std::type_identity_t<V> const> bias, row_segments const& segments,
                      matrix_view<V> c, memory scratch, call_site site = call_site::here()) {
    using namespace detail::gemm;
    expect_shapes(segments, b.rows(), a, b, b.cols(), c, site);
    expect_bias(bias, b, site);
    run_rows<V>(exec, segments, b.cols(), scratch, site, [&](int p, rows_task<V> task) {
      task.a = a;
      task.b = {b[p].data() + task.column, b.rows(), task.n, b.ld()};
      task.c = c;
      task.bias = bias.absent() ? nullptr : bias.row(p) + task.column;
      Set::template gemm<V>().forward(task);
    });
  }

  /// da[r] (+)= dc[r] b[p]^T for each row r of expert p.
  ///
  /// @param dc  [N,out]   @param b  [P,in,out]   @param da  [N,in] out.
  template <std::floating_point V>
  static void input_gradient(cpu const& exec, matrix_view<std::type_identity_t<V> const> dc,
                             stacked_view<std::type_identity_t<V> const> b,
                             row_segments const& segments, update how, matrix_view<V> da,
                             memory scratch, call_site site = call_site::here()) {
    using namespace detail::gemm;
    expect_shapes(segments, b.cols(), dc, b, b.rows(), da, site);
    run_rows<V>(exec, segments, b.rows(), scratch, site, [&](int p, rows_task<V> task) {
      task.a = dc;
      task.b = {b[p].row(task.column), task.n, b.cols(), b.ld()};
      task.c = da;
      task.how = how;
      Set::template gemm<V>().input_gradient(task);
    });
  }

  /// db[p] (+)= sum over rows r of expert p of a[r]^T dc[r]. An expert without rows has gradient 0.
  ///
  /// @param a  [N,in]   @param dc  [N,out]   @param db  [P,in,out] out.
  template <std::floating_point V>
  static void weight_gradient(cpu const& exec, matrix_view<std::type_identity_t<V> const> a,
                              matrix_view<std::type_identity_t<V> const> dc,
                              row_segments const& segments, update how, stacked_view<V> db,
                              memory scratch, call_site site = call_site::here()) {
    using namespace detail::gemm;
    expect_shapes(segments, db.rows(), a, db, db.cols(), dc, site);
    std::int64_t const in = db.rows(), out = db.cols();
    if (in == 0 || out == 0) return;
    std::int64_t const chunks = (in + chunk_rows - 1) / chunk_rows;
    auto* const first = scratch.take<std::int64_t>(segments.experts + 1, scratch_rule, site);
    V* const room = scratch.take<V>(exec.threads() * room_elements<V>, scratch_rule, site);
    task_list const tasks(
        segments.experts, (out + panel_cols<V> - 1) / panel_cols<V>,
        [&](int p) { return how == update::add && segments.rows(p) == 0 ? 0 : chunks; }, first);
    exec.each(tasks.size(), [&](std::int64_t i, int member) {
      auto const [p, chunk, panel] = tasks[i];
      std::int64_t const j = panel * panel_cols<V>;
      Set::template gemm<V>().weight_gradient(
          {a, dc, db[p], segments, p, in * chunk / chunks, in * (chunk + 1) / chunks, j,
           std::min(panel_cols<V>, out - j), how, room + member * room_elements<V>});
    });
  }

 private:
  static constexpr char const* scratch_rule = "grouped_gemm: scratch >= scratch_bytes";

  /// Calls f(expert, task) for each task of a product whose result has `width` columns; f adds what
  /// is to be multiplied.
  template <class V, class F>
  static void run_rows(cpu const& exec, row_segments const& segments, std::int64_t width,
                       memory scratch, call_site site, F const& f) {
    using namespace detail::gemm;
    if (width == 0) return;
    auto* const first = scratch.take<std::int64_t>(segments.experts + 1, scratch_rule, site);
    V* const room = scratch.take<V>(exec.threads() * room_elements<V>, scratch_rule, site);
    auto const chunks = [&](int p) { return even_blocks(segments.rows(p), chunk_rows).blocks; };
    std::int64_t pieces = 0;
    for (int p = 0; p < segments.experts; ++p) pieces += chunks(p);
    // Narrower panels if there would be too few tasks: no value depends on the width.
    std::int64_t panel = panel_cols<V>;
    while (panel > Set::template gemm<V>().narrowest &&
           pieces * ((width + panel - 1) / panel) < 4 * std::int64_t{exec.threads()})
      panel /= 2;
    task_list const tasks(segments.experts, (width + panel - 1) / panel, chunks, first);
    exec.each(tasks.size(), [&](std::int64_t i, int member) {
      auto const [p, chunk, which] = tasks[i];
      even_blocks const cut(segments.rows(p), chunk_rows);
      std::int64_t const i0 = cut.first(chunk), m = cut.first(chunk + 1) - i0;
      std::int32_t ids[chunk_rows];
      row_cursor rows(segments, p, i0);
      for (std::int64_t q = 0; q < m; ++q) ids[q] = static_cast<std::int32_t>(rows.next());
      rows_task<V> task{};
      task.ids = ids;
      task.m = m;
      task.column = which * panel;
      task.n = std::min(panel, width - task.column);
      task.room = room + member * room_elements<V>;
      f(p, task);
    });
  }
};

/// The library's own grouped products, on the best instructions that the processor has: a program needs
/// no flags for them.
struct builtin_gemm : gemm_on<best_set> {};

}  // namespace moe::inline MOE_ABI
