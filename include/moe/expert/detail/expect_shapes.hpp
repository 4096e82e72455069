// Preconditions that all grouped products share.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI::detail::gemm {

template <class A, class B, class C>
void expect_shapes(row_segments const& segments, std::int64_t a_cols, matrix_view<A> a,
                   stacked_view<B> b, std::int64_t c_cols, matrix_view<C> c, call_site site) {
  expects(segments.experts >= 0 && segments.sources >= 1 && b.count() == segments.experts,
          "grouped_gemm: one matrix for each expert of the segments", site,
          {{"matrices", b.count()}, {"experts", segments.experts}, {"sources", segments.sources}});
  expects(a.cols() == a_cols && c.cols() == c_cols, "grouped_gemm: rows and weights agree in width",
          site,
          {{"weights.rows", b.rows()},
           {"weights.cols", b.cols()},
           {"cols", a.cols()},
           {"other cols", c.cols()}});
  expects(a.rows() == c.rows(), "grouped_gemm: as many rows in as out", site,
          {{"rows", a.rows()}, {"other rows", c.rows()}});
  expects(a.ld() >= a.cols() && b.ld() >= b.cols() && c.ld() >= c.cols(),
          "grouped_gemm: leading dimension >= columns", site,
          {{"ld", a.ld()}, {"weights.ld", b.ld()}, {"other ld", c.ld()}});
}

template <class V>
void expect_bias(matrix_view<V const> bias, stacked_view<V const> b, call_site site) {
  expects(bias.absent() ||
              (bias.rows() == b.count() && bias.cols() == b.cols() && bias.ld() >= bias.cols()),
          "grouped_gemm: bias is [P,out]", site,
          {{"bias.rows", bias.rows()},
           {"bias.cols", bias.cols()},
           {"P", b.count()},
           {"out", b.cols()}});
}

}  // namespace moe::inline MOE_ABI::detail::gemm
