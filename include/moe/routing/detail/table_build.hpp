// The state of one call of build_table: what it is given, and its arrays in the scratch. Private to
// build_table.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/core/memory.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

constexpr int physical_experts(expert_map const& map, int E) noexcept {
  return map.P == 0 ? E : map.P;
}

/// The scratch of build_table. Tokens are split into contiguous chunks, one for each thread at most.
struct table_scratch {
  /// Tokens for which another thread is worth waking. A guess: some microseconds of work.
  static constexpr std::int64_t grain = 1024;

  static int most_chunks(cpu const& exec, std::int64_t T) noexcept {
    return static_cast<int>(std::clamp<std::int64_t>(T / grain, 1, exec.threads()));
  }
  /// Counters of one chunk, rounded so that two threads never share a cache line.
  static std::int64_t stride(std::int64_t steps, std::int64_t groups) noexcept {
    return (steps * groups + 15) / 16 * 16;
  }

  static std::size_t size(cpu const& exec, table_shape const& shape) noexcept {
    std::int64_t const groups = static_cast<std::int64_t>(shape.E) * shape.sources;
    std::int64_t const pairs = shape.T * shape.K;
    int const chunks = most_chunks(exec, shape.T);
    std::size_t const selecting =
        memory_size().add<std::uint64_t>(pairs).add<std::int32_t>(pairs).bytes();
    std::size_t const ranking =
        memory_size().add<std::uint64_t>(shape.T).add<std::uint64_t>(shape.T).bytes();
    return memory_size()
               .add<chunk_counts>(chunks)
               .add<std::uint32_t>(chunks * stride(shape.K, groups))
               .add<std::uint32_t>(groups)
               .add<std::uint32_t>(groups)
               .add<std::uint32_t>(groups)
               .add<std::uint32_t>(groups)
               .add<std::int32_t>(groups)
               .add<std::int32_t>(groups)
               .bytes() +
           std::max(selecting, ranking);
  }
};

/// What the passes of one call share. A *group* is a (logical expert, source): g = e * sources + s.
/// Loops over groups are flat and plain, so that they become vector code: of few tokens and many
/// experts, these loops are all of the work.
template <class V>
struct table_build {
  cpu const& exec;
  basic_routing<V> const& in;
  table_rules const& rules;
  expert_map const& map;
  routing_table& table;
  memory scratch;
  call_site site;

  std::int64_t groups;  // E * sources
  pair_walk<V> walk;
  int chunks;
  int steps;            // choices that are counted apart: K if choice_major, else 1
  std::int64_t step;    // from one of them to the next in next_
  std::int64_t stride;  // from one chunk to the next in next_
  bool plain;           // walk_pairs will do
  bool in_place;        // segment g is group g: no map from logical to physical experts
  bool one_replica;     // no expert has more than one

  chunk_counts* met;          // [chunks]
  std::uint32_t* counters;    // [chunks,steps,groups] counts, then running ranks or rows
  std::uint32_t* load;        // [groups] pairs that want a group
  std::uint32_t* keep;        // [groups] pairs that it keeps
  std::uint32_t* start;       // [groups] where start_chunks begins
  std::uint32_t* end;         // [groups] first row that is another group's
  std::int32_t* replicas;     // [groups] 0 for experts that take no rows
  std::int32_t* without_row;  // [groups] what row_of says of pairs that are not kept

  table_build(cpu const& on, basic_routing<V> const& routed, table_rules const& by,
              expert_map const& to, memory room, routing_table& out, call_site caller)
      : exec(on), in(routed), rules(by), map(to), table(out), scratch(room), site(caller) {
    table.T = in.T;
    table.K = in.K;
    table.E = in.E;
    table.P = physical_experts(map, in.E);
    table.token_begin = in.token_begin;
    table.computed_only = map.kind == nullptr;
    groups = static_cast<std::int64_t>(in.E) * table.sources;
    chunks = table_scratch::most_chunks(exec, in.T);
    walk = {.routing = in, .sources = table.sources, .chunks = chunks};
    steps = rules.rank == order::choice_major ? in.K : 1;
    step = steps == 1 ? 0 : groups;
    stride = table_scratch::stride(steps, groups);
    met = take<chunk_counts>(chunks);
    counters = take<std::uint32_t>(chunks * stride);
    load = take<std::uint32_t>(groups);
    keep = take<std::uint32_t>(groups);
    start = take<std::uint32_t>(groups);
    end = take<std::uint32_t>(groups);
    without_row = take<std::int32_t>(groups);
    replicas = take<std::int32_t>(groups);
    plain = in.token_begin == nullptr && in.tokens.live == nullptr && in.tokens.source == nullptr;
    in_place = map.physical_begin == nullptr;
    one_replica = true;
    if (!in_place) check_map();
    read_map();
  }

  template <class T>
  T* take(std::int64_t count) {
    return scratch.take<T>(count, "build_table: scratch of build_table_scratch(exec, shape) bytes",
                           site);
  }

  /// The counters of chunk c for choice j.
  std::uint32_t* next(std::int64_t c, int j) const noexcept {
    return counters + c * stride + j * step;
  }

  /// Calls f(c) for each chunk.
  template <class F>
  void for_each_chunk(F const& f) const {
    exec.split(chunks, 1, [&](std::int64_t c0, std::int64_t c1, int) {
      for (std::int64_t c = c0; c < c1; ++c) f(c);
    });
  }

  /// Calls live(counter, g, i) for each pair of chunk c, with its group's counter; dead as in walk.
  template <class Live, class Dead>
  void walk_counters(std::int64_t c, chunk_counts& counts, Live live, Dead dead) const {
    std::uint32_t* const own = next(c, 0);
    std::int64_t const to_next = step;
    if (plain && to_next == 0)
      walk.walk_pairs(
          c, counts, [=](std::int64_t g, std::int64_t i, int) { live(own[g], g, i); }, dead);
    else if (plain)
      walk.walk_pairs(
          c, counts,
          [=](std::int64_t g, std::int64_t i, int j) { live(own[j * to_next + g], g, i); }, dead);
    else
      walk.walk(
          c, counts,
          [=](std::int64_t g, std::int64_t i, std::int64_t, int j, int) {
            live(own[j * to_next + g], g, i);
          },
          dead);
  }

  /// The share of `pairs` pairs that the replica-th of n replicas takes. Division is slow.
  static std::int64_t share(std::int64_t pairs, std::int64_t replica, std::int64_t n) noexcept {
    return n == 1 ? pairs : (pairs - replica + n - 1) / n;
  }

  std::int64_t segment(std::int64_t g, int replica) const noexcept {
    if (in_place) return g;
    std::int64_t const e = table.sources == 1 ? g : g / table.sources;
    return static_cast<std::int64_t>(map.replica(static_cast<int>(e), replica)) * table.sources +
           (g - e * table.sources);
  }

 private:
  void check_map() {
    // `used` marks the physical experts that have been named; it is written for good later.
    std::fill_n(table.used, table.P, 0);
    bool sound = map.physical_begin[0] == 0;
    for (int e = 0; e < in.E && sound; ++e) {
      int const i0 = map.physical_begin[e], i1 = map.physical_begin[e + 1];
      sound = i0 <= i1 && i1 <= table.P &&
              (i0 < i1 || !map.is_visible(e) || map.kind_of(e) != expert_kind::computed);
      for (int i = i0; i < i1 && sound; ++i) {
        auto const p = static_cast<std::uint32_t>(map.physical[i]);
        sound = p < static_cast<std::uint32_t>(table.P) && table.used[p]++ == 0;
      }
      one_replica = one_replica && i1 - i0 <= 1;
    }
    expects(sound,
            "build_table: expert_map's physical_begin rises from 0 to at most P, each id in "
            "physical is in [0, P) and named once, and visible computed experts have one",
            site, {{"E", in.E}, {"P", table.P}});
  }

  /// replicas and without_row.
  void read_map() {
    std::fill_n(replicas, groups, 1);
    std::fill_n(without_row, groups, dropped_row);
    if (in_place && map.visible == nullptr && map.kind == nullptr) return;
    for (int e = 0; e < in.E; ++e) {
      bool const rows = map.is_visible(e) && map.kind_of(e) == expert_kind::computed;
      std::int64_t const g = static_cast<std::int64_t>(e) * table.sources;
      std::fill_n(replicas + g, table.sources, rows ? map.replicas(e) : 0);
      if (map.is_visible(e) && !rows)
        std::fill_n(without_row + g, table.sources, no_row(map.kind_of(e)));
    }
  }
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
