// The passes of build_table: count, lay out, place. Private to build_table.hpp.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/expert_map.hpp>
#include <moe/routing/overflow.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

constexpr int physical_experts(expert_map const& map, int E) noexcept {
  return map.P == 0 ? E : map.P;
}

/// The scratch of build_table. A *group* is a (logical expert, source): g = e * sources + s. Tokens
/// are split into contiguous chunks, one for each thread at most.
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
               .add<std::int32_t>(shape.E)
               .bytes() +
           std::max(selecting, ranking);
  }
};

/// One call of build_table, whose arguments have been checked.
template <class V>
class table_passes {
 public:
  table_passes(cpu const& exec, basic_routing<V> const& in, table_rules const& rules,
               expert_map const& map, memory scratch, routing_table& table, call_site site)
      : exec_(exec),
        in_(in),
        rules_(rules),
        map_(map),
        table_(table),
        scratch_(scratch),
        site_(site) {
    table.T = in.T;
    table.K = in.K;
    table.E = in.E;
    table.P = physical_experts(map, in.E);
    table.token_begin = in.token_begin;
    groups_ = static_cast<std::int64_t>(in.E) * table.sources;
    chunks_ = table_scratch::most_chunks(exec, in.T);
    walk_ = {.routing = in, .sources = table.sources, .chunks = chunks_};
    steps_ = rules.rank == order::choice_major ? in.K : 1;
    step_ = steps_ == 1 ? 0 : groups_;
    stride_ = table_scratch::stride(steps_, groups_);
    met_ = take<chunk_counts>(chunks_);
    next_ = take<std::uint32_t>(chunks_ * stride_);
    load_ = take<std::uint32_t>(groups_);
    keep_ = take<std::uint32_t>(groups_);
    start_ = take<std::uint32_t>(groups_);
    end_ = take<std::uint32_t>(groups_);
    without_row_ = take<std::int32_t>(groups_);
    replicas_ = take<std::int32_t>(in.E);
    plain_ = in.token_begin == nullptr && in.tokens.live == nullptr && in.tokens.source == nullptr;
    check_map();
    for (int e = 0; e < in.E; ++e)
      replicas_[e] =
          map.is_visible(e) && map.kind_of(e) == expert_kind::computed ? map.replicas(e) : 0;
  }

  /// Makes token_order_: by falling best score, ties to the lower token.
  void rank_tokens() {
    std::uint64_t* const words = take<std::uint64_t>(in_.T);
    std::uint64_t* const other = take<std::uint64_t>(in_.T);
    exec_.split(chunks_, 1, [&](std::int64_t c0, std::int64_t c1, int) {
      for (std::int64_t t = walk_.first_token(c0); t < walk_.first_token(c1); ++t) {
        if (!walk_.sound(t)) {
          words[t] = static_cast<std::uint64_t>(t);  // count() will refuse
          continue;
        }
        std::uint32_t best = 0;
        for (std::int64_t i = in_.first_pair(t); i < in_.first_pair(t + 1); ++i)
          if (static_cast<std::uint32_t>(in_.expert[i]) < static_cast<std::uint32_t>(in_.E))
            best = std::max(best, ordered_bits(static_cast<float>(in_.rank_score(i))));
        words[t] = static_cast<std::uint64_t>(~best) << 32 | static_cast<std::uint64_t>(t);
      }
    });
    sort_by_upper_half(words, other, in_.T);
    walk_.token_order = words;
    plain_ = false;
  }

  /// Loads of all groups; from them the capacity, the segments and all counts.
  void count() {
    exec_.split(chunks_, 1, [&](std::int64_t c0, std::int64_t c1, int) {
      for (std::int64_t c = c0; c < c1; ++c) count_chunk(c);
    });
    add_up();
    lay_out();
  }

  /// Rows by position: a group keeps the first pairs in rank order.
  void place() {
    if (one_replica_) {
      place_directly();
    } else {
      rank_pairs([](std::int64_t, std::int64_t, std::int64_t, int, int, std::uint32_t) {});
      settle();
    }
  }

  /// Rows by priority(i, t, j, e): a full group keeps the pairs of highest priority.
  template <class Priority>
  void place_by(Priority const& priority) {
    if (!overflows()) return place();
    std::uint64_t* const keys = take<std::uint64_t>(in_.pairs());
    slots_ = take<std::int32_t>(in_.pairs());
    rank_pairs(
        [&](std::int64_t g, std::int64_t i, std::int64_t t, int j, int e, std::uint32_t rank) {
          if (keys_of_[g] != not_full)
            keys[keys_of_[g] + rank] = priority_key(priority(i, t, j, e), rank);
        });
    auto const select = [&](std::int64_t g, int) {
      if (keys_of_[g] != not_full)
        select_slots(keys + keys_of_[g], load_[g], keep_[g], slots_ + keys_of_[g]);
    };
    // Where one chunk holds all tokens, waking other threads costs more than the work.
    (chunks_ == 1 ? cpu{} : exec_).each(groups_, select);
    settle();
  }

 private:
  static constexpr std::uint32_t not_full = 0xffffffffu;

  template <class T>
  T* take(std::int64_t count) {
    return scratch_.take<T>(count, "build_table: scratch of build_table_scratch(exec, shape) bytes",
                            site_);
  }

  void check_map() {
    if (map_.physical_begin == nullptr) return;
    // `used` marks the physical experts that have been named; it is written for good later.
    std::fill_n(table_.used, table_.P, 0);
    bool sound = map_.physical_begin[0] == 0;
    for (int e = 0; e < in_.E && sound; ++e) {
      int const i0 = map_.physical_begin[e], i1 = map_.physical_begin[e + 1];
      sound = i0 <= i1 && i1 <= table_.P &&
              (i0 < i1 || !map_.is_visible(e) || map_.kind_of(e) != expert_kind::computed);
      for (int i = i0; i < i1 && sound; ++i) {
        auto const p = static_cast<std::uint32_t>(map_.physical[i]);
        sound = p < static_cast<std::uint32_t>(table_.P) && table_.used[p]++ == 0;
      }
      one_replica_ = one_replica_ && i1 - i0 <= 1;
    }
    expects(sound,
            "build_table: expert_map's physical_begin rises from 0 to at most P, each id in "
            "physical is in [0, P) and named once, and visible computed experts have one",
            site_, {{"E", in_.E}, {"P", table_.P}});
  }

  bool takes_rows(int e) const noexcept { return replicas_[e] > 0; }

  /// The share of `pairs` pairs that the replica-th of n replicas takes. Division is slow.
  static std::int64_t share(std::int64_t pairs, std::int64_t replica, std::int64_t n) noexcept {
    return n == 1 ? pairs : (pairs - replica + n - 1) / n;
  }

  /// The counters of chunk c for choice j.
  std::uint32_t* next(std::int64_t c, int j) const noexcept {
    return next_ + c * stride_ + j * step_;
  }

  template <class F>
  void for_each_group(F const& f) const {
    std::int64_t g = 0;
    for (int e = 0; e < in_.E; ++e)
      for (int s = 0; s < table_.sources; ++s) f(g++, e, s);
  }

  /// Calls live(counter, g, i) for each pair of chunk c, with its group's counter; dead as in walk.
  template <class Live, class Dead>
  void walk_counters(std::int64_t c, chunk_counts& met, Live live, Dead dead) const {
    std::uint32_t* const counters = next(c, 0);
    std::int64_t const step = step_;
    if (plain_ && step == 0)
      walk_.walk_pairs(
          c, met, [=](std::int64_t g, std::int64_t i, int) { live(counters[g], g, i); }, dead);
    else if (plain_)
      walk_.walk_pairs(
          c, met,
          [=](std::int64_t g, std::int64_t i, int j) { live(counters[j * step + g], g, i); }, dead);
    else
      walk_.walk(
          c, met,
          [=](std::int64_t g, std::int64_t i, std::int64_t, int j, int) {
            live(counters[j * step + g], g, i);
          },
          dead);
  }

  void count_chunk(std::int64_t c) {
    chunk_counts met{};
    std::fill_n(next(c, 0), steps_ * groups_, 0u);
    walk_counters(
        c, met, [](std::uint32_t& counter, std::int64_t, std::int64_t) { ++counter; },
        [](std::int64_t, std::int64_t) {});
    met_[c] = met;
  }

  void add_up() {
    table_counts& counts = *table_.counts;
    counts = {};
    bool sound = true;
    for (int c = 0; c < chunks_; ++c) {
      sound = sound && !met_[c].bad_token_begin;
      counts.missing += met_[c].missing;
      counts.out_of_range += met_[c].out_of_range;
      counts.masked_tokens += met_[c].masked_tokens;
      counts.invalid_tokens += met_[c].invalid_tokens;
    }
    expects(sound, "build_table: token_begin rises from 0 by at most K for each token", site_,
            {{"T", in_.T}, {"K", in_.K}});
    std::fill_n(load_, groups_, 0u);
    for (int c = 0; c < chunks_; ++c)
      for (int j = 0; j < steps_; ++j) {
        std::uint32_t const* const n = next(c, j);
        for (std::int64_t g = 0; g < groups_; ++g) load_[g] += n[g];
      }
    std::int64_t max_load = 0;
    for (int e = 0; e < in_.E; ++e) {
      std::int64_t wanted = 0, most = 0;
      for (int s = 0; s < table_.sources; ++s) {
        std::int64_t const load = load_[static_cast<std::int64_t>(e) * table_.sources + s];
        wanted += load;
        most = std::max(most, load);
      }
      bool const visible = map_.is_visible(e);
      table_.wanted[e] = visible ? static_cast<std::int32_t>(wanted) : 0;
      if (!visible) {
        counts.hidden += wanted;
      } else if (!takes_rows(e)) {
        counts.uncomputed += wanted;
      } else {
        max_load = std::max(max_load, share(most, 0, replicas_[e]));
      }
    }
    counts.capacity = rows_of(rules_.cap, in_.T, in_.E, in_.K, in_.tokens.training, max_load);
  }

  /// used, begin; keep_[g] = pairs that group g keeps; without_row_[g] = what its others get.
  void lay_out() {
    table_counts& counts = *table_.counts;
    int const sources = table_.sources;
    std::int64_t const segments = table_.segments();
    std::fill_n(table_.used, segments, 0);
    for (int e = 0; e < in_.E; ++e) {
      std::int64_t const replicas = replicas_[e];
      bool const rows = replicas > 0;
      for (int s = 0; s < sources; ++s) {
        std::int64_t const g = static_cast<std::int64_t>(e) * sources + s;
        std::int64_t const keep = std::min<std::int64_t>(load_[g], replicas * counts.capacity);
        keep_[g] = static_cast<std::uint32_t>(keep);
        without_row_[g] = rows || !map_.is_visible(e) ? dropped_row : no_row(map_.kind_of(e));
        if (rows) counts.dropped += load_[g] - keep;
        for (int r = 0; r < replicas; ++r)
          table_.used[segment(e, r, s)] = static_cast<std::int32_t>(share(keep, r, replicas));
      }
    }
    std::int64_t const padded = rules_.rows == layout::padded ? counts.capacity : 0;
    std::int64_t const align = rules_.rows == layout::aligned ? rules_.align : 1;
    std::int64_t row = 0, kept = 0, wanted = 0;
    for (std::int64_t q = 0; q < segments; ++q) {
      std::int64_t const first = std::min(row, table_.max_rows);
      std::int64_t const want = table_.used[q];
      std::int64_t const fit = std::min(want, table_.max_rows - first);
      table_.begin[q] = static_cast<std::int32_t>(first);
      table_.used[q] = static_cast<std::int32_t>(fit);
      kept += fit;
      wanted += want;
      std::int64_t const rows = std::max(want, padded);
      row += align == 1 ? rows : (rows + align - 1) / align * align;
    }
    counts.kept = kept;
    counts.beyond_max_rows = wanted - kept;
    counts.rows = std::min(row, table_.max_rows);
    table_.begin[segments] = static_cast<std::int32_t>(counts.rows);
  }

  std::int64_t segment(int e, int replica, std::int64_t s) const noexcept {
    return static_cast<std::int64_t>(map_.replica(e, replica)) * table_.sources + s;
  }

  /// Turns counts into what each chunk's first pair of each group gets: ranks that go on from start_.
  void start_chunks() {
    for (int j = 0; j < steps_; ++j)
      for (int c = 0; c < chunks_; ++c) {
        std::uint32_t* const n = next(c, j);
        for (std::int64_t g = 0; g < groups_; ++g) {
          std::uint32_t const here = n[g];
          n[g] = start_[g];
          start_[g] += here;
        }
      }
  }

  /// One pass: counters run over rows themselves. They may exceed 2^31, never 2^32.
  void place_directly() {
    for_each_group([&](std::int64_t g, int e, int s) {
      std::int64_t const q = takes_rows(e) ? segment(e, 0, s) : 0;
      start_[g] = takes_rows(e) ? static_cast<std::uint32_t>(table_.begin[q]) : 0;
      end_[g] = takes_rows(e) ? start_[g] + static_cast<std::uint32_t>(table_.used[q]) : 0;
    });
    start_chunks();
    exec_.split(chunks_, 1, [&](std::int64_t c0, std::int64_t c1, int) {
      for (std::int64_t c = c0; c < c1; ++c) {
        place_chunk(c);
        pad(c);
      }
    });
  }

  void place_chunk(std::int64_t c) {
    std::int32_t nowhere_else = 0;
    chunk_counts ignored{};
    walk_counters(
        c, ignored,
        [end = end_, otherwise = without_row_, row_of = table_.row_of, pair_of = table_.pair_of,
         nowhere = &nowhere_else](std::uint32_t& counter, std::int64_t g, std::int64_t i) {
          std::uint32_t const row = counter++;
          bool const fits = row < end[g];
          row_of[i] = fits ? static_cast<std::int32_t>(row) : otherwise[g];
          *(fits ? pair_of + row : nowhere) = static_cast<std::int32_t>(i);
        },
        [row_of = table_.row_of](std::int64_t i0, std::int64_t i1) {
          std::fill(row_of + i0, row_of + i1, dropped_row);
        });
  }

  /// Chunk c's share of the rows without a pair.
  void pad(std::int64_t c) const noexcept {
    std::int64_t const segments = table_.segments();
    // Packed segments have no padding between them.
    std::int64_t const last = rules_.rows == layout::packed ? 0 : segments * (c + 1) / chunks_;
    for (std::int64_t q = segments * c / chunks_; q < last; ++q)
      std::fill(table_.pair_of + table_.begin[q] + table_.used[q],
                table_.pair_of + table_.begin[q + 1], -1);
    std::int64_t const end = table_.begin[segments], left = table_.max_rows - end;
    std::fill(table_.pair_of + end + left * c / chunks_,
              table_.pair_of + end + left * (c + 1) / chunks_, -1);
  }

  /// Whether any group loses pairs; keys_of_[g] = where its keys start, or not_full.
  bool overflows() {
    keys_of_ = end_;
    std::uint32_t next = 0;
    for_each_group([&](std::int64_t g, int e, int) {
      bool const full = takes_rows(e) && keep_[g] < load_[g];
      keys_of_[g] = full ? next : not_full;
      if (full) next += load_[g];
    });
    return next > 0;
  }

  /// row_of[i] = rank of pair i in its group, for settle(); see(g, i, t, j, e, rank) for each.
  template <class See>
  void rank_pairs(See const& see) {
    std::fill_n(start_, groups_, 0u);
    start_chunks();
    exec_.split(chunks_, 1, [&](std::int64_t c0, std::int64_t c1, int) {
      for (std::int64_t c = c0; c < c1; ++c) {
        chunk_counts ignored{};
        walk_.walk(
            c, ignored,
            [&](std::int64_t g, std::int64_t i, std::int64_t t, int j, int e) {
              std::uint32_t const rank = next(c, j)[g]++;
              table_.row_of[i] = static_cast<std::int32_t>(rank);
              see(g, i, t, j, e, rank);
            },
            [](std::int64_t, std::int64_t) {});
      }
    });
  }

  /// From the ranks in row_of to rows: the slot among the kept pairs, then the replica.
  void settle() {
    exec_.split(chunks_, 1, [&](std::int64_t c0, std::int64_t c1, int) {
      for (std::int64_t c = c0; c < c1; ++c) {
        chunk_counts ignored{};
        walk_.walk(
            c, ignored,
            [&](std::int64_t g, std::int64_t i, std::int64_t, int, int e) {
              table_.row_of[i] = settled(g, e, static_cast<std::uint32_t>(table_.row_of[i]));
              if (table_.row_of[i] >= 0)
                table_.pair_of[table_.row_of[i]] = static_cast<std::int32_t>(i);
            },
            [&](std::int64_t i0, std::int64_t i1) {
              std::fill(table_.row_of + i0, table_.row_of + i1, dropped_row);
            });
        pad(c);
      }
    });
  }

  std::int32_t settled(std::int64_t g, int e, std::uint32_t rank) const noexcept {
    std::uint32_t slot = rank;
    if (slots_ != nullptr && keys_of_[g] != not_full) {
      std::int32_t const kept = slots_[keys_of_[g] + rank];
      if (kept < 0) return dropped_row;
      slot = static_cast<std::uint32_t>(kept);
    } else if (rank >= keep_[g]) {
      return without_row_[g];
    }
    auto const n = static_cast<std::uint32_t>(map_.replicas(e));
    std::uint32_t const replica = n == 1 ? 0 : slot % n;
    if (n != 1) slot /= n;
    std::int64_t const q =
        segment(e, static_cast<int>(replica), g - static_cast<std::int64_t>(e) * table_.sources);
    return slot < static_cast<std::uint32_t>(table_.used[q])
               ? table_.begin[q] + static_cast<std::int32_t>(slot)
               : dropped_row;
  }

  cpu const& exec_;
  basic_routing<V> const& in_;
  table_rules const& rules_;
  expert_map const& map_;
  routing_table& table_;
  memory scratch_;
  call_site site_;

  std::int64_t groups_;  // E * sources
  pair_walk<V> walk_;
  int chunks_;
  int steps_;            // choices that are counted apart: K if choice_major, else 1
  std::int64_t step_;    // from one of them to the next in next_
  std::int64_t stride_;  // from one chunk to the next in next_
  bool one_replica_ = true;
  bool plain_;  // walk_pairs will do

  chunk_counts* met_;                 // [chunks]
  std::uint32_t* next_;               // [chunks,steps,groups] counts, then running ranks or rows
  std::uint32_t* load_;               // [groups] pairs that want a group
  std::uint32_t* keep_;               // [groups] pairs that it keeps
  std::uint32_t* start_;              // [groups] where start_chunks begins
  std::uint32_t* end_;                // [groups] first row that is another group's
  std::uint32_t* keys_of_ = nullptr;  // [groups] in the place of end_
  std::int32_t* replicas_;            // [E] 0 for experts that take no rows
  std::int32_t* without_row_;         // [groups] what row_of says of pairs that are not kept
  std::int32_t* slots_ = nullptr;     // [pairs at full groups] by keys_of_ + rank
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
