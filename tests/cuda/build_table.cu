// Compiles the kernels that build routing tables, as CUDA.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/routing/build_table.cuh>
#include <moe/routing/build_table_kernel.hpp>
#include <moe/routing/overflow_kernel.hpp>

using moe::detail::rule_priority;
using moe::detail::table_job;

template __global__ void moe::run_kernel(
    moe::build_table_kernel<1024, 256, moe::detail::first_come>, table_job);
template __global__ void moe::run_kernel(moe::build_table_kernel<0, 256, moe::detail::first_come>,
                                         table_job);
template __global__ void moe::run_kernel(moe::build_table_kernel<1024, 256, rule_priority<float>>,
                                         table_job);
template __global__ void moe::run_kernel(moe::build_table_kernel<0, 256, rule_priority<float>>,
                                         table_job);
template __global__ void moe::run_kernel(moe::select_slots_kernel<256>, table_job);
template __global__ void moe::run_kernel(moe::settle_pairs_kernel<256>, table_job);
template __global__ void moe::run_kernel(moe::sort_tokens_kernel<float, 256>, moe::routing,
                                         std::uint64_t const*, std::uint64_t*, int, unsigned,
                                         std::uint32_t, std::int32_t*, std::uint32_t);
