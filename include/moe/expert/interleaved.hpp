// Gate and up projections that are stored in turn, column by column: from and to the weights of experts.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/segments.hpp>

namespace moe::inline MOE_ABI {

/// Two projections in one: columns 0, 2, 4, ... are the gate's, 1, 3, 5, ... those of up.
/// Source: gpt-oss's gate_up_proj and gate_up_proj_bias.
template <class V>
struct interleaved_projection {
  stacked_view<V> weights;  ///< [P,M,2H]
  matrix_view<V> bias;      ///< [P,2H], or absent
};

namespace detail {

template <class V, class U>
void expect_interleaved(interleaved_projection<V> const& both, ffn_weights<U> const& w,
                        call_site site) {
  auto const [P, M, H] = w.shape();
  expects(w.gate.count() == P && w.gate.rows() == M && w.gate.cols() == H &&
              both.weights.count() == P && both.weights.rows() == M && both.weights.cols() == 2 * H,
          "interleaved: up and gate are [P,M,H], the projection is [P,M,2H]", site,
          {{"P", P},
           {"M", M},
           {"H", H},
           {"gate.count", w.gate.count()},
           {"count", both.weights.count()},
           {"rows", both.weights.rows()},
           {"cols", both.weights.cols()}});
  bool const biases = !both.bias.absent();
  expects(w.up_bias.absent() != biases && w.gate_bias.absent() != biases &&
              (!biases ||
               (both.bias.rows() == P && both.bias.cols() == 2 * H && w.up_bias.rows() == P &&
                w.up_bias.cols() == H && w.gate_bias.rows() == P && w.gate_bias.cols() == H)),
          "interleaved: biases are [P,2H] and [P,H], or all absent", site,
          {{"bias.rows", both.bias.rows()},
           {"bias.cols", both.bias.cols()},
           {"up_bias.cols", w.up_bias.cols()},
           {"gate_bias.cols", w.gate_bias.cols()}});
}

/// Calls f(both[2 i], gate[i]) and f(both[2 i + 1], up[i]) for i < n.
template <class V, class U, class F>
void each_column(V* both, U* gate, U* up, std::int64_t n, F const& f) {
  for (std::int64_t h = 0; h < n; ++h) {
    f(both[2 * h], gate[h]);
    f(both[2 * h + 1], up[h]);
  }
}

template <class V, class U, class F>
void each_interleaved(interleaved_projection<V> const& both, ffn_weights<U> const& w, F const& f) {
  auto const [P, M, H] = w.shape();
  for (std::int64_t p = 0; p < P; ++p) {
    for (std::int64_t m = 0; m < M; ++m)
      each_column(both.weights[p].row(m), w.gate[p].row(m), w.up[p].row(m), H, f);
    if (!both.bias.absent())
      each_column(both.bias.row(p), w.gate_bias.row(p), w.up_bias.row(p), H, f);
  }
}

}  // namespace detail

/// Fills up and gate of the weights, and their biases, from one interleaved projection. down is not touched.
/// @throws precondition_error if shapes disagree, or one side has biases and the other has not.
template <class V, class U>
void split_interleaved(interleaved_projection<V> const& from, ffn_weights<U> const& weights,
                       call_site site = call_site::here()) {
  detail::expect_interleaved(from, weights, site);
  detail::each_interleaved(from, weights,
                           [](auto const& both, U& one) { one = static_cast<U>(both); });
}

/// The way back, of weights or of their gradients.
/// @throws precondition_error as split_interleaved.
template <class U, class V>
void join_interleaved(ffn_weights<U> const& weights, interleaved_projection<V> const& to,
                      call_site site = call_site::here()) {
  detail::expect_interleaved(to, weights, site);
  detail::each_interleaved(to, weights,
                           [](V& both, auto const& one) { both = static_cast<V>(one); });
}

}  // namespace moe::inline MOE_ABI
