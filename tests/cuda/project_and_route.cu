// Compiles the kernel that multiplies by the router and routes, as CUDA.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/core/scalar.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/project_and_route_kernel.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

#define MOE_TEST_PROJECT(gate, scalar, E)                                                      \
  template __global__ void moe::run_kernel(                                                    \
      moe::project_and_route_kernel<gate, moe::row_home<E, 32, 256, E / 4>>,                   \
      moe::matrix_view<scalar const>, moe::matrix_view<scalar const>, moe::router_split, bool, \
      float*, std::int32_t*, moe::routing, moe::matrix_view<float>, moe::matrix_view<float>)

using qwen3 = moe::gate<moe::softmax, moe::top_k<8>, moe::renormalised>;
using any_k = moe::gate<moe::sigmoid, moe::top_k<16>, moe::scaled<moe::renormalised>>;

MOE_TEST_PROJECT(qwen3, moe::bf16, 64);
MOE_TEST_PROJECT(qwen3, moe::half, 256);
MOE_TEST_PROJECT(qwen3, float, 256);
MOE_TEST_PROJECT(any_k, moe::bf16, 512);
