// Compiles the kernels that weigh kept pairs and measure routers, as CUDA.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/routing/kept_weights.cuh>
#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>
#include <moe/routing/statistics.cuh>

template __global__ void moe::run_kernel(moe::weigh_kept_kernel<float, 256>, moe::kept_weights,
                                         moe::routing_table, float const*, float*);
template __global__ void moe::run_kernel(moe::weigh_kept_backward_kernel<float, 256>,
                                         moe::kept_weights, moe::routing_table, float const*,
                                         float const*, float*);
template __global__ void moe::run_kernel(moe::physical_loads_kernel<128>, moe::routing_table,
                                         std::int32_t*);
template __global__ void moe::run_kernel(moe::measure_load_kernel<256>, std::int32_t const*,
                                         std::int64_t, moe::load_statistics*);
template __global__ void moe::run_kernel(moe::measure_scores_kernel<float, 256>, moe::routing,
                                         moe::matrix_view<float const>, moe::detail::score_sums*);
template __global__ void moe::run_kernel(moe::mean_scores_kernel<256>,
                                         moe::detail::score_sums const*, std::int64_t,
                                         moe::score_statistics*);
template __global__ void moe::run_kernel(moe::count_co_activation_kernel<float, 256>, moe::routing,
                                         moe::matrix_view<std::int64_t>);
