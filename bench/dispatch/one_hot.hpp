// Dispatch and combine as the first MoE layers did them: one-hot masks and dense products (GShard,
// "sec,sm->ecm" and "sec,ecm->sm"; DeepSpeed before slot maps).
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/routing/routing.hpp>

#if defined(MOE_BENCH_CBLAS)
#include <cblas.h>
#endif

namespace moe_bench {

/// C = A B for row-major A [m,k], B [k,n], C [m,n], without gaps. With a BLAS its sgemm, else tiles
/// of 4 rows and 2 vectors over packed panels of B. (A peer in a benchmark, not a product.)
inline void multiply(moe::cpu const& exec, float const* A, float const* B, float* C, std::int64_t m,
                     std::int64_t k, std::int64_t n) {
#if defined(MOE_BENCH_CBLAS)
  static_cast<void>(exec);  // The BLAS has threads of its own.
  cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, static_cast<int>(m), static_cast<int>(n),
              static_cast<int>(k), 1.0f, A, static_cast<int>(k), B, static_cast<int>(n), 0.0f, C,
              static_cast<int>(n));
#else
#if defined(__AVX__)
  constexpr std::int64_t lanes = 8;
#else
  constexpr std::int64_t lanes = 4;
#endif
  constexpr std::int64_t tile_rows = 4, tile_cols = 2 * lanes, depth = 256;
  typedef float lane_vector __attribute__((vector_size(lanes * sizeof(float))));
  exec.split(m, tile_rows, [&](std::int64_t first, std::int64_t last, int) {
    std::vector<lane_vector> panel(static_cast<std::size_t>(2 * depth));
    for (std::int64_t c = 0; c < n; c += tile_cols) {
      std::int64_t const cols = std::min(tile_cols, n - c);
      for (std::int64_t k0 = 0; k0 < k; k0 += depth) {
        std::int64_t const deep = std::min(depth, k - k0);
        std::fill(panel.begin(), panel.end(), lane_vector{});
        for (std::int64_t d = 0; d < deep; ++d)
          std::memcpy(&panel[static_cast<std::size_t>(2 * d)], B + (k0 + d) * n + c,
                      static_cast<std::size_t>(cols) * sizeof(float));
        for (std::int64_t r = first; r < last; r += tile_rows) {
          auto const row_of = [&](std::int64_t i) { return A + std::min(r + i, m - 1) * k + k0; };
          float const *const a0 = row_of(0), *const a1 = row_of(1);
          float const *const a2 = row_of(2), *const a3 = row_of(3);
          lane_vector s00{}, s01{}, s10{}, s11{}, s20{}, s21{}, s30{}, s31{};
          lane_vector const* b = panel.data();
          for (std::int64_t d = 0; d < deep; ++d, b += 2) {
            s00 += a0[d] * b[0], s01 += a0[d] * b[1];
            s10 += a1[d] * b[0], s11 += a1[d] * b[1];
            s20 += a2[d] * b[0], s21 += a2[d] * b[1];
            s30 += a3[d] * b[0], s31 += a3[d] * b[1];
          }
          lane_vector const tile[tile_rows][2] = {{s00, s01}, {s10, s11}, {s20, s21}, {s30, s31}};
          for (std::int64_t i = 0; i < tile_rows && r + i < last; ++i) {
            float row[tile_cols];
            std::memcpy(row, tile[i], sizeof row);
            float* const out = C + (r + i) * n + c;
            for (std::int64_t j = 0; j < cols; ++j) out[j] = k0 == 0 ? row[j] : out[j] + row[j];
          }
        }
      }
    }
  });
#endif
}

/// Holds the masks, in the layouts their products read from front to back.
class one_hot_movement {
 public:
  one_hot_movement(std::int64_t T, int E, std::int64_t C, std::int64_t M)
      : T_(T),
        C_(C),
        M_(M),
        slots_(E * C),
        taken_(static_cast<std::size_t>(E)),
        dispatch_(static_cast<std::size_t>(slots_ * T)),
        combine_(static_cast<std::size_t>(T * slots_)) {}

  /// A slot for each pair in the order of the tokens, none beyond C.
  void build_masks(moe::cpu const& exec, moe::routing const& r) {
    exec.split(slots_ * T_, 4096, [&](std::int64_t first, std::int64_t last, int) {
      std::fill(dispatch_.begin() + first, dispatch_.begin() + last, 0.0f);
      std::fill(combine_.begin() + first, combine_.begin() + last, 0.0f);
    });
    std::fill(taken_.begin(), taken_.end(), 0);
    for (std::int64_t i = 0; i < T_ * r.K; ++i) {
      std::int64_t const slot = taken_[static_cast<std::size_t>(r.expert[i])]++;
      if (slot >= C_) continue;
      std::int64_t const row = r.expert[i] * C_ + slot;
      std::int64_t const t = i / r.K;
      dispatch_[static_cast<std::size_t>(row * T_ + t)] = 1;
      combine_[static_cast<std::size_t>(t * slots_ + row)] = r.weight[i];
    }
  }
  void dispatch(moe::cpu const& exec, float const* tokens, float* rows) const {
    multiply(exec, dispatch_.data(), tokens, rows, slots_, T_, M_);
  }
  void combine(moe::cpu const& exec, float const* rows, float* out) const {
    multiply(exec, combine_.data(), rows, out, T_, slots_, M_);
  }
  /// Of both products.
  double flops() const {
    return 4 * static_cast<double>(T_) * static_cast<double>(slots_) * static_cast<double>(M_);
  }

 private:
  std::int64_t T_, C_, M_, slots_;
  std::vector<std::int64_t> taken_;
  std::vector<float> dispatch_;  // [E,C,T]
  std::vector<float> combine_;   // [T,E,C]
};

}  // namespace moe_bench
