// Compiles the kernel that adds rows, as CUDA.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/comm/add_rows_kernel.hpp>
#include <moe/core/scalar.hpp>

template __global__ void moe::run_kernel(moe::add_rows_kernel<float, 4, 256>, float const*,
                                         std::int64_t, float*);
template __global__ void moe::run_kernel(moe::add_rows_kernel<float, 1, 256>, float const*,
                                         std::int64_t, float*);
template __global__ void moe::run_kernel(moe::add_rows_kernel<moe::bf16, 8, 256>, moe::bf16 const*,
                                         std::int64_t, moe::bf16*);
template __global__ void moe::run_kernel(moe::add_rows_kernel<moe::half, 8, 256>, moe::half const*,
                                         std::int64_t, moe::half*);
template __global__ void moe::run_kernel(moe::add_rows_kernel<moe::detail::row_count, 1, 256>,
                                         moe::detail::row_count const*, std::int64_t,
                                         moe::detail::row_count*);
