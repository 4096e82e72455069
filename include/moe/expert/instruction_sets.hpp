// Instruction sets that the kernels of experts are compiled for; the processor chooses at run time.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include <moe/core/config.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/detail/gemm_shapes.hpp>
#include <moe/expert/detail/packed_shapes.hpp>
#include <moe/expert/segments.hpp>

#if MOE_HAS_TARGETS
#include <cpuid.h>
#endif

// What kernels may ask about the instruction set they are compiled for. Constants, so that the bodies
// need no macro but the name of their namespace.
namespace moe::inline MOE_ABI::detail {

namespace plain {
using namespace gemm;
using namespace packed;
inline constexpr int vector_bytes = MOE_VECTOR_BYTES, registers = MOE_VECTOR_REGISTERS;
inline constexpr bool has_f16c = MOE_VECTOR_BYTES == 64;
}  // namespace plain
namespace avx2 {
using namespace gemm;
using namespace packed;
inline constexpr int vector_bytes = 32, registers = 16;
inline constexpr bool has_f16c = true;
}  // namespace avx2
namespace avx512 {
using namespace gemm;
using namespace packed;
inline constexpr int vector_bytes = 64, registers = 32;
inline constexpr bool has_f16c = true;
}  // namespace avx512

}  // namespace moe::inline MOE_ABI::detail

#define MOE_KERNELS plain
#include <moe/expert/detail/kernels.inc>
#undef MOE_KERNELS
#if MOE_HAS_TARGETS
MOE_TARGET_AVX2
#define MOE_KERNELS avx2
#include <moe/expert/detail/kernels.inc>
#undef MOE_KERNELS
MOE_TARGET_END
MOE_TARGET_AVX512
#define MOE_KERNELS avx512
#include <moe/expert/detail/kernels.inc>
#undef MOE_KERNELS
MOE_TARGET_END
#endif

namespace moe::inline MOE_ABI {

#if MOE_HAS_TARGETS || MOE_HAS_AVX512
namespace detail {
inline bool has_avx512vnni() noexcept {
  return __builtin_cpu_supports("avx512vnni");
}
inline bool has_avx512bf16() noexcept {
  return __builtin_cpu_supports("avx512bf16");
}
}  // namespace detail
#endif

/// The instructions that the compiler's flags allow: always there. Of AVX-512's extensions, those that the
/// processor has, which changes no bit.
struct plain_set {
  static constexpr char const* name = "plain";
  static bool available() noexcept { return true; }
  template <class V>
  static detail::gemm::gemm_kernels<V> const& gemm() noexcept {
    return detail::plain::gemm_table<V>;
  }
  template <class W, class Rows, class Activation>
  static detail::packed::kernels<W, Rows, Activation> const& packed() noexcept {
    using detail::packed::dots;
#if MOE_HAS_AVX512
    if constexpr (std::is_same_v<Rows, int8_blocks>) {
      if (detail::has_avx512vnni())
        return detail::plain::packed_table<W, Rows, Activation, dots::quads>;
      if (__builtin_cpu_supports("avx512bw"))
        return detail::plain::packed_table<W, Rows, Activation, dots::pairs>;
    }
    if constexpr (std::is_same_v<Rows, bf16>)
      if (detail::has_avx512bf16())
        return detail::plain::packed_table<W, Rows, Activation, dots::pairs>;
#endif
    return detail::plain::packed_table<W, Rows, Activation, dots::floats>;
  }
};

#if MOE_HAS_TARGETS
namespace detail {
/// dpbusd without AVX-512; clang 14 has no name for it.
inline bool has_avxvnni() noexcept {
  static bool const has = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
  }();
  return has;
}
}  // namespace detail

/// AVX2, FMA and F16C, whatever the flags; and AVX-VNNI where it is, which changes no bit.
struct avx2_set {
  static constexpr char const* name = "avx2";
  static bool available() noexcept {
    // Every processor with AVX2 has F16C, for which clang 14 has no test.
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
  template <class V>
  static detail::gemm::gemm_kernels<V> const& gemm() noexcept {
    return detail::avx2::gemm_table<V>;
  }
  template <class W, class Rows, class Activation>
  static detail::packed::kernels<W, Rows, Activation> const& packed() noexcept {
    using detail::packed::dots;
    if constexpr (!std::is_same_v<Rows, int8_blocks>)
      return detail::avx2::packed_table<W, Rows, Activation, dots::floats>;
    else if (detail::has_avxvnni())
      return detail::avx2::packed_table<W, Rows, Activation, dots::quads>;
    else
      return detail::avx2::packed_table<W, Rows, Activation, dots::pairs>;
  }
};

/// AVX-512 F, BW, DQ and VL, whatever the flags; and where they are VNNI, which changes no bit, and BF16,
/// which takes subnormal numbers for 0.
struct avx512_set {
  static constexpr char const* name = "avx512";
  static bool available() noexcept {
    return avx2_set::available() && __builtin_cpu_supports("avx512f") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
  template <class V>
  static detail::gemm::gemm_kernels<V> const& gemm() noexcept {
    return detail::avx512::gemm_table<V>;
  }
  template <class W, class Rows, class Activation>
  static detail::packed::kernels<W, Rows, Activation> const& packed() noexcept {
    using detail::packed::dots;
    if constexpr (std::is_same_v<Rows, int8_blocks>)
      return detail::has_avx512vnni()
                 ? detail::avx512::packed_table<W, Rows, Activation, dots::quads>
                 : detail::avx512::packed_table<W, Rows, Activation, dots::pairs>;
    if constexpr (std::is_same_v<Rows, bf16>)
      if (detail::has_avx512bf16())
        return detail::avx512::packed_table<W, Rows, Activation, dots::pairs>;
    return detail::avx512::packed_table<W, Rows, Activation, dots::floats>;
  }
};
#else
// Not x86-64, or MOE_NO_TARGETS, or the flags have AVX-512 anyway.
using avx2_set = plain_set;
using avx512_set = plain_set;
#endif

/// The widest set that the processor has, found once. Results of two sets differ in their last bits:
/// a wider one adds in another order where products are summed in lanes, and `plain_set` may have no
/// fused multiply-add. Who needs the same bits on different machines names a set.
struct best_set {
  static constexpr char const* name = "best";
  static bool available() noexcept { return true; }
  template <class V>
  static detail::gemm::gemm_kernels<V> const& gemm() noexcept {
    static auto const& best =
        choose([](auto set) -> auto const& { return set.template gemm<V>(); });
    return best;
  }
  template <class W, class Rows, class Activation>
  static detail::packed::kernels<W, Rows, Activation> const& packed() noexcept {
    static auto const& best =
        choose([](auto set) -> auto const& { return set.template packed<W, Rows, Activation>(); });
    return best;
  }

 private:
  template <class F>
  static auto const& choose(F const& f) noexcept {
    if (avx512_set::available()) return f(avx512_set{});
    if (avx2_set::available()) return f(avx2_set{});
    return f(plain_set{});
  }
};

}  // namespace moe::inline MOE_ABI
