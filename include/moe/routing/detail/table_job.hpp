// What the kernels of build_table are told, and how they read the pairs of a routing in rank order.
// Private to build_table.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Divides by the same number again and again: a multiplication and a shift.
class divisor {
 public:
  divisor() = default;
  /// @pre  1 <= by < 2^31.
  explicit constexpr divisor(std::uint32_t by) noexcept : by_(by) {
    while (std::uint64_t{1} << shift_ < by) ++shift_;
    shift_ += 31;
    factor_ = static_cast<std::uint32_t>(((std::uint64_t{1} << shift_) + by - 1) / by);
  }
  MOE_HOST_DEVICE constexpr std::uint32_t value() const noexcept { return by_; }
  /// n / value(): factor * value() exceeds 2^shift by less than 2^(shift - 31), which n times is nothing.
  /// @pre  n < 2^31.
  MOE_HOST_DEVICE constexpr std::uint32_t quotient(std::uint32_t n) const noexcept {
    return static_cast<std::uint32_t>(std::uint64_t{n} * factor_ >> shift_);
  }

 private:
  std::uint32_t by_ = 1, factor_ = 0, shift_ = 0;
};

/// C on the device: what `rows_of` gives, with all that the host can know of it done.
struct device_capacity {
  bool by_load = false;        ///< C = rows, or else
  std::uint32_t rows = 0;      ///< the least of this and the greatest load,
  std::uint32_t multiple = 1;  ///< rounded up.

  MOE_HOST_DEVICE constexpr std::uint32_t of(std::uint32_t max_load) const noexcept {
    if (!by_load) return rows;
    constexpr std::uint32_t most = 0x7fffffff;
    std::uint32_t C = max_load < rows ? max_load : rows;
    if (multiple > 1) C = (C + multiple - 1) / multiple * multiple;
    return C < most ? C : most;
  }
};

inline device_capacity capacity_on_device(capacity_rule rule, std::int64_t T, int E, int K,
                                          bool training) noexcept {
  device_capacity C{.by_load = !is_static(rule)};
  if (C.by_load) {
    C.multiple = static_cast<std::uint32_t>(rule.multiple);
    rule.multiple = 1;
  }
  C.rows = static_cast<std::uint32_t>(rows_of(rule, T, E, K, training, 0x7fffffff));
  return C;
}

/// Instead of a group: why a pair has none, and what is to be counted for it.
enum pair_fate : std::int32_t {
  dead = -1,          ///< No row, and counted elsewhere.
  dead_missing = -2,  ///< -2 - met_column
  dead_out_of_range = -3,
  dead_masked = -4,     ///< First pair of a token that is masked,
  dead_invalid = -5,    ///< or invalid.
  no_pair = -6,         ///< Of fewer than K choices, or beyond the end: not in the arrays.
  no_pair_masked = -7,  ///< The token has no pairs at all.
  no_pair_unsound = -8  ///< token_begin broke its rules.
};

/// Columns of a chunk's counts after those of its groups.
enum met_column {
  met_missing,
  met_out_of_range,
  met_masked,
  met_invalid,
  met_unsound,
  met_columns
};

/// What a kernel of build_table does; several in one launch if one block has all pairs.
enum table_phase : unsigned { phase_count = 1, phase_lay_out = 2, phase_place = 4 };

/// Pairs are numbered by *position*: x = t * K + j in token-major order, j * T + t in choice-major
/// order. So both orders, and any split of the positions into chunks, are walked alike.
struct table_job {
  // The routing.
  std::int32_t const* expert = nullptr;
  std::int32_t const* token_begin = nullptr;
  std::int32_t const* source = nullptr;
  std::uint8_t const* live = nullptr;
  std::uint64_t const* token_order = nullptr;  ///< As in pair_walk.
  std::uint32_t T = 0, K = 0, E = 0, sources = 1;
  std::uint32_t groups = 0;     ///< E * sources
  std::uint32_t positions = 0;  ///< T * K
  divisor inner;                ///< K, or T if choice_major.
  bool choice_major = false;
  divisor by_sources;

  // The rules.
  expert_map map{};
  layout rows = layout::packed;
  std::uint32_t align = 1;
  device_capacity capacity{};

  // The table.
  std::uint32_t segments = 0, max_rows = 0;
  std::int32_t *row_of = nullptr, *pair_of = nullptr, *begin = nullptr, *used = nullptr,
               *wanted = nullptr;
  table_counts* counts = nullptr;

  // The work.
  unsigned phases = 0;
  std::uint32_t chunk = 0;          ///< Positions of a block.
  std::int32_t* counted = nullptr;  ///< [counted_chunks,columns]: pairs by group, then met_column.
  std::uint32_t counted_chunks = 0;
  std::uint32_t counted_of_block = 1;  ///< Counted chunks that make up a block's.
  std::uint32_t columns = 0;           ///< groups + 4, or columns_of(groups)
  std::byte* counters = nullptr;       ///< Of each block, where they do not fit its shared memory.
  std::size_t counter_bytes = 0;

  // What later launches are told, in scratch: whether all pairs are refused; and of each group, for
  // overflow by priority: pairs that want it, pairs that it keeps, where its keys start or not_full.
  std::int32_t* refused = nullptr;
  std::uint32_t *load = nullptr, *keep = nullptr, *keys_of = nullptr;  // [groups]
  std::uint32_t* keys = nullptr;                                       // [positions]

  static constexpr std::uint32_t not_full = 0xffffffffu;

  MOE_HOST_DEVICE std::uint32_t expert_of(std::uint32_t g) const noexcept {
    return by_sources.quotient(g);
  }
  /// What row_of says of a pair of expert e that is not kept.
  MOE_HOST_DEVICE std::int32_t without_row(int e) const noexcept {
    return map.is_visible(e) ? no_row(map.kind_of(e)) : dropped_row;
  }
  /// Replicas that take rows for expert e.
  MOE_HOST_DEVICE std::uint32_t replicas(int e) const noexcept {
    bool const rows_here = map.is_visible(e) && map.kind_of(e) == expert_kind::computed;
    return rows_here ? static_cast<std::uint32_t>(map.replicas(e)) : 0u;
  }
  /// All pairs, however wrong token_begin is.
  MOE_HOST_DEVICE std::uint32_t pairs() const noexcept {
    if (token_begin == nullptr) return positions;
    std::int32_t const end = token_begin[T];
    return end < 0                                       ? 0
           : static_cast<std::uint32_t>(end) < positions ? static_cast<std::uint32_t>(end)
                                                         : positions;
  }
};

/// The row of the slot-th pair that a group keeps: slots go to its replicas in turn.
/// @pre  begin and used are written, by a launch before or by this block before sync().
MOE_HOST_DEVICE inline std::int32_t row_of_slot(table_job const& job, std::uint32_t g,
                                                std::uint32_t slot) noexcept {
  std::uint32_t const e = job.expert_of(g), s = g - e * job.sources;
  std::uint32_t const n = job.replicas(static_cast<int>(e));
  if (n == 0) return job.without_row(static_cast<int>(e));
  std::uint32_t const of_replica = n == 1 ? slot : slot / n;
  auto const p = static_cast<std::uint32_t>(
      job.map.replica(static_cast<int>(e), static_cast<int>(slot - of_replica * n)));
  std::uint32_t const q = p * job.sources + s;
  return of_replica < static_cast<std::uint32_t>(job.used[q])
             ? job.begin[q] + static_cast<std::int32_t>(of_replica)
             : dropped_row;
}

/// The token and choice at a position, before token_order.
struct token_choice {
  std::uint32_t t, j;
};
MOE_HOST_DEVICE constexpr token_choice at_position(table_job const& job, std::uint32_t x) noexcept {
  std::uint32_t const q = job.inner.quotient(x), r = x - q * job.inner.value();
  return job.choice_major ? token_choice{r, q} : token_choice{q, r};
}

/// Some pairs in the registers of a lane, at positions x, x + 32, ...
template <int Items>
struct pair_tile {
  std::int32_t group[Items];  ///< Or a pair_fate.
  std::uint32_t pair[Items];  ///< i, where there is one.
};

/// Reads the pairs at x, x + 32, ... below `last`, `rounds` at most. Step by step for all of them, so
/// that the loads of one step are under way together.
template <int Items>
MOE_HOST_DEVICE inline void load_pairs(table_job const& job, std::uint32_t x, std::uint32_t last,
                                       int rounds, pair_tile<Items>& tile) noexcept {
  std::uint32_t t[Items], j[Items], first[Items];
  std::int32_t of_token[Items], e[Items], fate[Items];
  MOE_UNROLL
  for (int k = 0; k < Items; ++k) {
    std::uint32_t const at = x + static_cast<std::uint32_t>(k * warp_size);
    bool const inside = k < rounds && at < last;
    token_choice const c = at_position(job, inside ? at : 0u);
    t[k] = c.t;
    j[k] = c.j;
    fate[k] = inside ? 0 : no_pair;
  }
  if (job.token_order != nullptr) {
    MOE_UNROLL
    for (int k = 0; k < Items; ++k)
      if (fate[k] == 0) t[k] = static_cast<std::uint32_t>(job.token_order[t[k]]);
  }
  MOE_UNROLL
  for (int k = 0; k < Items; ++k) first[k] = t[k] * job.K;
  if (job.token_begin != nullptr) {
    std::int32_t const pairs = job.token_begin[job.T];
    MOE_UNROLL
    for (int k = 0; k < Items; ++k)
      if (fate[k] == 0) {
        std::int32_t const i0 = job.token_begin[t[k]], i1 = job.token_begin[t[k] + 1];
        auto const room = static_cast<std::int32_t>(job.positions);
        bool const sound = may_be_pairs(i0, i1, static_cast<int>(job.K), pairs, t[k] == 0);
        first[k] = static_cast<std::uint32_t>(i0);
        if (!sound || i1 > room)
          fate[k] = no_pair_unsound;
        else if (j[k] >= static_cast<std::uint32_t>(i1 - i0))
          fate[k] = no_pair;
        if (fate[k] == no_pair && j[k] == 0 && job.live != nullptr && job.live[t[k]] == 0)
          fate[k] = no_pair_masked;
      }
  }
  MOE_UNROLL
  for (int k = 0; k < Items; ++k) {
    of_token[k] = fate[k] == 0 ? job.expert[first[k]] : 0;
    e[k] = fate[k] == 0 ? job.expert[first[k] + j[k]] : 0;
  }
  std::uint32_t masked = 0;  // bit k
  if (job.live != nullptr) {
    MOE_UNROLL
    for (int k = 0; k < Items; ++k)
      if (fate[k] == 0 && job.live[t[k]] == 0) masked |= 1u << k;
  }
  std::uint32_t s[Items] = {};
  if (job.source != nullptr) {
    MOE_UNROLL
    for (int k = 0; k < Items; ++k)
      if (fate[k] == 0) s[k] = static_cast<std::uint32_t>(job.source[t[k]]);
  }
  MOE_UNROLL
  for (int k = 0; k < Items; ++k) {
    std::int32_t group =
        static_cast<std::int32_t>(static_cast<std::uint32_t>(e[k]) * job.sources + s[k]);
    if (static_cast<std::uint32_t>(e[k]) >= job.E)
      group = e[k] == no_candidate ? dead_missing : dead_out_of_range;
    if (s[k] >= job.sources) group = dead_out_of_range;
    if (of_token[k] == invalid_token) group = j[k] == 0 ? dead_invalid : dead;
    if ((masked >> k & 1u) != 0) group = j[k] == 0 ? dead_masked : dead;
    tile.group[k] = fate[k] == 0 ? group : fate[k];
    tile.pair[k] = first[k] + j[k];
  }
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
