// Products of matrices by cuBLAS, in row-major terms: what baselines are made of.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cublas_v2.h>
#include <type_traits>

#include <moe/core/error.hpp>
#include <moe/core/gpu.cuh>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>

namespace moe_bench {

enum class transposed { none, left, right };

/// c = a b, a^T b or a b^T, of bf16, summed in float.
class matrix_products {
 public:
  matrix_products() { demand(cublasCreate(&handle_)); }
  matrix_products(matrix_products const&) = delete;
  ~matrix_products() { static_cast<void>(cublasDestroy(handle_)); }

  /// @tparam C  float or bf16.
  template <class C>
  void operator()(moe::gpu const& exec, transposed which, moe::matrix_view<moe::bf16> a,
                  moe::matrix_view<moe::bf16> b, moe::matrix_view<C> c) const {
    float const one = 1, zero = 0;
    auto const of_c = std::is_same_v<C, float> ? CUDA_R_32F : CUDA_R_16BF;
    auto const inner = which == transposed::right ? b.cols() : b.rows();
    demand(cublasSetStream(handle_, exec.stream()));
    demand(
        cublasSetWorkspace(handle_, workspace_.data(), workspace_.size()));  // gone with SetStream
    // cuBLAS takes rows for columns: it computes c^T = b^T a^T.
    demand(cublasGemmEx(
        handle_, which == transposed::right ? CUBLAS_OP_T : CUBLAS_OP_N,
        which == transposed::left ? CUBLAS_OP_T : CUBLAS_OP_N, static_cast<int>(c.cols()),
        static_cast<int>(c.rows()), static_cast<int>(inner), &one, b.data(), CUDA_R_16BF,
        static_cast<int>(b.ld()), a.data(), CUDA_R_16BF, static_cast<int>(a.ld()), &zero, c.data(),
        of_c, static_cast<int>(c.ld()), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  }

 private:
  static void demand(cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) throw moe::error("benchmark: cuBLAS failed");
  }

  moe::gpu_buffer workspace_{std::size_t{32} << 20};
  cublasHandle_t handle_ = nullptr;
};

}  // namespace moe_bench
