// Where work runs on the CPU: the executor, and the team that most programs give it.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/cpu.hpp>
#include <moe/core/thread_team.hpp>
