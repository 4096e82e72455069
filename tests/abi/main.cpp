// Objects that were compiled for different instruction sets work in one program.
// SPDX-License-Identifier: MIT
#include <iostream>

#include "use.hpp"

int main() {
  if (use_base() != 0) return 1;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::cout << "skipped: this processor has no AVX2 and FMA\n";
    return 77;
  }
  return use_fma() + use_avx2();
}
