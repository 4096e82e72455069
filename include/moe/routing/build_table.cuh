// Build_table on a GPU: the same tables, index for index, by the same rules; sizes stay on the device.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/build_table.hpp>
#include <moe/routing/build_table_kernel.hpp>
#include <moe/routing/detail/group_counters.hpp>
#include <moe/routing/detail/table_launches.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch that build_table needs for any routing within `shape` and any rules.
/// About 20 bytes for each pair, and 4 for each segment and multiprocessor.
/// @pre  shape has T >= 0, K, E, sources >= 1.
template <kernel_executor X>
std::size_t build_table_scratch(X const& exec, table_shape const& shape) noexcept {
  constexpr int threads = threads_of<X>(detail::table_threads);
  return detail::gpu_table_scratch(shape, threads, detail::tile_of<threads>, exec.processors());
}

namespace detail {

/// A lane for each choice of a token.
inline void expect_few_choices(int K, call_site site) {
  expects(K <= max_choices, "build_table: K <= 16 on a GPU", site, {{"K", K}});
}

}  // namespace detail

/// As for `cpu`: the same table, index for index. All arrays, those of in, map and table too, are on the
/// device, `table.counts` with them; the host knows bounds only, so that arrays of pairs are to be
/// given if T * K > 0. Counts of a gate, in in.chunk_counts, spare a kernel where they serve.
///
/// What the CPU refuses by looking at arrays is counted here: if the map names a physical expert
/// twice or none for a visible computed expert, or token_begin does not rise from 0 by at most K to
/// at most T * K, then no pair has a row, counts->refused is the number of all pairs, and the other
/// counts, begin, used and wanted are 0.
/// @throws precondition_error as for `cpu`, of what the host can see; and if K > 16, with token_begin, too.
/// @note  Enqueues one kernel for up to 2048 pairs, two for more, or three if the map has replicas or
///        full experts keep pairs by priority, which takes another two; batch_prioritised, four
///        before them, or eight.
///        Allocates nothing, waits for nothing. Integer atomics only to check a map of replicas.
template <kernel_executor X, class V>
void build_table(X const& exec, basic_routing<V> const& in, table_rules const& rules,
                 expert_map const& map, memory scratch, routing_table& table,
                 call_site site = call_site::here()) {
  bool const by_score = rules.when_full == overflow::score;
  bool const ranked = rules.when_full == overflow::batch_prioritised;
  detail::expect_few_choices(in.K, site);
  detail::check_table_arguments(in, in.T * in.K, rules, map, table, by_score || ranked, site);
  detail::gpu_table_build<X> build{exec, scratch, site};
  build.describe(in, rules, map, table);
  if (ranked) build.rank_tokens(in);
  bool const overflows =
      (by_score || rules.when_full == overflow::random) && !detail::drops_nothing(rules.cap);
  if (!overflows && map.physical_begin == nullptr)
    return build.build(detail::first_come{}, build.usable_counts(in));
  V const* const score = in.score != nullptr ? in.score : in.weight;
  build.build_by(detail::rule_priority<V>{by_score ? score : nullptr, in.tokens}, overflows,
                 build.usable_counts(in));
}

/// As above, without an expert map.
template <kernel_executor X, class V>
void build_table(X const& exec, basic_routing<V> const& in, table_rules const& rules,
                 memory scratch, routing_table& table, call_site site = call_site::here()) {
  build_table(exec, in, rules, expert_map{}, scratch, table, site);
}

/// As above, with a user's rule for full experts in place of rules.when_full.
/// @param priority  As for `cpu`, and callable on the device: a trivially copyable function object
///                  whose operator() is MOE_HOST_DEVICE.
template <kernel_executor X, class V, overflow_rule<routed_pair<V>> Overflow>
void build_table(X const& exec, basic_routing<V> const& in, table_rules const& rules,
                 Overflow const& priority, expert_map const& map, memory scratch,
                 routing_table& table, call_site site = call_site::here()) {
  static_assert(std::is_trivially_copyable_v<Overflow>);
  detail::expect_few_choices(in.K, site);
  detail::check_table_arguments(in, in.T * in.K, rules, map, table, false, site);
  detail::gpu_table_build<X> build{exec, scratch, site};
  build.describe(in, rules, map, table);
  build.build_by(detail::user_priority<V, Overflow>{priority, in.weight, in.score, in.tokens}, true,
                 build.usable_counts(in));
}

/// As above, without an expert map.
template <kernel_executor X, class V, overflow_rule<routed_pair<V>> Overflow>
void build_table(X const& exec, basic_routing<V> const& in, table_rules const& rules,
                 Overflow const& priority, memory scratch, routing_table& table,
                 call_site site = call_site::here()) {
  build_table(exec, in, rules, priority, expert_map{}, scratch, table, site);
}

}  // namespace moe::inline MOE_ABI
