// The roofs of products: multiply-adds in registers, and reading memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/expert/instruction_sets.hpp>

#define MOE_KERNELS plain
#include "support/probes.inc"
#undef MOE_KERNELS
#if MOE_HAS_TARGETS
MOE_TARGET_AVX2
#define MOE_KERNELS avx2
#include "support/probes.inc"
#undef MOE_KERNELS
MOE_TARGET_END
MOE_TARGET_AVX512
#define MOE_KERNELS avx512
#include "support/probes.inc"
#undef MOE_KERNELS
MOE_TARGET_END
#endif

namespace moe_bench {

struct probe_of_set {
  float (*run)(std::int64_t steps);
  double flop;  ///< of one step
  float (*read)(float const* from, std::int64_t n);
};

/// The probes of the set that the kernels of `best_set` are of.
inline probe_of_set fma_probe() {
  namespace kernels = moe::detail;
#if MOE_HAS_TARGETS
  if (moe::avx512_set::available())
    return {&avx512::multiply_add, 2.0 * avx512::sums * kernels::avx512::lanes<float>,
            &avx512::read_memory};
  if (moe::avx2_set::available())
    return {&avx2::multiply_add, 2.0 * avx2::sums * kernels::avx2::lanes<float>,
            &avx2::read_memory};
#endif
  return {&plain::multiply_add, 2.0 * plain::sums * kernels::plain::lanes<float>,
          &plain::read_memory};
}

}  // namespace moe_bench
