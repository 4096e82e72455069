// Compiles the kernel that routes, as CUDA, for the shapes of some routers.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/core/scalar.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/gate_kernel.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;

template __global__ void moe::run_kernel(moe::gate_kernel<mixtral, 8, 8>,
                                         moe::matrix_view<float const>, int, moe::routing,
                                         moe::matrix_view<float>, std::int32_t*);
template __global__ void moe::run_kernel(moe::gate_kernel<mixtral, 256, 32>,
                                         moe::matrix_view<moe::bf16 const>, int, moe::routing,
                                         moe::matrix_view<float>, std::int32_t*);
template __global__ void moe::run_kernel(moe::gate_kernel<mixtral, 4096, 256, 256>,
                                         moe::matrix_view<float const>, int, moe::routing,
                                         moe::matrix_view<float>, std::int32_t*);
