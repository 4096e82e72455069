// The version of the library; the one place that holds it (CMake reads this file).
// SPDX-License-Identifier: MIT
#pragma once

#define MOE_VERSION_MAJOR 0
#define MOE_VERSION_MINOR 1
#define MOE_VERSION_PATCH 0
#define MOE_VERSION (MOE_VERSION_MAJOR * 10000 + MOE_VERSION_MINOR * 100 + MOE_VERSION_PATCH)

static_assert(MOE_VERSION_MINOR < 100 && MOE_VERSION_PATCH < 100);
