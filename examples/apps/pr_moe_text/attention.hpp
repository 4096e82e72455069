// The example's own part of a transformer: norms and causal attention, forward and backward.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include <moe/moe.hpp>

namespace pr_moe_text {

/// y = x / rms(x) * gain, row by row.
template <class V>
struct rms_norm {
  static constexpr V epsilon = V(1e-5);

  static V inverse_rms(V const* x, std::int64_t M) {
    V squares = 0;
    for (std::int64_t m = 0; m < M; ++m) squares += x[m] * x[m];
    return V(1) / std::sqrt(squares / V(M) + epsilon);
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

  /// Values that one member works in.
  std::int64_t room() const { return 2 * D * S + 2 * S; }

  /// qkv [T, 3 heads D] -> mixed [T, heads D]; p [T heads, S] keeps the probabilities for backward.
  void forward(moe::cpu const& exec, moe::matrix_view<V const> qkv, moe::matrix_view<V> p,
               moe::matrix_view<V> mixed, std::vector<V>& rooms) const {
    rooms.resize(static_cast<std::size_t>(exec.threads() * room()));
    std::int64_t const windows = qkv.rows() / S;
    V const scale = V(1) / std::sqrt(V(D));
    exec.each(windows * heads, [&](std::int64_t task, int member) {
      std::int64_t const t0 = task / heads * S, h = task % heads;
      V* const keys = rooms.data() + member * room();  // [D,S]: so that loops run over tokens
      transpose(qkv, t0, (heads + h) * D, keys);
      for (std::int64_t i = 0; i < S; ++i) {
        V const* const q = qkv.row(t0 + i) + h * D;
        V* const score = p.row((t0 + i) * heads + h);  // [S]
        std::fill(score, score + S, V(0));
        for (std::int64_t d = 0; d < D; ++d)
          for (std::int64_t j = 0; j <= i; ++j) score[j] += q[d] * scale * keys[d * S + j];
        V const highest = *std::max_element(score, score + i + 1);
        V total = 0;
        for (std::int64_t j = 0; j <= i; ++j) score[j] = moe::exp(score[j] - highest);
        for (std::int64_t j = 0; j <= i; ++j) total += score[j];
        V* const out = mixed.row(t0 + i) + h * D;
        std::fill(out, out + D, V(0));
        for (std::int64_t j = 0; j <= i; ++j) {
          score[j] /= total;
          V const* const value = qkv.row(t0 + j) + (2 * heads + h) * D;
          for (std::int64_t d = 0; d < D; ++d) out[d] += score[j] * value[d];
        }
      }
    });
  }

  /// dqkv is written.
  void backward(moe::cpu const& exec, moe::matrix_view<V const> qkv, moe::matrix_view<V const> p,
                moe::matrix_view<V const> dmixed, moe::matrix_view<V> dqkv,
                std::vector<V>& rooms) const {
    rooms.resize(static_cast<std::size_t>(exec.threads() * room()));
    std::int64_t const windows = qkv.rows() / S;
    V const scale = V(1) / std::sqrt(V(D));
    exec.each(windows * heads, [&](std::int64_t task, int member) {
      std::int64_t const t0 = task / heads * S, h = task % heads;
      V* const values = rooms.data() + member * room();  // [D,S]
      V* const ds = values + D * S;                      // [S]
      transpose(qkv, t0, (2 * heads + h) * D, values);
      for (std::int64_t i = 0; i < S; ++i)
        for (std::int64_t part = 0; part < 3; ++part) {
          V* const zero = dqkv.row(t0 + i) + (part * heads + h) * D;
          std::fill(zero, zero + D, V(0));
        }
      for (std::int64_t i = 0; i < S; ++i) {
        V const* const prob = p.row((t0 + i) * heads + h);
        V const* const dout = dmixed.row(t0 + i) + h * D;
        std::fill(ds, ds + S, V(0));
        for (std::int64_t d = 0; d < D; ++d)
          for (std::int64_t j = 0; j <= i; ++j) ds[j] += dout[d] * values[d * S + j];
        V mean = 0;
        for (std::int64_t j = 0; j <= i; ++j) mean += prob[j] * ds[j];
        V const* const q = qkv.row(t0 + i) + h * D;
        V* const dq = dqkv.row(t0 + i) + h * D;
        for (std::int64_t j = 0; j <= i; ++j) {
          V const dscore = prob[j] * (ds[j] - mean) * scale;
          V const* const key = qkv.row(t0 + j) + (heads + h) * D;
          V* const dkey = dqkv.row(t0 + j) + (heads + h) * D;
          V* const dvalue = dqkv.row(t0 + j) + (2 * heads + h) * D;
          for (std::int64_t d = 0; d < D; ++d) dq[d] += dscore * key[d];
          for (std::int64_t d = 0; d < D; ++d) dkey[d] += dscore * q[d];
          for (std::int64_t d = 0; d < D; ++d) dvalue[d] += prob[j] * dout[d];
        }
      }
    });
  }

 private:
  void transpose(moe::matrix_view<V const> qkv, std::int64_t t0, std::int64_t first, V* out) const {
    for (std::int64_t j = 0; j < S; ++j)
      for (std::int64_t d = 0; d < D; ++d) out[d * S + j] = qkv(t0 + j, first + d);
  }
};

}  // namespace pr_moe_text
