// How many tokens want some ranks, if all experts are liked alike.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// Of T tokens those that want any of `span` ranks, on average, where each chooses K of E experts at
/// random and a rank has E / R of them: T (1 - C(E - w, K) / C(E, K)) for w = span E / R experts. Each token
/// counts once, however many of its experts are there. Between nodes of G ranks that is: a row for each
/// of K (N - 1) / N choices if rows are sent by expert, expected_rows(1) for each of R - G ranks if they
/// are sent by rank, and expected_rows(G) for each of N - 1 nodes if they are sent by node.
///
/// @throws precondition_error unless 1 <= K <= E, R >= 1 divides E, and span is in [0, R].
/// Example: T = 6, K = 2, E = 4, R = 4 give 3 for one rank and 5 for two.
inline double expected_rows(std::int64_t T, int K, int E, int R, int span,
                            call_site site = call_site::here()) {
  expects(R >= 1 && E >= 1 && E % R == 0, "expected_rows: R >= 1 divides E", site,
          {{"E", E}, {"R", R}});
  expects(K >= 1 && K <= E && span >= 0 && span <= R,
          "expected_rows: 1 <= K <= E and 0 <= span <= R", site,
          {{"K", K}, {"E", E}, {"span", span}, {"R", R}});
  int const others = E - E / R * span;
  double none = 1;  // of its K experts is among those of the ranks
  for (int k = 0; k < K; ++k) none *= others > k ? static_cast<double>(others - k) / (E - k) : 0;
  return static_cast<double>(T) * (1 - none);
}

}  // namespace moe::inline MOE_ABI
