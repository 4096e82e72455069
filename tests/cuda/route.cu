// Compiles the kernels that route, as CUDA, for the shapes of some routers.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/core/scalar.hpp>
#include <moe/gate/biased.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/group_limited.hpp>
#include <moe/gate/route_backward_kernel.hpp>
#include <moe/gate/route_kernel.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

#define MOE_TEST_ROUTE(gate, logit, ...)                                                           \
  template __global__ void moe::run_kernel(moe::route_kernel<gate, moe::row_home<__VA_ARGS__>>,    \
                                           moe::matrix_view<logit const>, std::int64_t,            \
                                           moe::routing, moe::matrix_view<float>, moe::gate_sums); \
  template __global__ void moe::run_kernel(                                                        \
      moe::route_backward_kernel<gate, moe::row_home<__VA_ARGS__>>, moe::matrix_view<logit const>, \
      std::int64_t, moe::routing, moe::matrix_view<float const>, moe::score_gradient<float>,       \
      moe::matrix_view<logit>)

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;
using qwen3 = moe::gate<moe::softmax, moe::top_k<8>, moe::renormalised>;
using any_k = moe::gate<moe::softmax, moe::top_k<16>, moe::renormalised>;
using sigmoid16 = moe::gate<moe::sigmoid, moe::top_k<16>, moe::scaled<moe::renormalised>>;

using deepseek_v3 = moe::gate<moe::sigmoid, moe::biased<moe::group_limited<moe::top_k<16>>>,
                              moe::scaled<moe::renormalised>>;
using deepseek_v4 =
    moe::gate<moe::sqrt_softplus, moe::biased<moe::top_k<16>>, moe::scaled<moe::renormalised>>;

// As `route` chooses them by E.
MOE_TEST_ROUTE(mixtral, float, 8, 1, 64);
MOE_TEST_ROUTE(qwen3, float, 64, 32, 512);
MOE_TEST_ROUTE(qwen3, float, 128, 32, 512, 65);
MOE_TEST_ROUTE(qwen3, moe::bf16, 256, 32, 512, 129);
MOE_TEST_ROUTE(sigmoid16, moe::half, 512, 32, 256, 257);
MOE_TEST_ROUTE(any_k, float, 4096, 256, 256, 513);
MOE_TEST_ROUTE(deepseek_v3, float, 256, 32, 512, 129);
MOE_TEST_ROUTE(deepseek_v4, moe::bf16, 256, 32, 512, 129);
