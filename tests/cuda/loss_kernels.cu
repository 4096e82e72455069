// Compiles the kernels of the losses, as CUDA.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/core/scalar.hpp>
#include <moe/loss/importance_kernel.hpp>
#include <moe/loss/load_balance_kernel.hpp>
#include <moe/loss/z_loss_kernel.hpp>

using scores = moe::matrix_view<float const>;
using thresholds = moe::vector_view<float const>;

template __global__ void moe::run_kernel(moe::load_sums_kernel<256>, scores, moe::routing,
                                         moe::load_balance_rule, double*);
template __global__ void moe::run_kernel(moe::detail::finish_sums_kernel<256>, double*,
                                         std::int64_t, std::int64_t,
                                         moe::detail::finish_load_balance);
template __global__ void moe::run_kernel(moe::detail::finish_sums_kernel<256>, double*,
                                         std::int64_t, std::int64_t,
                                         moe::detail::finish_load_balance_backward<float>);
template __global__ void moe::run_kernel(moe::z_sums_kernel<256>, scores, moe::batch, double*);
template __global__ void moe::run_kernel(moe::z_sums_kernel<256>, moe::matrix_view<moe::bf16 const>,
                                         moe::batch, double*);
template __global__ void moe::run_kernel(moe::z_backward_kernel<256>, scores, moe::batch, double,
                                         moe::matrix_view<float>, std::int64_t, double const*);
template __global__ void moe::run_kernel(moe::importance_sums_kernel<256>, scores, thresholds,
                                         double, moe::batch, double*);
template __global__ void moe::run_kernel(moe::detail::finish_sums_kernel<256>, double*,
                                         std::int64_t, std::int64_t,
                                         moe::detail::finish_importance);
template __global__ void moe::run_kernel(moe::detail::finish_sums_kernel<256>, double*,
                                         std::int64_t, std::int64_t,
                                         moe::detail::finish_importance_backward);
template __global__ void moe::run_kernel(moe::importance_backward_kernel<256>, scores, thresholds,
                                         double, moe::batch, moe::matrix_view<float>,
                                         moe::vector_view<float>, double const*);
