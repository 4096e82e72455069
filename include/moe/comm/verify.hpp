// Checks the plans of all ranks together, without any rows: what arrives where.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <moe/comm/detail/symbolic_rank.hpp>
#include <moe/comm/detail/symbolic_rows.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/plan_error.hpp>
#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Runs plans on numbers that stand for rows: each input slot has one of its own, drawn at random
/// from 64 bits, and sums are sums. Two different sums are equal with probability 2^-64.
class plan_checker {
 public:
  explicit plan_checker(vector_view<exchange_plan const> plans) : plans_(plans) {}
  plan_checker(plan_checker const&) = delete;  // ranks point to the input
  plan_checker& operator=(plan_checker const&) = delete;

  plan_verdict verdict() {
    if (plans_.empty() || !set_up()) return verdict_;
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

  /// After the verdict, and that is right: what a slot held at the end.
  piece name(std::int64_t plan, slot_at where) const {
    return state_[static_cast<std::size_t>(plan)].name(where);
  }

 private:
  using ranks = std::int64_t;

  struct sent_message {
    ranks to, from;
    message const* what;
  };

  ranks size() const { return plans_.size(); }
  symbolic_rank& state(ranks r) { return state_[static_cast<std::size_t>(r)]; }
  /// Tells where a fault is, if there is one.
  bool right(plan_verdict const& v, ranks r) {
    if (!v) verdict_ = {v.error, plans_[r].rank, static_cast<int>(phase_), v.slot};
    return static_cast<bool>(v);
  }
  bool wrong(plan_error error, ranks r, int slot = -1) { return right({error, -1, -1, slot}, r); }

  /// Only indices of ranks make up several destinations.
  bool are_names(std::vector<piece> const& all) const {
    return std::all_of(all.begin(), all.end(), [&](piece const& p) {
      return p.span == 1 ? p.destination < std::numeric_limits<int>::max()
                         : p.span > 1 && p.destination >= 0 && p.destination <= size() - p.span;
    });
  }
  bool set_up() {
    for (ranks r = 0; r < size(); ++r) {
      exchange_plan const& p = plans_[r];
      bool const fits =
          p.buffers.size() >= 2 && p.rank >= 0 && p.epoch == plans_[0].epoch &&
          p.phases.size() == plans_[0].phases.size() &&
          std::all_of(p.buffers.begin(), p.buffers.end(), [](int n) { return n >= 0; }) &&
          static_cast<std::size_t>(p.buffers[0]) == p.input.size() &&
          static_cast<std::size_t>(p.buffers[1]) == p.output.size() && are_names(p.input) &&
          are_names(p.output);
      if (!fits) return wrong(plan_error::shape, r);
      ranks_.push_back({p.rank, r});
    }
    std::sort(ranks_.begin(), ranks_.end());
    for (std::size_t i = 1; i < ranks_.size(); ++i)
      if (ranks_[i].first == ranks_[i - 1].first) return wrong(plan_error::shape, ranks_[i].second);
    state_.reserve(ranks_.size());
    for (exchange_plan const& p : plans_) state_.emplace_back(p, input_, size());
    input_.close();
    return true;
  }

  bool move(ranks r, std::vector<row_move> const& moves) {
    return std::all_of(moves.begin(), moves.end(),
                       [&](row_move const& m) { return right(state(r).move(m), r); });
  }

  /// All messages of a phase. What is received in it cannot be sent in it.
  bool exchange() {
    sent_.clear();
    for (ranks r = 0; r < size(); ++r)
      for (message const& m : plans_[r].phases[phase_].sends) {
        ranks const to = index_of(m.peer);
        if (to < 0 || to == r) return wrong(plan_error::out_of_range, r, m.at.slot);
        if (!right(state(r).read(m.at, m.count), r)) return false;
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
        if (from < 0 || from == r) return wrong(plan_error::out_of_range, r, m.at.slot);
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
        if (!right(state(r).write(in.what->at, out.count, symbolic_rank::writing::anew), r))
          return false;
        std::copy_n(state(in.from).at(out.at), out.count, state(r).at(in.what->at));
        ++next;
      }
      if (next != sent_.cend() && next->to == r)
        return wrong(plan_error::unmatched, next->from, next->what->at.slot);
    }
    return true;
  }

  void compare_output() {
    for (ranks r = 0; r < size(); ++r)
      for (int i = 0; i < plans_[r].buffers[1]; ++i) {
        slot_at const where{1, i};
        if (!right(state(r).read(where, 1), r)) return;
        piece const& wanted = plans_[r].output[static_cast<std::size_t>(i)];
        if (state(r).name(where) != wanted || state(r).at(where)->rows != input_.sum(wanted)) {
          wrong(plan_error::wrong_rows, r, i);
          return;
        }
      }
  }

  ranks index_of(int rank) const {
    auto const found = std::lower_bound(ranks_.begin(), ranks_.end(), std::pair(rank, ranks{0}));
    return found != ranks_.end() && found->first == rank ? found->second : -1;
  }

  vector_view<exchange_plan const> plans_;
  std::vector<std::pair<int, ranks>> ranks_;  // (rank, index of its plan), sorted
  symbolic_input input_;
  std::vector<symbolic_rank> state_;
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
/// Of tokens: an output slot gets, of every input slot of its source and part, the tokens for the
/// destinations that both name, each once. What is selected comes from one input slot and is in it; what
/// is scattered covers each destination of a cleared slot once, before the slot is read.
///
/// @param plans  Of all ranks that take part, in any order. May be anything: nothing is trusted.
/// @cost  Proportional to slots and messages: a second or so for 1024 ranks.
inline plan_verdict verify_plans(vector_view<exchange_plan const> plans) {
  return detail::plan_checker(plans).verdict();
}

}  // namespace moe::inline MOE_ABI
