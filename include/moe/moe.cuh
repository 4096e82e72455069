// The whole library for the CPU and for CUDA.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/comm/device_exchange.cuh>
#include <moe/comm/hierarchical_all_to_all.cuh>
#include <moe/core/gpu.cuh>
#include <moe/dispatch/combine.cuh>
#include <moe/dispatch/dispatch.cuh>
#include <moe/gate/jitter.cuh>
#include <moe/gate/preset.cuh>
#include <moe/gate/project_and_route.cuh>
#include <moe/gate/route.cuh>
#include <moe/loss/gate_losses.cuh>
#include <moe/loss/importance.cuh>
#include <moe/loss/load_balance.cuh>
#include <moe/loss/z_loss.cuh>
#include <moe/moe.hpp>
#include <moe/routing/build_table.cuh>
#include <moe/routing/kept_weights.cuh>
#include <moe/routing/routing.cuh>
#include <moe/routing/routing_table.cuh>
#include <moe/routing/statistics.cuh>
