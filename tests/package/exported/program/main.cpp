// SPDX-License-Identifier: MIT
#include <gatekeeper.hpp>

int main() {
  return version_of_moe() == MOE_VERSION && MOE_VERSION == MOE_EXPECTED_VERSION ? 0 : 1;
}
