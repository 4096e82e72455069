// Compiles the kernels that combine, as CUDA. Never run: there was no GPU to run it on.
#include <moe/core/scalar.hpp>
#include <moe/dispatch/combine_kernel.hpp>

namespace moe {

#define MOE_INSTANTIATE_SUM(S, Vector, Batch)                                                  \
  template __global__ void run_kernel(combine_kernel<S, Vector, Batch>, matrix_view<S const>,  \
                                      detail::token_pairs, float const*, matrix_view<S const>, \
                                      detail::slices, bool, bool, matrix_view<S>)
#define MOE_INSTANTIATE(S, Vector)                                                                 \
  template __global__ void run_kernel(combine_backward_kernel<S, Vector>, matrix_view<S const>,    \
                                      matrix_view<S const>, detail::token_pairs, float const*,     \
                                      matrix_view<S const>, detail::padding, bool, matrix_view<S>, \
                                      float*, matrix_view<S>);                                     \
  MOE_INSTANTIATE_SUM(S, Vector, 8)

MOE_INSTANTIATE(float, 4);
MOE_INSTANTIATE(bf16, 8);
MOE_INSTANTIATE(half, 8);
MOE_INSTANTIATE(float, 1);
MOE_INSTANTIATE(bf16, 1);
MOE_INSTANTIATE(half, 1);
MOE_INSTANTIATE_SUM(float, 4, 2);
MOE_INSTANTIATE_SUM(bf16, 8, 2);
MOE_INSTANTIATE_SUM(half, 8, 2);

}  // namespace moe
