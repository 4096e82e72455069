// What the compiler offers: the only reader of compiler macros.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/version.hpp>

#if defined(__CUDACC__)
#define MOE_IS_CUDA 1
#define MOE_HOST_DEVICE __host__ __device__
#else
#define MOE_IS_CUDA 0
#define MOE_HOST_DEVICE
#endif
// Before a host-device function that calls a host-only one, for types that live on the host.
#if defined(__NVCC__)
#define MOE_NO_EXEC_CHECK _Pragma("nv_exec_check_disable")
#else
#define MOE_NO_EXEC_CHECK
#endif
// Whether this pass of the compiler makes code for a device, and what stands before a loop over an
// array that has to stay in registers there.
#if defined(__CUDA_ARCH__)
#define MOE_DEVICE_PASS 1
#define MOE_DEVICE_ARCH __CUDA_ARCH__
#define MOE_UNROLL _Pragma("unroll")
#else
#define MOE_DEVICE_PASS 0
#define MOE_DEVICE_ARCH 0
#define MOE_UNROLL
#endif

// The library tells NaN and infinities apart: -inf is "not a candidate", NaN is counted.
#if defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#error \
    "moe: -ffast-math / -ffinite-math-only remove the NaN and infinity tests this library needs; \
compile without them"
#endif
// Sums have an order that is part of the result. Only g++ tells; other compilers are trusted.
#if defined(__ASSOCIATIVE_MATH__)
#error \
    "moe: -ffast-math / -fassociative-math reorder the sums this library promises to reproduce; \
compile with -fno-associative-math"
#endif

// Instructions that inline bodies ask for by name, and what a waiting loop does between two looks.
#if defined(__AVX2__)
#define MOE_HAS_AVX2 1
#else
#define MOE_HAS_AVX2 0
#endif
#if defined(__SSE2__)
#define MOE_HAS_SSE2 1
#else
#define MOE_HAS_SSE2 0
#endif
#if defined(__x86_64__) || defined(__i386__)
#define MOE_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define MOE_PAUSE() asm volatile("yield")
#else
#define MOE_PAUSE() static_cast<void>(0)
#endif

// A store past the cache of a register x of floats, `to` aligned to it, and the fence that orders such
// stores before what follows. By builtins: <immintrin.h> takes as long to compile as half of moe.
#if MOE_HAS_SSE2
#if defined(__clang__)
#define MOE_STREAM(to, x) \
  __builtin_nontemporal_store(x, reinterpret_cast<std::remove_const_t<decltype(x)>*>(to))
#elif MOE_HAS_AVX2
#define MOE_STREAM(to, x) __builtin_ia32_movntps256(to, x)
#else
#define MOE_STREAM(to, x) __builtin_ia32_movntps(to, x)
#endif
#define MOE_STREAM_FENCE() __builtin_ia32_sfence()
#else
#define MOE_STREAM(to, x) static_cast<void>(__builtin_memcpy(to, &x, sizeof x))
#define MOE_STREAM_FENCE() static_cast<void>(0)
#endif

// Inline bodies depend on the instruction set, so its name is part of every symbol: translation
// units built with different -m flags link safely, and handing a type of one to a function of the
// other is a link error instead of an illegal instruction. A tag is a generation of machines, named
// by the first of them: it stands for any subset of the instructions that are new in it, but what
// bodies ask for by name, above, is the same in all of a tag.
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#if MOE_HAS_AVX2 && (defined(__AVX512FP16__) || defined(__AMX_TILE__) || defined(__AVX10_1__))
#define MOE_ABI abi_avx512_fp16
#elif defined(__AVX512BF16__)
#define MOE_ABI abi_avx512_bf16
#elif defined(__AVX512VBMI__) || defined(__AVX512VBMI2__) || defined(__AVX512IFMA__)
#define MOE_ABI abi_avx512_vbmi
#elif defined(__AVX512VNNI__)
#define MOE_ABI abi_avx512_vnni
#elif defined(__AVX512F__)
#define MOE_ABI abi_avx512
#elif defined(__AVXVNNI__)
#define MOE_ABI abi_avx2_vnni
#elif MOE_HAS_AVX2
#define MOE_ABI abi_avx2
#elif defined(__FMA__) || defined(__BMI2__)
#define MOE_ABI abi_fma
#elif defined(__AVX__) || defined(__F16C__) || defined(__BMI__)
#define MOE_ABI abi_avx
#elif defined(__SSE3__) || defined(__POPCNT__)
#define MOE_ABI abi_sse4
#elif MOE_HAS_SSE2
#define MOE_ABI abi_base
#else
#define MOE_ABI abi_i386
#endif
#elif defined(__aarch64__)
#if defined(__ARM_FEATURE_SVE2)
#define MOE_ABI abi_sve2
#elif defined(__ARM_FEATURE_SVE)
#define MOE_ABI abi_sve
#elif defined(__ARM_FEATURE_ATOMICS) || defined(__ARM_FEATURE_DOTPROD)
#define MOE_ABI abi_armv8_2
#else
#define MOE_ABI abi_base
#endif
#else
#define MOE_ABI abi_base
#endif

// Bytes of the vectors that kernels are written for: a function of MOE_ABI.
#if defined(__AVX512F__)
#define MOE_VECTOR_BYTES 64
#elif MOE_HAS_AVX2 || defined(__FMA__) || defined(__BMI2__) || defined(__AVX__) || \
    defined(__F16C__) || defined(__BMI__)
#define MOE_VECTOR_BYTES 32
#else
#define MOE_VECTOR_BYTES 16
#endif

// How many of them a processor of the tag has.
#if defined(__AVX512F__) || defined(__aarch64__)
#define MOE_VECTOR_REGISTERS 32
#else
#define MOE_VECTOR_REGISTERS 16
#endif

// Whether the flags have AVX-512; which of its extensions, kernels ask the processor.
#if defined(__AVX512F__) && !MOE_DEVICE_PASS
#define MOE_HAS_AVX512 1
#else
#define MOE_HAS_AVX512 0
#endif

// Between MOE_TARGET_... and MOE_TARGET_END functions are compiled for an instruction set that the flags
// may not have, to be called where the processor has it. By pragma, because templates, lambdas and what
// nvcc hands to g++ follow it; an attribute of functions reaches no lambda, and g++ cuts vectors of 32
// bytes in halves before it inlines. A function of MOE_ABI, as above; and of MOE_NO_TARGETS, which all of a
// program may define to have the kernels of its flags alone: a third of the time to compile them.
#if defined(__x86_64__) && !defined(__AVX512F__) && !MOE_DEVICE_PASS && !defined(MOE_NO_TARGETS)
#define MOE_HAS_TARGETS 1
#if defined(__clang__)
#define MOE_TARGET_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define MOE_TARGET_AVX512 \
  _Pragma(                \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,\" \
      \"fma,f16c\"))), apply_to = function)")
#define MOE_TARGET_END _Pragma("clang attribute pop")
#else
#define MOE_TARGET_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define MOE_TARGET_AVX512     \
  _Pragma("GCC push_options") \
      _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\")")
#define MOE_TARGET_END _Pragma("GCC pop_options")
#endif
#else
#define MOE_HAS_TARGETS 0
#endif
// Eight or sixteen half, as a vector of short, to float. Only for bodies that know that the processor can.
#if defined(__x86_64__)
#if defined(__clang__)
#define MOE_ALL_16 0xffff
#else
#define MOE_ALL_16 -1
#endif
#define MOE_WIDEN_HALF_8(x) __builtin_ia32_vcvtph2ps256(x)
#define MOE_WIDEN_HALF_16(x, zero) __builtin_ia32_vcvtph2ps512_mask(x, zero, MOE_ALL_16, 4)
#else
#define MOE_WIDEN_HALF_8(x) x
#define MOE_WIDEN_HALF_16(x, zero) x
#endif

// to = op(a, b) in vector registers, by the name of an instruction of x86-64: compilers do not agree on its
// builtin. MOE_DOT adds to `to`.
#if defined(__x86_64__)
#define MOE_INSTRUCTION(op, to, a, b) __asm__(op " %2, %1, %0" : "=v"(to) : "v"(a), "v"(b))
#define MOE_DOT(op, to, a, b) __asm__(op " %2, %1, %0" : "+v"(to) : "v"(a), "v"(b))
#else
#define MOE_INSTRUCTION(op, to, a, b) static_cast<void>(to)
#define MOE_DOT(op, to, a, b) static_cast<void>(to)
#endif

// For kernels whose accumulators must stay in registers: they are inlined whole.
#define MOE_ALWAYS_INLINE inline __attribute__((always_inline))
#define MOE_INLINE_LAMBDA __attribute__((always_inline))
