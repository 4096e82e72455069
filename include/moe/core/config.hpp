// What the compiler offers: the only reader of compiler macros.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/version.hpp>

#if defined(__CUDACC__)
#define MOE_HOST_DEVICE __host__ __device__
// Before a host-device function that calls a host-only one, for types that live on the host.
#define MOE_NO_EXEC_CHECK _Pragma("nv_exec_check_disable")
#else
#define MOE_HOST_DEVICE
#define MOE_NO_EXEC_CHECK
#endif

// The library tells NaN and infinities apart: -inf is "not a candidate", NaN is counted.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error "moe: -ffast-math / -ffinite-math-only remove the NaN and infinity tests this library needs; \
compile with -fno-finite-math-only"
#endif

// Inline bodies depend on the instruction set, so its name is part of every symbol: translation
// units built with different -m flags link safely, and handing a type of one to a function of the
// other is a link error instead of an illegal instruction. MOE_VECTOR_BYTES is the width of its
// registers.
#if defined(__AVX512F__)
#define MOE_ABI abi_avx512
#define MOE_VECTOR_BYTES 64
#elif defined(__AVX2__) && defined(__FMA__)
#define MOE_ABI abi_avx2
#define MOE_VECTOR_BYTES 32
#elif defined(__AVX__)
#define MOE_ABI abi_avx
#define MOE_VECTOR_BYTES 32
#else
#define MOE_ABI abi_base
#define MOE_VECTOR_BYTES 16
#endif

// Kernels whose accumulators must stay in registers are inlined whole.
#define MOE_ALWAYS_INLINE inline __attribute__((always_inline))
