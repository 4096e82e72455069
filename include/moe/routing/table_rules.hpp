// The rules by which a routing becomes a table: layout, order, capacity, overflow. Run-time values.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/routing/capacity.hpp>

namespace moe::inline MOE_ABI {

/// How the rows of one segment (expert, source) follow those of the one before.
enum class layout {
  packed,  ///< No padding: a segment starts where the last one ended (CSR).
  padded,  ///< Every segment has C rows, used or not.
  aligned  ///< A segment starts at the next multiple of `align`.
};

/// Which pair ranks before which inside an expert.
enum class order {
  token_major,  ///< By token, then by choice.
  choice_major  ///< All first choices by token, then all second ones, ... (DeepSpeed top-2, Tutel).
};

/// Which pairs an expert keeps when more than C want it. Kept pairs take slots in rank order.
enum class overflow {
  position,          ///< The first C in rank order.
  score,             ///< The C of highest `routing::rank_score`, compared as float.
  random,            ///< The C of highest random number, drawn for (token id, expert).
  batch_prioritised  ///< The first C by falling best score of the token, inside each choice if the
                     ///< order is choice_major; ranks follow that priority, too. (Riquelme et al.,
                     ///< "Scaling vision with sparse mixture of experts", 2021.)
};

/// Everything build_table must be told besides the routing.
struct table_rules {
  layout rows = layout::packed;
  order rank = order::token_major;
  capacity_rule cap{};
  overflow when_full = overflow::position;
  int align = 1;  ///< layout::aligned: rows per multiple.
};

}  // namespace moe::inline MOE_ABI
