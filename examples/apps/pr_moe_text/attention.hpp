// The example's own part of a transformer: norms and causal attention, forward and backward.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <moe/moe.hpp>

namespace pr_moe_text {

/// term(0) + ... + term(n - 1) in eight interleaved sums, so that the loop becomes vector code.
template <class V, class Term>
V sum_of(std::int64_t n, Term const& term) {
  V lane[8] = {};
  std::int64_t j = 0;
  for (; j + 8 <= n; j += 8)
    for (int l = 0; l < 8; ++l) lane[l] += term(j + l);
  for (int l = 0; l < 8 && j + l < n; ++l) lane[l] += term(j + l);
  return ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
}
template <class V>
V dot(V const* a, V const* b, std::int64_t n) {
  return sum_of<V>(n, [=](std::int64_t j) { return a[j] * b[j]; });
}

/// to += a[0] x[0] + ... + a[3] x[3], n elements each.
template <class V>
void add_four(std::int64_t n, V const (&a)[4], V const* __restrict x0, V const* __restrict x1,
              V const* __restrict x2, V const* __restrict x3, V* __restrict to) {
  for (std::int64_t j = 0; j < n; ++j)
    to[j] += a[0] * x0[j] + a[1] * x1[j] + a[2] * x2[j] + a[3] * x3[j];
}
/// to = the sum over k in [first, last) of a(k) x(k), n elements each; four at a time, so that `to`
/// is read and written a quarter as often.
template <class V, class Factor, class Row>
void sum_multiples(std::int64_t first, std::int64_t last, Factor const& a, Row const& x,
                   std::int64_t n, V* to) {
  std::fill(to, to + n, V(0));
  std::int64_t k = first;
  for (; k + 4 <= last; k += 4)
    add_four(n, {a(k), a(k + 1), a(k + 2), a(k + 3)}, x(k), x(k + 1), x(k + 2), x(k + 3), to);
  for (; k < last; ++k) {
    V const factor = a(k), *const row = x(k);
    for (std::int64_t j = 0; j < n; ++j) to[j] += factor * row[j];
  }
}

/// y = x / rms(x) * gain, row by row.
template <class V>
struct rms_norm {
  static constexpr V epsilon = V(1e-5);

  static V inverse_rms(V const* x, std::int64_t M) {
    return V(1) / std::sqrt(dot(x, x, M) / V(M) + epsilon);
  }

  static void forward(moe::cpu const& exec, moe::matrix_view<V const> x, V const* gain,
                      moe::matrix_view<V> y) {
    exec.split(x.rows(), 64, [&](std::int64_t first, std::int64_t last, int) {
      for (std::int64_t t = first; t < last; ++t) {
        V const r = inverse_rms(x.row(t), x.cols());
        for (std::int64_t m = 0; m < x.cols(); ++m) y(t, m) = x(t, m) * r * gain[m];
      }
    });
  }

  /// dx += the gradient of x; dgain += that of the gain, summed over blocks of fixed size.
  static void backward(moe::cpu const& exec, moe::matrix_view<V const> x, V const* gain,
                       moe::matrix_view<V const> dy, moe::matrix_view<V> dx, V* dgain,
                       std::vector<V>& partial) {
    std::int64_t const M = x.cols(), block = 256, blocks = (x.rows() + block - 1) / block;
    partial.assign(static_cast<std::size_t>(blocks * M), V(0));
    exec.each(blocks, [&](std::int64_t b, int) {
      V* const sums = partial.data() + b * M;
      for (std::int64_t t = b * block; t < std::min(x.rows(), (b + 1) * block); ++t) {
        V const r = inverse_rms(x.row(t), M);
        V mean = 0;
        for (std::int64_t m = 0; m < M; ++m) {
          sums[m] += dy(t, m) * x(t, m) * r;
          mean += dy(t, m) * gain[m] * x(t, m);
        }
        V const shrink = mean * r * r * r / V(M);
        for (std::int64_t m = 0; m < M; ++m) dx(t, m) += dy(t, m) * gain[m] * r - x(t, m) * shrink;
      }
    });
    for (std::int64_t b = 0; b < blocks; ++b)
      for (std::int64_t m = 0; m < M; ++m) dgain[m] += partial[static_cast<std::size_t>(b * M + m)];
  }
};

/// Causal attention of `heads` heads over windows of S tokens, on projections that are made elsewhere.
template <class V>
struct attention {
  std::int64_t S = 0;  // tokens of a window
  int heads = 1;
  std::int64_t D = 0;  // width of a head

  /// qkv [T, 3 heads D] -> mixed [T, heads D]; p [T heads, S] keeps the probabilities for backward.
  void forward(moe::cpu const& exec, moe::matrix_view<V const> qkv, moe::matrix_view<V> p,
               moe::matrix_view<V> mixed, std::vector<V>& rooms) const {
    V const scale = V(1) / std::sqrt(V(D));
    each_head(exec, qkv.rows(), rooms, [&](std::int64_t t0, std::int64_t h, V* room) {
      V* const keys = room;  // [D,S]: so that loops run over tokens
      transpose(qkv, t0, (heads + h) * D, keys);
      for (std::int64_t i = 0; i < S; ++i) {
        std::int64_t const n = i + 1;  // tokens that this one sees
        V const* const q = qkv.row(t0 + i) + h * D;
        V* const score = p.row((t0 + i) * heads + h);  // [S]
        sum_multiples(
            0, D, [&](std::int64_t d) { return q[d] * scale; },
            [&](std::int64_t d) { return keys + d * S; }, n, score);
        V const highest = *std::max_element(score, score + n);
        for (std::int64_t j = 0; j < n; ++j) score[j] = moe::exp(score[j] - highest);
        V const share = V(1) / sum_of<V>(n, [=](std::int64_t j) { return score[j]; });
        for (std::int64_t j = 0; j < n; ++j) score[j] *= share;
        sum_multiples(
            0, n, [&](std::int64_t j) { return score[j]; },
            [&](std::int64_t j) { return qkv.row(t0 + j) + (2 * heads + h) * D; }, D,
            mixed.row(t0 + i) + h * D);
      }
    });
  }

  /// dqkv is written.
  void backward(moe::cpu const& exec, moe::matrix_view<V const> qkv, moe::matrix_view<V const> p,
                moe::matrix_view<V const> dmixed, moe::matrix_view<V> dqkv,
                std::vector<V>& rooms) const {
    V const scale = V(1) / std::sqrt(V(D));
    each_head(exec, qkv.rows(), rooms, [&](std::int64_t t0, std::int64_t h, V* room) {
      V *const values = room, *const dscores = values + D * S;  // [D,S], [S,S]
      transpose(qkv, t0, (2 * heads + h) * D, values);
      auto const query = [&](std::int64_t i) { return qkv.row(t0 + i) + h * D; };
      auto const key = [&](std::int64_t j) { return qkv.row(t0 + j) + (heads + h) * D; };
      auto const prob = [&](std::int64_t i) { return p.row((t0 + i) * heads + h); };
      auto const dout = [&](std::int64_t i) { return dmixed.row(t0 + i) + h * D; };
      for (std::int64_t i = 0; i < S; ++i) {
        std::int64_t const n = i + 1;
        V* const ds = dscores + i * S;
        sum_multiples(
            0, D, [&](std::int64_t d) { return dout(i)[d]; },
            [&](std::int64_t d) { return values + d * S; }, n, ds);
        V const mean = dot(prob(i), static_cast<V const*>(ds), n);
        for (std::int64_t j = 0; j < n; ++j) ds[j] = prob(i)[j] * (ds[j] - mean) * scale;
        sum_multiples(
            0, n, [&](std::int64_t j) { return ds[j]; }, key, D, dqkv.row(t0 + i) + h * D);
      }
      for (std::int64_t j = 0; j < S; ++j) {
        sum_multiples(
            j, S, [&](std::int64_t i) { return dscores[i * S + j]; }, query, D,
            dqkv.row(t0 + j) + (heads + h) * D);
        sum_multiples(
            j, S, [&](std::int64_t i) { return prob(i)[j]; }, dout, D,
            dqkv.row(t0 + j) + (2 * heads + h) * D);
      }
    });
  }

 private:
  /// Calls f(first token, head, room) for each head of each window, room being [D,S] and [S,S] values.
  template <class F>
  void each_head(moe::cpu const& exec, std::int64_t T, std::vector<V>& rooms, F const& f) const {
    std::int64_t const room = D * S + S * S;
    rooms.resize(static_cast<std::size_t>(exec.threads() * room));
    exec.each(T / S * heads, [&](std::int64_t task, int member) {
      f(task / heads * S, task % heads, rooms.data() + member * room);
    });
  }

  void transpose(moe::matrix_view<V const> qkv, std::int64_t t0, std::int64_t first, V* out) const {
    for (std::int64_t j = 0; j < S; ++j)
      for (std::int64_t d = 0; d < D; ++d) out[d * S + j] = qkv(t0 + j, first + d);
  }
};

}  // namespace pr_moe_text
