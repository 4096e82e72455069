// The whole library for the CPU and for CUDA.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/gpu.cuh>
#include <moe/moe.hpp>
