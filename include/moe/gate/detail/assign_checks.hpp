// What functions that assign experts to the tokens of a whole batch demand. Private to them.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/route_checks.hpp>

namespace moe::inline MOE_ABI::detail {

template <class L>
void check_assign(char const* shape, char const* ids_rule, matrix_view<L> logits,
                  matrix_view<std::int32_t> ids, int k, call_site site) {
  expect_logits(shape, logits, k, site);
  std::int64_t const T = logits.rows();
  expects(ids.rows() == T && ids.cols() == k && ids.ld() >= k && !overlap(ids, logits), ids_rule,
          site, {{"rows", ids.rows()}, {"cols", ids.cols()}, {"ld", ids.ld()}, {"T", T}, {"k", k}});
}

}  // namespace moe::inline MOE_ABI::detail
