// Checks the plans of all ranks together, without any rows: what arrives where.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

enum class plan_error : std::uint8_t {
  none,
  shape,  ///< Ranks that repeat or differ in phases or epoch, or ends that do not fit the buffers.
  out_of_range,  ///< A slot or a peer that does not exist, or less than one slot.
  unwritten,     ///< Reads a slot that holds nothing, or adds to one.
  overwritten,   ///< Writes a slot a second time, or the input.
  unmatched,     ///< A message that is not received, or not sent, in its phase.
  other_count,   ///< Sent and received numbers of slots differ.
  other_extent,  ///< A sum of slots that may have different numbers of rows.
  wrong_rows     ///< An output slot lacks rows, or has others, or some twice.
};

/// What is wrong with plans, or nothing.
struct plan_verdict {
  plan_error error = plan_error::none;
  int rank = -1;   ///< As the communicator counts.
  int phase = -1;  ///< The number of phases: after the last.
  int slot = -1;   ///< Of an output slot, or where a message or move begins.

  constexpr explicit operator bool() const noexcept { return error == plan_error::none; }
  friend constexpr bool operator==(plan_verdict const&, plan_verdict const&) = default;
};

namespace detail {

/// Runs plans on numbers that stand for rows: each input slot has one of its own, drawn at random
/// from 64 bits, and sums are sums. Two different sums are equal with probability 2^-64.
class plan_checker {
 public:
  explicit plan_checker(vector_view<exchange_plan const> plans) : plans_(plans) {}

  plan_verdict verdict() {
    if (plans_.empty()) return {};
    if (!set_up()) return verdict_;
    std::size_t const phases = plans_[0].phases.size();
    for (phase_ = 0; phase_ < phases; ++phase_) {
      for (ranks r = 0; r < size(); ++r)
        if (!move(r, plans_[r].phases[phase_].moves)) return verdict_;
      if (!exchange()) return verdict_;
    }
    for (ranks r = 0; r < size(); ++r)
      if (!move(r, plans_[r].last)) return verdict_;
    compare_output();
    return verdict_;
  }

 private:
  using ranks = std::int64_t;

  struct content {
    std::uint64_t rows = 0;
    std::uint64_t extent = 0;  // stands for the number of rows; 0: nothing was written
  };
  struct sent_message {
    ranks to, from;
    message const* what;
  };

  static std::uint64_t mix(std::uint64_t x) {  // splitmix64
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  static std::uint64_t extent_of(piece const& p) {
    auto const word = [](int i) {
      return static_cast<std::uint64_t>(static_cast<std::uint32_t>(i));
    };
    return mix(mix(word(p.source) << 32 | word(p.destination)) ^ word(p.part)) | 1;
  }

  ranks size() const { return plans_.size(); }
  bool wrong(plan_error error, ranks r, int slot = -1) {
    verdict_ = {error, plans_[r].rank, static_cast<int>(phase_), slot};
    return false;
  }
  std::vector<content>& slots(ranks r) { return slots_[static_cast<std::size_t>(r)]; }
  content* at(ranks r, slot_at where) {
    return slots(r).data() +
           first_[static_cast<std::size_t>(r)][static_cast<std::size_t>(where.buffer)] + where.slot;
  }
  bool exists(ranks r, slot_at where, int count) {
    std::vector<int> const& buffers = plans_[r].buffers;
    return where.buffer >= 0 && where.buffer < static_cast<int>(buffers.size()) &&
           where.slot >= 0 && count >= 1 &&
           count <= buffers[static_cast<std::size_t>(where.buffer)] - where.slot;
  }

  bool set_up() {
    for (ranks r = 0; r < size(); ++r) {
      exchange_plan const& p = plans_[r];
      bool const fits =
          p.buffers.size() >= 2 && p.rank >= 0 && p.epoch == plans_[0].epoch &&
          p.phases.size() == plans_[0].phases.size() &&
          std::all_of(p.buffers.begin(), p.buffers.end(), [](int n) { return n >= 0; }) &&
          static_cast<std::size_t>(p.buffers[0]) == p.input.size() &&
          static_cast<std::size_t>(p.buffers[1]) == p.output.size();
      if (!fits) return wrong(plan_error::shape, r);
      ranks_.push_back({p.rank, r});
    }
    std::sort(ranks_.begin(), ranks_.end());
    for (std::size_t i = 1; i < ranks_.size(); ++i)
      if (ranks_[i].first == ranks_[i - 1].first) return wrong(plan_error::shape, ranks_[i].second);

    std::uint64_t drawn = 0;
    for (ranks r = 0; r < size(); ++r) {
      std::vector<std::size_t> first;
      std::size_t total = 0;
      for (int const n : plans_[r].buffers) {
        first.push_back(total);
        total += static_cast<std::size_t>(n);
      }
      first_.push_back(std::move(first));
      slots_.emplace_back(total);
      for (std::size_t i = 0; i < plans_[r].input.size(); ++i) {
        std::uint64_t const name = extent_of(plans_[r].input[i]);
        slots(r)[i] = {mix(++drawn), name};
        expected_.push_back({name, slots(r)[i].rows});
      }
    }
    // What every name stands for: the sum of the slots that have it.
    std::sort(expected_.begin(), expected_.end());
    std::size_t last = 0;
    for (std::size_t i = 1; i < expected_.size(); ++i) {
      if (expected_[i].first == expected_[last].first)
        expected_[last].second += expected_[i].second;
      else
        expected_[++last] = expected_[i];
    }
    if (!expected_.empty()) expected_.resize(last + 1);
    return true;
  }

  bool move(ranks r, std::vector<row_move> const& moves) {
    for (row_move const& m : moves) {
      if (!exists(r, m.from, m.count) || !exists(r, m.to, m.count))
        return wrong(plan_error::out_of_range, r, m.from.slot);
      content const* const from = at(r, m.from);
      content* const to = at(r, m.to);
      for (int i = 0; i < m.count; ++i) {
        if (from[i].extent == 0) return wrong(plan_error::unwritten, r, m.from.slot);
        if (m.to.buffer == 0) return wrong(plan_error::overwritten, r, m.to.slot);
        if (m.action == row_action::copy) {
          if (to[i].extent != 0) return wrong(plan_error::overwritten, r, m.to.slot);
          to[i] = from[i];
        } else {
          if (to[i].extent == 0) return wrong(plan_error::unwritten, r, m.to.slot);
          if (to[i].extent != from[i].extent) return wrong(plan_error::other_extent, r, m.to.slot);
          to[i].rows += from[i].rows;
        }
      }
    }
    return true;
  }

  /// All messages of a phase. What is received in it cannot be sent in it.
  bool exchange() {
    sent_.clear();
    for (ranks r = 0; r < size(); ++r)
      for (message const& m : plans_[r].phases[phase_].sends) {
        ranks const to = index_of(m.peer);
        if (to < 0 || to == r || !exists(r, m.at, m.count))
          return wrong(plan_error::out_of_range, r, m.at.slot);
        content const* const from = at(r, m.at);
        for (int i = 0; i < m.count; ++i)
          if (from[i].extent == 0) return wrong(plan_error::unwritten, r, m.at.slot);
        sent_.push_back({to, r, &m});
      }
    std::stable_sort(sent_.begin(), sent_.end(), [](sent_message const& a, sent_message const& b) {
      return std::pair(a.to, a.from) < std::pair(b.to, b.from);
    });
    auto next = sent_.cbegin();
    for (ranks r = 0; r < size(); ++r) {
      received_.clear();
      for (message const& m : plans_[r].phases[phase_].receives) {
        ranks const from = index_of(m.peer);
        if (from < 0 || from == r || !exists(r, m.at, m.count))
          return wrong(plan_error::out_of_range, r, m.at.slot);
        received_.push_back({r, from, &m});
      }
      std::stable_sort(
          received_.begin(), received_.end(),
          [](sent_message const& a, sent_message const& b) { return a.from < b.from; });
      for (sent_message const& in : received_) {
        if (next == sent_.cend() || next->to != r || next->from != in.from)
          return wrong(plan_error::unmatched, r, in.what->at.slot);
        message const& out = *next->what;
        if (out.count != in.what->count) return wrong(plan_error::other_count, r, in.what->at.slot);
        content const* const from = at(in.from, out.at);
        content* const to = at(r, in.what->at);
        for (int i = 0; i < out.count; ++i) {
          if (to[i].extent != 0) return wrong(plan_error::overwritten, r, in.what->at.slot);
          to[i] = from[i];
        }
        ++next;
      }
      if (next != sent_.cend() && next->to == r)
        return wrong(plan_error::unmatched, next->from, next->what->at.slot);
    }
    return true;
  }

  void compare_output() {
    for (ranks r = 0; r < size(); ++r)
      for (std::size_t i = 0; i < plans_[r].output.size(); ++i) {
        content const& got = at(r, {1, 0})[i];
        std::pair<std::uint64_t, std::uint64_t> const name{extent_of(plans_[r].output[i]), 0};
        auto const found = std::lower_bound(expected_.begin(), expected_.end(), name);
        int const slot = static_cast<int>(i);
        if (got.extent == 0) {
          wrong(plan_error::unwritten, r, slot);
          return;
        }
        if (found == expected_.end() || found->first != name.first || got.extent != name.first ||
            got.rows != found->second) {
          wrong(plan_error::wrong_rows, r, slot);
          return;
        }
      }
  }

  ranks index_of(int rank) const {
    auto const found = std::lower_bound(ranks_.begin(), ranks_.end(), std::pair(rank, ranks{0}));
    return found != ranks_.end() && found->first == rank ? found->second : -1;
  }

  vector_view<exchange_plan const> plans_;
  std::vector<std::pair<int, ranks>> ranks_;     // (rank, index of its plan), sorted
  std::vector<std::vector<std::size_t>> first_;  // [ranks][buffers] first slot
  std::vector<std::vector<content>> slots_;      // [ranks][slots]
  std::vector<std::pair<std::uint64_t, std::uint64_t>> expected_;  // (name, sum), sorted
  std::vector<sent_message> sent_;
  std::vector<sent_message> received_;
  std::size_t phase_ = 0;
  plan_verdict verdict_;
};

}  // namespace detail

/// Whether plans do what their ends say: every output slot, of every rank, gets the sum of all input
/// slots of its name, each once; all messages meet; nothing is read before it is there or written
/// twice; and the invariants of `exchange_plan` hold. It holds whatever the counts are, then.
///
/// @param plans  Of all ranks that take part, in any order. May be anything: nothing is trusted.
/// @cost  Proportional to slots and messages: a second or so for 1024 ranks.
inline plan_verdict verify_plans(vector_view<exchange_plan const> plans) {
  return detail::plan_checker(plans).verdict();
}

}  // namespace moe::inline MOE_ABI
