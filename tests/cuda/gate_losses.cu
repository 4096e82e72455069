// Compiles the kernels that make losses of a gate's sums, as CUDA.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/loss/gate_losses_kernel.hpp>

template __global__ void moe::run_kernel(moe::gate_balance_kernel<512>, moe::gate_sums,
                                         std::int64_t, int, bool, double, double, double*, float*);
template __global__ void moe::run_kernel(moe::gate_z_kernel, moe::gate_sums, double*);
