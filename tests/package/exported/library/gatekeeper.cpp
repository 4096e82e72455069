// SPDX-License-Identifier: MIT
#include "gatekeeper.hpp"

int version_of_moe() {
  return MOE_VERSION;
}
