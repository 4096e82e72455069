// Wrong on purpose: asks the compiler, not config.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif
