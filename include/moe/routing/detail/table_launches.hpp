// The launches of one call of build_table on a GPU: how pairs are split, and which kernels follow one
// another. Private to build_table.cuh.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/random.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/build_table_kernel.hpp>
#include <moe/routing/capacity.hpp>
#include <moe/routing/detail/group_counters.hpp>
#include <moe/routing/detail/table_build.hpp>
#include <moe/routing/detail/table_job.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/overflow_kernel.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// How pairs or tokens are split into chunks, one for each block.
struct table_chunks {
  std::uint32_t size = 0;  ///< A multiple of `unit`.
  std::uint32_t blocks = 1;

  /// More chunks mean more counts to sum up, by every block, fewer mean more pairs for each. A block
  /// has time for two tiles while another kernel would start, and a device for eight megabytes of
  /// counts. Guesses, never timed.
  table_chunks(std::int64_t n, std::int64_t unit, std::uint32_t tile, std::int64_t columns,
               int processors) {
    std::int64_t const tiles = (n + tile - 1) / tile;
    std::int64_t most = processors;
    while (most > 32 && most * most * columns > 2 << 20) --most;
    std::int64_t const chunks = tiles <= 2 ? 1 : std::min(tiles, most);
    std::int64_t const least = (n + chunks - 1) / chunks;
    size = static_cast<std::uint32_t>(std::max<std::int64_t>((least + unit - 1) / unit, 1) * unit);
    blocks = static_cast<std::uint32_t>(std::max<std::int64_t>((n + size - 1) / size, 1));
  }

  /// A bound of `blocks`.
  static std::int64_t bound(std::int64_t n, std::uint32_t tile, int processors) {
    return std::min<std::int64_t>(n / tile + 1, std::max(processors, 1));
  }
};

/// The priorities of `rules.when_full`.
template <class V>
struct rule_priority {
  V const* score;  ///< By which pairs rank; null: random.
  batch tokens;

  MOE_HOST_DEVICE float operator()(std::int64_t i, std::int64_t t, int, int e) const {
    return score != nullptr
               ? static_cast<float>(score[i])
               : uniform(tokens.at(t), stream::overflow, static_cast<std::uint32_t>(e));
  }
};

/// A user's.
template <class V, class Overflow>
struct user_priority {
  Overflow priority;
  V const *weight, *score;
  batch tokens;

  MOE_HOST_DEVICE float operator()(std::int64_t i, std::int64_t t, int j, int e) const {
    routed_pair<V> pair{.token = tokens.at(t), .choice = j, .expert = e};
    if (weight != nullptr) pair.weight = weight[i];
    pair.score = score != nullptr ? score[i] : pair.weight;
    return static_cast<float>(priority(pair));
  }
};

/// Groups whose counters shared memory has room for; those of more lie in scratch.
inline constexpr int shared_groups = 1024;
/// Of a block: with more, each does less, and the steps that all go through take longer. A guess.
inline constexpr int table_threads = 256;

template <kernel_executor X>
struct gpu_table_build {
  X const& exec;
  memory scratch;
  call_site site;
  table_job job{};

  template <class T>
  T* take(std::int64_t count) {
    return scratch.take<T>(count, "build_table: scratch of build_table_scratch(exec, shape) bytes",
                           site);
  }

  /// The counts of a gate, if they are of these groups, in this order of tokens, and aligned.
  template <class V>
  pair_counts usable_counts(basic_routing<V> const& in) const {
    pair_counts const& given = in.chunk_counts;
    bool const usable = given.chunk >= 1 && given.chunk <= in.T &&
                        given.chunks == (in.T + given.chunk - 1) / given.chunk &&
                        job.sources == 1 && !job.choice_major && job.token_begin == nullptr &&
                        job.token_order == nullptr && job.groups % 4 == 0 &&
                        reinterpret_cast<std::uintptr_t>(given.counts) % 16 == 0;
    return usable ? given : pair_counts{};
  }

  template <class V>
  void describe(basic_routing<V> const& in, table_rules const& rules, expert_map const& map,
                routing_table& table) {
    table.T = in.T;
    table.K = in.K;
    table.E = in.E;
    table.P = physical_experts(map, in.E);
    table.token_begin = in.token_begin;
    table.computed_only = map.kind == nullptr;
    auto const word = [](std::int64_t n) { return static_cast<std::uint32_t>(n); };
    job.expert = in.expert;
    job.token_begin = in.token_begin;
    job.source = in.tokens.source;
    job.live = in.tokens.live;
    job.T = word(in.T);
    job.K = word(in.K);
    job.E = word(in.E);
    job.sources = word(table.sources);
    job.groups = job.E * job.sources;
    job.positions = job.T * job.K;
    job.choice_major = rules.rank == order::choice_major;
    job.inner = divisor(job.choice_major ? std::max(job.T, 1u) : job.K);
    job.by_sources = divisor(job.sources);
    job.map = map;
    job.rows = rules.rows;
    job.align = word(rules.align);
    job.capacity = capacity_on_device(rules.cap, in.T, in.E, in.K, in.tokens.training);
    job.segments = word(table.segments());
    job.max_rows = word(table.max_rows);
    job.row_of = table.row_of;
    job.pair_of = table.pair_of;
    job.begin = table.begin;
    job.used = table.used;
    job.wanted = table.wanted;
    job.counts = table.counts;
  }

  /// token_order = the tokens by falling best score.
  template <class V>
  void rank_tokens(basic_routing<V> const& in) {
    if (in.T == 0) return;
    constexpr int threads = threads_of<X>(table_threads);
    sort_tokens_kernel<V, threads> const kernel{};
    table_chunks const chunks(in.T, 1, kernel.tile, 256, exec.processors());
    auto* const a = take<std::uint64_t>(in.T);
    auto* const b = take<std::uint64_t>(in.T);
    auto* const counts = take<std::int32_t>(std::int64_t{chunks.blocks} * 256);
    std::uint64_t const* from = nullptr;
    for (int pass = 0; pass < 4; ++pass) {
      auto* const to = pass % 2 == 0 ? a : b;
      auto const run = [&](unsigned phases) {
        exec.launch("build_table", kernel, chunks.blocks, site, in, from, to, 32 + 8 * pass, phases,
                    chunks.size, counts, chunks.blocks);
      };
      if (chunks.blocks == 1) {
        run(phase_count | phase_place);
      } else {
        run(phase_count);
        run(phase_place);
      }
      from = to;
    }
    job.token_order = from;
  }

  /// Launches the kernel for as many groups, over all pairs.
  template <int MaxGroups, class Priority>
  void build_with(Priority const& priority, pair_counts const& given) {
    constexpr int threads = threads_of<X>(table_threads);
    build_table_kernel<MaxGroups, threads, Priority> const kernel{priority};
    table_chunks chunks(job.positions, 1, kernel.tile, job.groups, exec.processors());
    // Each block adds up all counts: of many small chunks that takes longer than to count again. The
    // limit is a guess, never timed.
    bool const counted =
        given.counts != nullptr && chunks.blocks > 1 && given.chunks * job.groups <= 40000;
    std::int64_t const unit = counted ? given.chunk * std::int64_t{job.K} : std::int64_t{1};
    if (counted)
      chunks = table_chunks(job.positions, unit, kernel.tile, job.groups, exec.processors());
    job.chunk = chunks.size;
    job.columns = counted ? job.groups + met_unsound : columns_of(job.groups);
    if (counted) {
      job.counted = given.counts;
      job.counted_chunks = static_cast<std::uint32_t>(given.chunks);
      job.counted_of_block = static_cast<std::uint32_t>(chunks.size / unit);
    } else {
      job.counted = take<std::int32_t>(std::int64_t{chunks.blocks} * job.columns);
      job.counted_chunks = chunks.blocks;
    }
    if constexpr (MaxGroups == 0) {
      job.counter_bytes = counter_bytes(job.groups, threads);
      job.counters = take<std::byte>(chunks.blocks * static_cast<std::int64_t>(job.counter_bytes));
    }
    auto const run = [&](unsigned phases, std::uint32_t blocks) {
      job.phases = phases;
      exec.launch("build_table", kernel, blocks, site, job);
    };
    constexpr unsigned all = phase_count | phase_lay_out | phase_place;
    if (chunks.blocks == 1) return run(all, 1);
    if (!counted) run(phase_count, chunks.blocks);
    if constexpr (kernel.mapped) {
      run(phase_lay_out, 1);
      run(phase_place, chunks.blocks);
    } else {
      run(phase_lay_out | phase_place, chunks.blocks);
    }
  }

  /// @param given  What a gate has counted of the same pairs in the same order; or nothing.
  template <class Priority>
  void build(Priority const& priority, pair_counts const& given) {
    if (job.groups <= shared_groups)
      build_with<shared_groups>(priority, given);
    else
      build_with<0>(priority, given);
  }

  template <class Priority>
  void build_by(Priority const& priority, bool overflows, pair_counts const& given) {
    job.refused = take<std::int32_t>(1);
    if (overflows) {
      job.load = take<std::uint32_t>(job.groups);
      job.keep = take<std::uint32_t>(job.groups);
      job.keys_of = take<std::uint32_t>(job.groups);
      job.keys = take<std::uint32_t>(job.positions);
    }
    build(priority, given);
    if (!overflows || job.positions == 0) return;
    constexpr int threads = threads_of<X>(table_threads);
    std::int64_t const most = 8 * std::int64_t{exec.processors()};
    std::int64_t const blocks = (std::int64_t{job.positions} + threads - 1) / threads;
    exec.launch("build_table", select_slots_kernel<threads>{},
                std::min<std::int64_t>(job.groups, most), site, job);
    exec.launch("build_table", settle_pairs_kernel<threads>{}, std::min(blocks, most), site, job);
  }
};

/// Whether a rule never drops a pair, as the host knows.
constexpr bool drops_nothing(capacity_rule const& rule) noexcept {
  return !is_static(rule) && (rule.rule == capacity_rule::kind::dropless || rule.factor == 0);
}

inline std::size_t gpu_table_scratch(table_shape const& shape, int threads, std::uint32_t tile,
                                     int processors) noexcept {
  std::int64_t const groups = static_cast<std::int64_t>(shape.E) * shape.sources;
  std::int64_t const pairs = shape.T * shape.K;
  std::int64_t const blocks = table_chunks::bound(pairs, tile, processors);
  auto const counters = static_cast<std::int64_t>(counter_bytes(groups, threads));
  return memory_size()
      .add<std::uint64_t>(shape.T)
      .add<std::uint64_t>(shape.T)
      .add<std::int32_t>(blocks * 256)
      .add<std::int32_t>(1)
      .add<std::uint32_t>(groups)
      .add<std::uint32_t>(groups)
      .add<std::uint32_t>(groups)
      .add<std::uint32_t>(pairs)
      .add<std::int32_t>(blocks * columns_of(static_cast<std::uint32_t>(groups)))
      .add<std::byte>(groups <= shared_groups ? 0 : blocks * counters)
      .bytes();
}

}  // namespace detail
}  // namespace moe::inline MOE_ABI
