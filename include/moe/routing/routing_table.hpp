// The dense routing table: index arrays that say which row of which expert a choice became.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {

/// Stands in row_of where a pair has no row. `no_row(kind)` is that of an expert that is not computed.
inline constexpr std::int32_t dropped_row = -1;
MOE_HOST_DEVICE constexpr std::int32_t no_row(expert_kind kind) noexcept {
  return -1 - static_cast<std::int32_t>(kind);
}

/// What became of the pairs and tokens of a table. For a routing of `pairs` pairs:
/// pairs = kept + uncomputed + dropped + beyond_max_rows + hidden + missing + out_of_range +
///         refused + the pairs of masked and of invalid tokens.
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
  std::int64_t invalid_tokens = 0;   ///< Live tokens whose first choice is `invalid_token`.
  /// All pairs, if the expert map or token_begin broke the rules of build_table: none has a row then.
  /// On a GPU only, where a kernel cannot throw.
  std::int64_t refused = 0;

  friend constexpr bool operator==(table_counts const&, table_counts const&) = default;
};

/// The bounds of a table, known before any token is routed.
struct table_shape {
  std::int64_t T = 0;         ///< Most tokens.
  int K = 0;                  ///< Most choices of a token: 16, or E where experts choose.
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
///
/// The bounds that the arrays were made for stand in `room`; build_table sets T, K, E and P to those
/// of the routing, so that one table serves batches of any size up to that.
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
  table_shape room{};                         ///< What the arrays have room for.
  /// Whether no expert is of another kind than `computed`: set by build_table from its map.
  bool computed_only = true;

  MOE_HOST_DEVICE constexpr std::int64_t first_pair(std::int64_t t) const noexcept {
    return token_begin != nullptr ? token_begin[t] : t * K;
  }
  MOE_HOST_DEVICE constexpr std::int64_t pairs() const noexcept { return first_pair(T); }
  MOE_HOST_DEVICE constexpr int segments() const noexcept { return P * sources; }
};

/// Rows that a table of these rules and bounds can need, padding included: what `max_rows` of a
/// table_shape should be. shape.max_rows itself is not read.
///
/// packed: T * K, or what all segments may take if that is less. aligned: the padding of each
/// segment that can be in use besides. padded: P * sources * C, where C is the greater of training
/// and evaluation. A capacity that depends on the load is bounded by T rows in a segment: no gate
/// gives a token the same expert twice. A user's routing that does may need more; what does not
/// fit is counted in `beyond_max_rows`. The bound holds for routings of fewer tokens and choices, but
/// of exactly E experts: a capacity grows when they become fewer.
/// @pre  shape has T >= 0, K, E, sources >= 1; rules.align >= 1.
inline std::int64_t max_rows(table_rules const& rules, table_shape const& shape) noexcept {
  std::int64_t const segments =
      static_cast<std::int64_t>(shape.P == 0 ? shape.E : shape.P) * shape.sources;
  std::int64_t const pairs = shape.T * shape.K;
  std::int64_t const C = std::max(rows_of(rules.cap, shape.T, shape.E, shape.K, true, shape.T),
                                  rows_of(rules.cap, shape.T, shape.E, shape.K, false, shape.T));
  if (rules.rows == layout::padded) return segments * C;
  std::int64_t const packed = is_static(rules.cap) ? std::min(pairs, segments * C) : pairs;
  if (rules.rows == layout::packed) return packed;
  return packed + std::min(segments, packed) * (rules.align - 1);
}

namespace detail {

inline void check_table_shape(table_shape const& shape, call_site site) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max() - 1;
  expects(
      shape.T >= 0 && shape.K >= 1 && shape.K <= std::max(max_choices, shape.E) && shape.E >= 1 &&
          shape.P >= 0 && shape.sources >= 1 && shape.max_rows >= 0,
      "routing table: T >= 0, E >= 1, 1 <= K <= max(16, E), P >= 0, sources >= 1, max_rows >= 0",
      site,
      {{"T", shape.T},
       {"K", shape.K},
       {"E", shape.E},
       {"P", shape.P},
       {"sources", shape.sources},
       {"max_rows", shape.max_rows}});
  int const P = shape.P == 0 ? shape.E : shape.P;
  expects(shape.T <= most / shape.K && shape.max_rows <= most &&
              std::max(P, shape.E) <= most / shape.sources,
          "routing table: T * K, max_rows, E * sources and P * sources fit 32-bit ids", site,
          {{"T", shape.T},
           {"K", shape.K},
           {"E", shape.E},
           {"P", P},
           {"sources", shape.sources},
           {"max_rows", shape.max_rows}});
}

}  // namespace detail

/// Bytes that `carve_table` takes.
/// @pre  As for carve_table.
inline std::size_t table_bytes(table_shape const& shape) noexcept {
  std::int64_t const P = shape.P == 0 ? shape.E : shape.P;
  return memory_size()
      .add<std::int32_t>(shape.T * shape.K)
      .add<std::int32_t>(shape.max_rows)
      .add<std::int32_t>(P * shape.sources + 1)
      .add<std::int32_t>(P * shape.sources)
      .add<std::int32_t>(shape.E)
      .add<table_counts>(1)
      .bytes();
}

namespace detail {

/// Arrays of a table, as they come.
inline routing_table take_table(memory& from, table_shape const& shape, call_site site) {
  check_table_shape(shape, site);
  int const P = shape.P == 0 ? shape.E : shape.P;
  char const* const enough = "carve_table: memory holds table_bytes(shape)";
  auto const ids = [&](std::int64_t count) { return from.take<std::int32_t>(count, enough, site); };
  routing_table table;
  table.T = shape.T;
  table.max_rows = shape.max_rows;
  table.K = shape.K;
  table.E = shape.E;
  table.P = P;
  table.sources = shape.sources;
  table.room = shape;
  table.room.P = P;
  table.row_of = ids(shape.T * shape.K);
  table.pair_of = ids(shape.max_rows);
  table.begin = ids(table.segments() + 1);
  table.used = ids(table.segments());
  table.wanted = ids(shape.E);
  table.counts = from.take<table_counts>(1, enough, site);
  return table;
}

}  // namespace detail

/// An empty table, whose pairs have no rows, with its arrays in the caller's memory.
///
/// @param from  Gives table_bytes(shape) bytes: the arrays are taken from it.
/// @throws precondition_error unless T >= 0, E >= 1, 1 <= K <= max(16, E), P >= 0, sources >= 1, and
///         pairs, rows and segments fit 32-bit ids, and from is large enough.
inline routing_table carve_table(memory& from, table_shape const& shape,
                                 call_site site = call_site::here()) {
  routing_table const table = detail::take_table(from, shape, site);
  std::fill_n(table.row_of, shape.T * shape.K, dropped_row);
  std::fill_n(table.pair_of, shape.max_rows, -1);
  std::fill_n(table.begin, table.segments() + 1, 0);
  std::fill_n(table.used, table.segments(), 0);
  std::fill_n(table.wanted, shape.E, 0);
  *table.counts = {};
  return table;
}

/// The same; a GPU has an overload of its own.
inline routing_table carve_table(cpu const&, memory& from, table_shape const& shape,
                                 call_site site = call_site::here()) {
  return carve_table(from, shape, site);
}

/// A routing table that owns its arrays, for one shape. Not copyable; build_table fills it.
class table_buffer : public routing_table {
 public:
  /// @throws precondition_error as carve_table does.
  explicit table_buffer(table_shape const& shape, call_site site = call_site::here()) {
    detail::check_table_shape(shape, site);
    bytes_ = buffer(table_bytes(shape));
    memory from = bytes_;
    static_cast<routing_table&>(*this) = carve_table(from, shape, site);
  }

 private:
  buffer bytes_;
};

}  // namespace moe::inline MOE_ABI
