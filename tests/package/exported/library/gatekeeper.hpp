// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/version.hpp>

int version_of_moe();
