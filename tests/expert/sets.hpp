// Every instruction set that this machine can run, and vectors of 512 bits on any machine.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/expert/instruction_sets.hpp>

// The compiler cuts vectors that the processor lacks in pieces: slow, but the logic is that of AVX-512.
// Nothing but these functions sees them, so it does not matter how they are passed. Ignored to the end of
// the file, because compilers warn when they instantiate.
#pragma GCC diagnostic ignored "-Wpsabi"
namespace moe::inline MOE_ABI::detail::wide {
using namespace gemm;
using namespace packed;
inline constexpr int vector_bytes = 64, registers = 32;
inline constexpr bool has_f16c = false;
}  // namespace moe::inline MOE_ABI::detail::wide
#define MOE_KERNELS wide
#include <moe/expert/detail/kernels.inc>
#undef MOE_KERNELS

namespace moe_test {

struct wide_set {
  static constexpr char const* name = "wide";
  static bool available() noexcept { return true; }
  template <class V>
  static moe::detail::gemm::gemm_kernels<V> const& gemm() noexcept {
    return moe::detail::wide::gemm_table<V>;
  }
  template <class W, class Rows, class Activation>
  static moe::detail::packed::kernels<W, Rows, Activation> const& packed() noexcept {
    return moe::detail::wide::packed_table<W, Rows, Activation, moe::detail::packed::dots::floats>;
  }
};

/// Calls f(set) for each set that can run here.
template <class F>
void for_each_set(F const& f) {
  auto const call = [&](auto set) {
    if (decltype(set)::available()) f(set);
  };
  call(moe::plain_set{});
#if MOE_HAS_TARGETS
  call(moe::avx2_set{});
  call(moe::avx512_set{});
  call(moe::best_set{});
#endif
#if !defined(MOE_TEST_INSTRUMENTED)  // sanitizers would take minutes to compile it
  call(wide_set{});
#endif
}

}  // namespace moe_test
