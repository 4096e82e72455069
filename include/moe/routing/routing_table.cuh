// A routing table in the memory of a device.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// As `carve_table(from, shape)`, of memory that kernels see, which exec.fill clears.
template <kernel_executor X>
routing_table carve_table(X const& exec, memory& from, table_shape const& shape,
                          call_site site = call_site::here()) {
  static_assert(dropped_row == -1);
  routing_table const table = detail::take_table(from, shape, site);
  auto const fill = [&](auto* array, int byte, std::int64_t count) {
    exec.fill(array, byte, static_cast<std::size_t>(count) * sizeof *array, site);
  };
  fill(table.row_of, 0xff, shape.T * shape.K);
  fill(table.pair_of, 0xff, shape.max_rows);
  fill(table.begin, 0, std::int64_t{table.segments()} + 1);
  fill(table.used, 0, table.segments());
  fill(table.wanted, 0, shape.E);
  fill(table.counts, 0, 1);
  return table;
}

}  // namespace moe::inline MOE_ABI
