// Binds plans of tokens: which of a rank's tokens go where, told to all who hand them on.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/row_format.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Where keys are hosted. A key is what a choice of a token stands for, a physical expert say; key k is
/// hosted by the ranks of index[k * each .. (k + 1) * each), and goes to all of them.
struct key_hosts {
  vector_view<std::int32_t const> index;  ///< [keys * each]: indices of ranks, as plans count them.
  int each = 1;

  std::int64_t keys() const noexcept { return index.size() / each; }
};

/// Binds plans of tokens of one rank, and says what the tokens that come want.
///
/// Keeps its arrays: it allocates nothing once it has seen its largest.
template <class C>
class token_binder {
  static_assert(communicator<C> && std::same_as<typename C::memory_space, host_memory>);

 public:
  /// @param comm  Must outlive the binder.
  explicit token_binder(C& comm) : comm_(&comm) {}

  /// Tells all ranks what they will get: in each phase of the plan how many rows, then their keys. After
  /// it `rank_exchange` moves rows of any width by `sizes`, and back by its transpose.
  ///
  /// @param sizes  Of a plan of tokens: one input slot. Out: bound.
  /// @param keys   [T,K]: the keys of each token; negative ones are none. The same K on all ranks.
  /// @param room   0: exact sizes. Else every slot has that many rows, on all ranks: nothing is counted,
  ///               and tokens that find no room in a slot do not go there; see lost().
  /// @return What failed, if anything did; then the communicator has aborted.
  /// @throws precondition_error if the plan is not of this rank or has not one input slot; a key has no
  ///         host; there is room for less than none, or for less than all T while a key has several
  ///         hosts (of which some might lose it); or the plan sends all tokens, there is room, and it
  ///         is not T.
  /// @note  Collective; blocks. @cost O(T K) for each slot that tokens are selected from.
  outcome bind(bound_plan& sizes, matrix_view<std::int32_t const> keys, key_hosts const& hosts,
               std::int64_t room, deadline until, call_site site = call_site::here()) {
    expect_arguments(sizes, keys, hosts, room, site);
    sizes_ = &sizes;
    hosts_ = hosts;
    room_ = room;
    K_ = static_cast<std::size_t>(keys.cols());
    set_up(keys);
    exchange_plan const& plan = sizes.plan();
    for (exchange_phase const& phase : plan.phases) {
      move(phase.moves, site);
      if (outcome const told = tell(phase, until); !told) {
        comm_->abort();
        return told;
      }
    }
    move(plan.last, site);
    sizes.lay_out();
    output_.clear();
    for (int i = 0; i < plan.buffers[1]; ++i) append_keys({1, i}, output_);
    return {};
  }

  /// [output_rows, K] of what was bound last: the keys of each row that comes, as its rank gave them.
  matrix_view<std::int32_t const> keys() const noexcept {
    auto const K = static_cast<std::int64_t>(K_);
    return {output_.data(), K == 0 ? 0 : static_cast<std::int64_t>(output_.size()) / K, K};
  }
  /// [T * K] of what was bound last: 1 for each key of this rank's tokens that finds no room.
  vector_view<std::uint8_t const> lost() const noexcept { return lost_; }

 private:
  void expect_arguments(bound_plan const& sizes, matrix_view<std::int32_t const> keys,
                        key_hosts const& hosts, std::int64_t room, call_site site) const {
    expects(sizes.plan_ != nullptr && sizes.plan().rank == comm_->rank() &&
                sizes.plan().buffers[0] == 1,
            "token_binder::bind: a plan of tokens of the communicator's rank", site,
            {{"comm.rank()", comm_->rank()}});
    expects(
        hosts.each >= 1 && hosts.index.size() % hosts.each == 0 && room >= 0 &&
            (room == 0 || hosts.each == 1 || room >= keys.rows()),
        "token_binder::bind: hosts of each key; room >= 0, and for all T if keys have several",
        site,
        {{"hosts", hosts.index.size()}, {"each", hosts.each}, {"room", room}, {"T", keys.rows()}});
    constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
    expects(keys.rows() <= most && keys.ld() >= keys.cols() && keys.cols() >= 1,
            "token_binder::bind: keys is [T,K], T fits 32 bits", site,
            {{"T", keys.rows()}, {"K", keys.cols()}, {"ld", keys.ld()}});
    for (std::int64_t t = 0; t < keys.rows(); ++t)
      for (std::int64_t j = 0; j < keys.cols(); ++j)
        expects(keys(t, j) < hosts.keys(), "token_binder::bind: every key has hosts", site,
                {{"key", keys(t, j)}, {"keys", hosts.keys()}});
    bool const sends_all = !sizes.only_selects_from_input();
    expects(!sends_all || room == 0 || room == keys.rows(),
            "token_binder::bind: a plan that sends all tokens has room for T", site,
            {{"room", room}, {"T", keys.rows()}});
  }

  void set_up(matrix_view<std::int32_t const> keys) {
    bound_plan& sizes = *sizes_;
    sizes.is_bound_ = false;
    sizes.list_.clear();
    std::fill(sizes.rows_.begin(), sizes.rows_.end(), std::int64_t{0});
    std::fill(sizes.selected_.begin(), sizes.selected_.end(), bound_plan::selection{});
    first_key_.assign(sizes.rows_.size(), 0);
    keys_.clear();
    for (std::int64_t t = 0; t < keys.rows(); ++t)
      keys_.insert(keys_.end(), keys.row(t), keys.row(t) + keys.cols());
    lost_.assign(keys_.size(), 0);
    sizes.rows_[sizes.slot({0, 0})] = keys.rows();
  }

  std::int64_t& rows(slot_at at, int i = 0) {
    return sizes_->rows_[sizes_->slot(at) + static_cast<std::size_t>(i)];
  }
  std::size_t& first_key(slot_at at, int i = 0) {
    return first_key_[sizes_->slot(at) + static_cast<std::size_t>(i)];
  }
  void append_keys(slot_at at, std::vector<std::int32_t>& to, int i = 0) {
    auto const first = keys_.begin() + static_cast<std::ptrdiff_t>(first_key(at, i));
    to.insert(to.end(), first, first + rows(at, i) * static_cast<std::ptrdiff_t>(K_));
  }

  void move(std::vector<row_move> const& moves, call_site site) {
    for (auto m = moves.begin(); m != moves.end();) {
      if (m->action == row_action::select) {
        m = select(m, moves.end());
        continue;
      }
      expects(m->action == row_action::copy, "token_binder::bind: a plan of the way there", site);
      for (int i = 0; i < m->count; ++i) {
        rows(m->to, i) = rows(m->from, i);
        first_key(m->to, i) = first_key(m->from, i);
      }
      ++m;
    }
  }

  /// All selections that follow each other, from one slot and for different ranks: one walk over its
  /// rows to count, one to list. Gives the move after them.
  using move_at = std::vector<row_move>::const_iterator;
  move_at select(move_at first, move_at end) {
    targets_.clear();
    std::fill(target_of_.begin(), target_of_.end(), -1);
    move_at m = first;
    for (; m != end && m->action == row_action::select && m->from == first->from; ++m) {
      auto const begin = static_cast<std::size_t>(m->what.destination);
      std::size_t const last = begin + static_cast<std::size_t>(m->what.span);
      if (target_of_.size() < last) target_of_.resize(last, -1);
      auto const at = [&](std::size_t i) {
        return target_of_.begin() + static_cast<std::ptrdiff_t>(i);
      };
      if (std::any_of(at(begin), at(last), [](int t) { return t >= 0; })) break;
      std::fill(at(begin), at(last), static_cast<int>(targets_.size()));
      targets_.push_back({});
    }
    std::int64_t const n = rows(first->from);
    std::size_t const from = first_key(first->from);
    walk(n, from, [](target& t, std::int64_t) { ++t.count; });

    auto next_list = static_cast<std::int64_t>(sizes_->list_.size());
    std::size_t next_key = keys_.size();
    for (std::size_t i = 0; i < targets_.size(); ++i) {
      target& t = targets_[i];
      slot_at const to = first[static_cast<std::ptrdiff_t>(i)].to;
      std::int64_t const kept = room_ > 0 ? std::min(t.count, room_) : t.count;
      rows(to) = room_ > 0 ? room_ : t.count;
      first_key(to) = next_key;
      sizes_->selected_[sizes_->slot(to)] = {next_list, kept};
      t = {.kept = kept, .list = next_list, .key = next_key};
      next_list += kept;
      next_key += static_cast<std::size_t>(rows(to)) * K_;
    }
    sizes_->list_.resize(static_cast<std::size_t>(next_list));
    keys_.resize(next_key, -1);
    walk(n, from, [&](target& t, std::int64_t r) {
      if (t.count++ >= t.kept) return;
      sizes_->list_[static_cast<std::size_t>(t.list++)] = static_cast<std::int32_t>(r);
      std::copy_n(
          keys_.begin() + static_cast<std::ptrdiff_t>(from + static_cast<std::size_t>(r) * K_), K_,
          keys_.begin() + static_cast<std::ptrdiff_t>(t.key));
      t.key += K_;
    });
    return m;
  }

  struct target {
    std::int64_t count = 0, kept = 0;
    std::int64_t list = 0;  // where the next row goes
    std::size_t key = 0;
    std::int64_t last = -1;  // the row that came last
  };

  /// Calls f(target, row) once for each row and each target that it goes to.
  template <class F>
  void walk(std::int64_t n, std::size_t from, F const& f) {
    auto const each = static_cast<std::size_t>(hosts_.each);
    bool const own = from == 0;  // this rank's tokens
    for (target& t : targets_) t.last = -1;
    for (std::int64_t r = 0; r < n; ++r)
      for (std::size_t j = 0; j < K_; ++j) {
        std::size_t const i = from + static_cast<std::size_t>(r) * K_ + j;
        if (keys_[i] < 0) continue;
        auto const key = static_cast<std::size_t>(keys_[i]);
        for (std::size_t l = key * each; l < (key + 1) * each; ++l) {
          auto const host = static_cast<std::size_t>(hosts_.index[static_cast<std::int64_t>(l)]);
          int const which = host < target_of_.size() ? target_of_[host] : -1;
          if (which < 0) continue;
          target& t = targets_[static_cast<std::size_t>(which)];
          if (t.last != r) {
            t.last = r;
            f(t, r);
          }
          if (own && room_ > 0 && t.count > room_) lost_[i] = 1;
        }
      }
  }

  /// Counts, unless they are fixed, and keys of a phase.
  outcome tell(exchange_phase const& phase, deadline until) {
    std::uint64_t const epoch = sizes_->plan().epoch;
    if (room_ == 0) {
      out_.clear();
      for (message const& m : phase.sends)
        for (int i = 0; i < m.count; ++i) out_.push_back({rows(m.at, i), epoch});
      std::size_t total = 0;
      for (message const& m : phase.receives) total += static_cast<std::size_t>(m.count);
      in_.assign(total, {});
      post(phase, out_, in_, [](message const& m) { return static_cast<std::size_t>(m.count); });
      if (outcome const told = exchange_now(*comm_, sends_, receives_, ticket_, until); !told)
        return told;
      auto next = in_.cbegin();
      for (message const& m : phase.receives)
        for (int i = 0; i < m.count; ++i, ++next) {
          if (next->epoch != epoch) return {exchange_status::stale, m.peer};
          if (next->rows < 0 || next->rows > std::numeric_limits<std::int32_t>::max())
            return {exchange_status::wrong_length, m.peer};
          rows(m.at, i) = next->rows;
        }
    } else {
      for (message const& m : phase.receives)
        for (int i = 0; i < m.count; ++i) rows(m.at, i) = room_;
    }
    out_keys_.clear();
    for (message const& m : phase.sends)
      for (int i = 0; i < m.count; ++i) append_keys(m.at, out_keys_, i);
    std::size_t next = keys_.size();
    std::size_t const first = next;
    for (message const& m : phase.receives)
      for (int i = 0; i < m.count; ++i) {
        first_key(m.at, i) = next;
        next += static_cast<std::size_t>(rows(m.at, i)) * K_;
      }
    keys_.resize(next);
    vector_view<std::int32_t> const arriving(keys_.data() + first,
                                             static_cast<std::int64_t>(next - first));
    post(phase, out_keys_, arriving, [&](message const& m) {
      std::size_t sum = 0;
      for (int i = 0; i < m.count; ++i) sum += static_cast<std::size_t>(rows(m.at, i)) * K_;
      return sum;
    });
    return exchange_now(*comm_, sends_, receives_, ticket_, until);
  }

  /// One message after another out of `out` and into `in`; empty ones are left out at both ends.
  template <class Out, class In, class Size>
  void post(exchange_phase const& phase, Out const& out, In&& in, Size const& size) {
    using element = std::remove_cvref_t<decltype(in[0])>;
    sends_.clear();
    receives_.clear();
    element const* from = out.data();
    for (message const& m : phase.sends) {
      std::size_t const n = size(m);
      if (n > 0)
        sends_.push_back({reinterpret_cast<std::byte const*>(from), n * sizeof(element), m.peer});
      from += n;
    }
    element* to = in.data();
    for (message const& m : phase.receives) {
      std::size_t const n = size(m);
      if (n > 0)
        receives_.push_back({reinterpret_cast<std::byte*>(to), n * sizeof(element), m.peer});
      to += n;
    }
  }

  C* comm_;
  bound_plan* sizes_ = nullptr;  // while it binds
  key_hosts hosts_;
  std::int64_t room_ = 0;
  std::size_t K_ = 0;
  std::vector<std::int32_t> keys_;      // of all slots, in the order in which they became known
  std::vector<std::size_t> first_key_;  // [slots of all buffers]: in keys_
  std::vector<std::uint8_t> lost_;
  std::vector<std::int32_t> output_;
  std::vector<target> targets_;
  std::vector<int> target_of_;  // [indices]: which of targets_ a rank belongs to, or -1
  std::vector<detail::row_count> out_, in_;
  std::vector<std::int32_t> out_keys_;
  std::vector<outgoing> sends_;
  std::vector<incoming> receives_;
  typename C::ticket ticket_;
};

}  // namespace moe::inline MOE_ABI
