// Compiles the kernel of jitter, as CUDA.
// Never run: there was no GPU to run it on.
#include <moe/core/scalar.hpp>
#include <moe/gate/jitter_kernel.hpp>

template __global__ void moe::run_kernel(moe::jitter_kernel<256>, moe::matrix_view<float const>,
                                         float, moe::batch, moe::matrix_view<float>);
template __global__ void moe::run_kernel(moe::jitter_kernel<256>, moe::matrix_view<moe::bf16 const>,
                                         float, moe::batch, moe::matrix_view<moe::bf16>);
