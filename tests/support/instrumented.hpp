// How hard the tests try in builds that sanitizers or coverage slow down.
// SPDX-License-Identifier: MIT
#pragma once

namespace moe_test {

/// A tenth of the random cases of a law, because there each is many times slower: instrumented builds
/// look for what no result shows, the plain build for wrong results.
#if defined(MOE_TEST_INSTRUMENTED)
inline constexpr bool instrumented = true;
#else
inline constexpr bool instrumented = false;
#endif
constexpr int cases(int n) {
  return instrumented ? n / 10 : n;
}

}  // namespace moe_test
