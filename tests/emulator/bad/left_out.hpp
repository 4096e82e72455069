// A kernel that no test runs.
// SPDX-License-Identifier: MIT
#pragma once

struct left_out_kernel {
  static constexpr int threads = 32;
};
