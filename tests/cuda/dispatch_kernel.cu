// Compiles the kernels that dispatch, as CUDA. Never run: there was no GPU to run it on.
#include <moe/core/scalar.hpp>
#include <moe/dispatch/dispatch_kernel.hpp>

namespace moe {

template <class S, int Vector, bool Weighted>
using dispatch_body = dispatch_kernel<S, Vector, Weighted>;

#define MOE_INSTANTIATE(S, Vector)                                                               \
  template __global__ void run_kernel(dispatch_body<S, Vector, false>, matrix_view<S const>,     \
                                      detail::token_pairs, float const*, detail::padding,        \
                                      detail::slices, bool, matrix_view<S>);                     \
  template __global__ void run_kernel(dispatch_body<S, Vector, true>, matrix_view<S const>,      \
                                      detail::token_pairs, float const*, detail::padding,        \
                                      detail::slices, bool, matrix_view<S>);                     \
  template __global__ void run_kernel(dispatch_backward_kernel<S, Vector>, matrix_view<S const>, \
                                      matrix_view<S const>, detail::token_pairs, float const*,   \
                                      bool, bool, matrix_view<S>, float*)

MOE_INSTANTIATE(float, 4);
MOE_INSTANTIATE(bf16, 8);
MOE_INSTANTIATE(half, 8);
MOE_INSTANTIATE(float, 1);
MOE_INSTANTIATE(bf16, 1);
MOE_INSTANTIATE(half, 1);

}  // namespace moe
