// A user's program: the package gives headers, the language level and threads.
// SPDX-License-Identifier: MIT
#if __has_include(<moe/moe.hpp>)
#include <moe/moe.hpp>
#else
#include <moe/core/config.hpp>
#endif

#include <thread>

int main() {
  int found = 0;
  std::thread([&] { found = MOE_VERSION; }).join();
  return found == MOE_EXPECTED_VERSION ? 0 : 1;
}
