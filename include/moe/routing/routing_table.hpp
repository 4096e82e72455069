// The dense routing table: index arrays that say which row of which expert a choice became.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/routing/expert_map.hpp>

namespace moe::inline MOE_ABI {

/// Stands in row_of where a pair has no row. `no_row(kind)` is that of an expert that is not computed.
inline constexpr std::int32_t dropped_row = -1;
MOE_HOST_DEVICE constexpr std::int32_t no_row(expert_kind kind) noexcept {
  return -1 - static_cast<std::int32_t>(kind);
}

/// What became of the pairs and tokens of a table. For a routing of `pairs` pairs:
/// pairs = kept + uncomputed + dropped + beyond_max_rows + hidden + missing + out_of_range +
///         the pairs of masked and of invalid tokens.
struct table_counts {
  std::int64_t rows = 0;             ///< N: rows of the table, padding included.
  std::int64_t capacity = 0;         ///< C: rows that one segment may take.
  std::int64_t kept = 0;             ///< Pairs that have a row.
  std::int64_t uncomputed = 0;       ///< Pairs at zero, copy, constant and shared experts.
  std::int64_t dropped = 0;          ///< Pairs over the capacity of their expert.
  std::int64_t beyond_max_rows = 0;  ///< Pairs whose row would be at or after max_rows.
  std::int64_t hidden = 0;           ///< Pairs at an expert that the map hides.
  std::int64_t missing = 0;          ///< Pairs without a candidate (expert = no_candidate).
  std::int64_t out_of_range = 0;     ///< Pairs whose expert id or whose token's source is no id.
  std::int64_t masked_tokens = 0;    ///< Tokens with live = 0.
  std::int64_t invalid_tokens = 0;   ///< Tokens whose logits held NaN or +inf.
};

/// The bounds of a table, known before any token is routed.
struct table_shape {
  std::int64_t T = 0;         ///< Most tokens.
  int K = 0;                  ///< Most choices of a token.
  int E = 0;                  ///< Logical experts.
  int P = 0;                  ///< Physical experts; 0 = E.
  int sources = 1;            ///< Source segments of each expert.
  std::int64_t max_rows = 0;  ///< Most rows, padding included; see `max_rows`.
};

/// Rows and pairs refer to each other: for each pair with row_of[i] = r >= 0, pair_of[r] = i.
///
/// Segment q = p * sources + s holds the rows that physical expert p takes from source s: used[q]
/// rows from begin[q], in rank order; rows up to begin[q + 1] are padding (pair_of = -1).
/// One table serves dispatch, combine and both backwards. Arrays are the caller's.
struct routing_table {
  std::int64_t T = 0, max_rows = 0;
  int K = 0, E = 0, P = 0, sources = 1;
  std::int32_t* row_of = nullptr;             ///< [T*K]: a row, or dropped_row, or no_row(kind).
  std::int32_t const* token_begin = nullptr;  ///< [T+1], or null = K pairs each; the routing's.
  std::int32_t* pair_of = nullptr;            ///< [max_rows]: the pair of a row, -1 = padding.
  std::int32_t* begin = nullptr;              ///< [P*sources+1]
  std::int32_t* used = nullptr;               ///< [P*sources]
  std::int32_t* wanted = nullptr;             ///< [E]: pairs that chose an expert, before dropping.
  table_counts* counts = nullptr;             ///< [1]

  MOE_HOST_DEVICE constexpr std::int64_t first_pair(std::int64_t t) const noexcept {
    return token_begin != nullptr ? token_begin[t] : t * K;
  }
  MOE_HOST_DEVICE constexpr std::int64_t pairs() const noexcept { return first_pair(T); }
  MOE_HOST_DEVICE constexpr int segments() const noexcept { return P * sources; }
};

/// A routing table that owns its arrays, for one shape. Not copyable; build_table fills it.
class table_buffer : public routing_table {
 public:
  /// @throws precondition_error unless T >= 0, 1 <= K <= 16, E >= 1, sources >= 1, and pairs, rows
  ///         and segments fit 32-bit ids.
  explicit table_buffer(table_shape const& shape, call_site site = call_site::here());

 private:
  std::vector<std::int32_t> ids_;
  std::vector<table_counts> result_;
};

}  // namespace moe::inline MOE_ABI
