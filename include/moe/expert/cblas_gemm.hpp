// Grouped products by a BLAS the program links: one single-threaded call for each expert.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/detail/expect_shapes.hpp>
#include <moe/expert/segments.hpp>

#if !__has_include(<cblas.h>)
#error \
    "moe: expert/cblas_gemm.hpp needs <cblas.h> and a BLAS to link; expert/grouped_gemm.hpp does not"
#endif

#include <cblas.h>

namespace moe::inline MOE_ABI {

/// The products of `builtin_gemm` by cblas_sgemm and cblas_dgemm, a task for each expert.
///
/// The threads are the executor's, so the BLAS must use one of its own for each call: set
/// OPENBLAS_NUM_THREADS=1 or call openblas_set_num_threads(1) before (MKL: mkl_set_num_threads_local(1);
/// BLIS: BLIS_NUM_THREADS=1). Bitwise the same for any number of executor threads if the BLAS is for one.
struct cblas_gemm {
  /// None: the BLAS packs in memory of its own.
  template <std::floating_point V>
  static constexpr std::size_t scratch_bytes(cpu const&, int) noexcept {
    return 0;
  }

  template <std::floating_point V>
  static void forward(cpu const& exec, matrix_view<std::type_identity_t<V> const> a,
                      stacked_view<std::type_identity_t<V> const> b,
                      matrix_view<std::type_identity_t<V> const> bias, row_segments const& segments,
                      matrix_view<V> c, memory, call_site site = call_site::here()) {
    detail::gemm::expect_shapes(segments, b.rows(), a, b, b.cols(), c, site);
    detail::gemm::expect_bias(bias, b, site);
    each_segment(exec, segments, [&](int p, std::int64_t r, std::int64_t m) {
      if (!bias.absent())
        for (std::int64_t i = 0; i < m; ++i) std::copy_n(bias.row(p), b.cols(), c.row(r + i));
      multiply(CblasNoTrans, CblasNoTrans, m, b.cols(), b.rows(), a.row(r), a.ld(), b[p].data(),
               b.ld(), bias.absent() ? V(0) : V(1), c.row(r), c.ld());
    });
  }

  template <std::floating_point V>
  static void input_gradient(cpu const& exec, matrix_view<std::type_identity_t<V> const> dc,
                             stacked_view<std::type_identity_t<V> const> b,
                             row_segments const& segments, update how, matrix_view<V> da, memory,
                             call_site site = call_site::here()) {
    detail::gemm::expect_shapes(segments, b.cols(), dc, b, b.rows(), da, site);
    each_segment(exec, segments, [&](int p, std::int64_t r, std::int64_t m) {
      multiply(CblasNoTrans, CblasTrans, m, b.rows(), b.cols(), dc.row(r), dc.ld(), b[p].data(),
               b.ld(), how == update::add ? V(1) : V(0), da.row(r), da.ld());
    });
  }

  template <std::floating_point V>
  static void weight_gradient(cpu const& exec, matrix_view<std::type_identity_t<V> const> a,
                              matrix_view<std::type_identity_t<V> const> dc,
                              row_segments const& segments, update how, stacked_view<V> db, memory,
                              call_site site = call_site::here()) {
    detail::gemm::expect_shapes(segments, db.rows(), a, db, db.cols(), dc, site);
    exec.each(segments.experts, [&](std::int64_t task, int) {
      auto const p = static_cast<int>(task);
      matrix_view<V> const to = db[p];
      V beta = how == update::add ? V(1) : V(0);
      for (int q = p * segments.sources; q < (p + 1) * segments.sources; ++q) {
        if (segments.used[q] == 0) continue;
        std::int64_t const r = segments.begin[q];
        multiply(CblasTrans, CblasNoTrans, db.rows(), db.cols(), segments.used[q], a.row(r), a.ld(),
                 dc.row(r), dc.ld(), beta, to.data(), to.ld());
        beta = V(1);
      }
      if (beta == V(0))
        for (std::int64_t i = 0; i < to.rows(); ++i) std::fill_n(to.row(i), to.cols(), V(0));
    });
  }

 private:
  template <class F>
  static void each_segment(cpu const& exec, row_segments const& segments, F const& f) {
    exec.each(segments.experts * segments.sources, [&](std::int64_t q, int) {
      if (segments.used[q] > 0)
        f(static_cast<int>(q) / segments.sources, std::int64_t{segments.begin[q]},
          std::int64_t{segments.used[q]});
    });
  }

  template <class V>
  static void multiply(CBLAS_TRANSPOSE ta, CBLAS_TRANSPOSE tb, std::int64_t m, std::int64_t n,
                       std::int64_t k, V const* a, std::int64_t lda, V const* b, std::int64_t ldb,
                       V beta, V* c, std::int64_t ldc) {
    if (m == 0 || n == 0) return;
    auto const size = [](std::int64_t x) { return static_cast<int>(x); };
    if constexpr (std::same_as<V, float>)
      cblas_sgemm(CblasRowMajor, ta, tb, size(m), size(n), size(k), 1.0f, a, size(lda), b,
                  size(ldb), beta, c, size(ldc));
    else
      cblas_dgemm(CblasRowMajor, ta, tb, size(m), size(n), size(k), 1.0, a, size(lda), b, size(ldb),
                  beta, c, size(ldc));
  }
};

static_assert(gemm_provider<cblas_gemm, float> && gemm_provider<cblas_gemm, double>);

}  // namespace moe::inline MOE_ABI
