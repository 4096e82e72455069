// Tables and shapes that the kernels of dispatch and combine run on in the emulator.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <doctest/doctest.h>

#include "dispatch/movement_forms.hpp"
#include "emulator/emulated_gpu.hpp"

namespace moe_test {

/// Tables with and without padding, drops, empty experts, tokens of different numbers of pairs.
inline constexpr table_case emulated_cases[] = {
    {.T = 0, .K = 2, .E = 4},
    {.T = 1, .K = 1, .E = 1},
    {.T = 5, .K = 2, .E = 5, .align = 4},
    {.T = 4, .K = 8, .E = 9, .dropped = 0.4},
    {.T = 3, .K = 16, .E = 17, .align = 3, .dropped = 0.1},
    {.T = 6, .K = 11, .E = 12, .align = 3, .dropped = 0.1, .variable = true},
    {.T = 3, .K = 2, .E = 3, .dropped = 1},
};
inline constexpr table_case emulated_kind_cases[] = {
    {.T = 4, .K = 6, .E = 11, .align = 8, .dropped = 0.2, .kinds = true},
    {.T = 5, .K = 9, .E = 10, .dropped = 0.5, .kinds = true, .variable = true},
};

/// Columns, and where they are: rows that move in vectors, and such that do not.
struct emulated_shape {
  std::int64_t M;
  placing at;
};
inline constexpr emulated_shape emulated_shapes[] = {
    {8, {}},      {1, {}},       {3, {1, 0}}, {7, {1, 1}},    {33, {}},
    {64, {0, 1}}, {40, {16, 8}}, {8, {1, 0}}, {264, {8, 16}}, {0, {}},
};

/// Calls f(case, shape) for some of all pairs: each case and each shape with several others.
template <class F>
void for_emulated_cases(F const& f) {
  int n = 0;
  auto const run = [&](table_case const& c, emulated_shape const& shape) {
    if ((has_thread_sanitizer || has_address_sanitizer) && n++ % 3 != 0) return;
    CAPTURE(c.T);
    CAPTURE(c.K);
    CAPTURE(shape.M);
    CAPTURE(shape.at.skew);
    f(c, shape);
  };
  for (table_case const& c : emulated_cases)
    for (emulated_shape const& shape : emulated_shapes) run(c, shape);
  for (table_case const& c : emulated_kind_cases)
    for (emulated_shape const& shape : emulated_shapes) run(c, shape);
}

}  // namespace moe_test
