// Runs plans on real tokens, in one process and step by step: the reference for verify_plans.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>

namespace moe_test {

/// Tokens that each want random destinations, and values for all input slots. A rank is what its place
/// in `plans` says; any plans may come, as long as their ends fit their buffers.
class token_run {
 public:
  token_run(std::vector<moe::exchange_plan> const& plans, unsigned seed)
      : plans_(plans), random_(seed) {}

  /// Whether every output slot gets what its name says. Sizes that do not fit are wrong, too.
  bool is_right() {
    if (!start()) return false;
    for (std::size_t phase = 0; phase < plans_[0].phases.size(); ++phase) {
      for (std::size_t r = 0; r < plans_.size(); ++r)
        if (!move(r, plans_[r].phases[phase].moves)) return false;
      if (!exchange(phase)) return false;
    }
    for (std::size_t r = 0; r < plans_.size(); ++r)
      if (!move(r, plans_[r].last)) return false;
    return compare();
  }

 private:
  using rows = std::map<int, std::int64_t>;  // by token
  struct slot {
    int source = -1, part = 0;
    rows tokens;
    bool is_growing = false;
  };

  int ranks() const { return static_cast<int>(plans_.size()); }
  /// Tokens of a source, 16 of each part; the wishes of those that a plan does not speak of are drawn
  /// when they are first asked for. A name that is no range of ranks is wanted by all.
  bool wants(int source, int part, int token, int destination, int span) {
    auto const [found, anew] = wishes_.try_emplace({source, part, token});
    if (anew)
      for (int d = 0; d < ranks(); ++d) found->second.push_back(random_() % 5 < 2);
    if (destination < 0 || destination > ranks() - span) return true;
    auto const first = found->second.begin() + destination;
    return std::find(first, first + span, true) != first + span;
  }
  std::vector<int> wanted(int source, int part, int destination, int span) {
    std::vector<int> tokens;
    for (int t = 0; t < 16; ++t)
      if (wants(source, part, t, destination, span)) tokens.push_back(t);
    return tokens;
  }

  bool are_ranges(std::vector<moe::piece> const& names) const {
    return std::all_of(names.begin(), names.end(), [&](moe::piece const& p) {
      return p.span >= 1 && p.span <= ranks() && p.destination < 1 << 30;
    });
  }

  bool start() {
    for (moe::exchange_plan const& p : plans_) {
      if (p.phases.size() != plans_[0].phases.size() || !are_ranges(p.input) ||
          !are_ranges(p.output))
        return false;
      std::vector<std::vector<std::optional<slot>>> buffers;
      for (int const slots : p.buffers) buffers.emplace_back(static_cast<std::size_t>(slots));
      for (std::size_t i = 0; i < p.input.size(); ++i) {
        moe::piece const& name = p.input[i];
        slot s{name.source, name.part, {}, false};
        for (int const t : wanted(name.source, name.part, name.destination, name.span))
          s.tokens[t] = static_cast<std::int64_t>(random_());
        inputs_.push_back({name, s.tokens});
        buffers[0][i] = std::move(s);
      }
      slots_.push_back(std::move(buffers));
    }
    return true;
  }

  std::optional<slot>* at(std::size_t r, moe::slot_at where) {
    auto& buffers = slots_[r];
    if (where.buffer < 0 || where.buffer >= static_cast<int>(buffers.size())) return nullptr;
    auto& buffer = buffers[static_cast<std::size_t>(where.buffer)];
    if (where.slot < 0 || where.slot >= static_cast<int>(buffer.size())) return nullptr;
    return &buffer[static_cast<std::size_t>(where.slot)];
  }
  slot* read(std::size_t r, moe::slot_at where) {
    std::optional<slot>* const s = at(r, where);
    if (s == nullptr || !*s || ((*s)->is_growing && (*s)->source < 0)) return nullptr;
    (*s)->is_growing = false;
    return &**s;
  }
  bool write(std::size_t r, moe::slot_at where, slot const& what) {
    std::optional<slot>* const s = at(r, where);
    if (s == nullptr || *s || where.buffer == 0) return false;
    *s = what;
    return true;
  }

  bool move(std::size_t r, std::vector<moe::row_move> const& moves) {
    for (moe::row_move const& m : moves) {
      if (m.count < 1 || m.count > 1000) return false;
      for (int i = 0; i < m.count; ++i)
        if (!move_one(r, {m.from.buffer, m.from.slot + i}, {m.to.buffer, m.to.slot + i}, m))
          return false;
    }
    return true;
  }
  bool move_one(std::size_t r, moe::slot_at from_at, moe::slot_at to_at, moe::row_move const& m) {
    if (m.action == moe::row_action::clear) return write(r, to_at, {-1, 0, {}, true});
    slot* const from = read(r, from_at);
    if (from == nullptr) return false;
    if (m.action == moe::row_action::copy) return write(r, to_at, *from);
    if (m.action == moe::row_action::select) {
      slot chosen{from->source, from->part, {}, false};
      if (!is_selection(m, *from)) return false;
      for (int const t : wanted(from->source, from->part, m.what.destination, m.what.span)) {
        if (from->tokens.count(t) == 0) return false;
        chosen.tokens[t] = from->tokens[t];
      }
      return write(r, to_at, chosen);
    }
    std::optional<slot>* const to = at(r, to_at);
    if (to == nullptr || !*to || to_at.buffer == 0) return false;
    slot& sum = **to;
    if (sum.is_growing && sum.source < 0) sum.source = from->source, sum.part = from->part;
    if (sum.source != from->source || sum.part != from->part) return false;
    if (m.action == moe::row_action::add) {
      sum.is_growing = false;
      if (tokens_of(sum.tokens) != tokens_of(from->tokens)) return false;
    } else if (!is_selection(m, *from) ||
               tokens_of(from->tokens) !=
                   wanted(from->source, from->part, m.what.destination, m.what.span)) {
      return false;
    }
    rows const added = from->tokens;  // from may be the sum itself
    for (auto const& [t, value] : added) {
      if (!sum.is_growing && sum.tokens.count(t) == 0) return false;
      sum.tokens[t] = static_cast<std::int64_t>(static_cast<std::uint64_t>(sum.tokens[t]) +
                                                static_cast<std::uint64_t>(value));
    }
    return true;
  }
  bool is_selection(moe::row_move const& m, slot const& from) const {
    moe::piece const& w = m.what;
    return m.count == 1 && w.source == from.source && w.source >= 0 && w.span >= 1 &&
           w.span <= ranks() && w.destination >= 0 && w.destination <= ranks() - w.span;
  }
  static std::vector<int> tokens_of(rows const& from) {
    std::vector<int> tokens;
    for (auto const& [t, value] : from) tokens.push_back(t);
    return tokens;
  }

  bool exchange(std::size_t phase) {
    std::map<std::pair<int, int>, std::deque<std::vector<slot>>> under_way;  // by (from, to)
    for (std::size_t r = 0; r < plans_.size(); ++r)
      for (moe::message const& m : plans_[r].phases[phase].sends) {
        if (m.count < 1 || m.peer == plans_[r].rank) return false;
        std::vector<slot> sent;
        for (int i = 0; i < m.count; ++i) {
          slot const* const s = read(r, {m.at.buffer, m.at.slot + i});
          if (s == nullptr) return false;
          sent.push_back(*s);
        }
        under_way[{plans_[r].rank, m.peer}].push_back(std::move(sent));
      }
    for (std::size_t r = 0; r < plans_.size(); ++r)
      for (moe::message const& m : plans_[r].phases[phase].receives) {
        auto& queue = under_way[{m.peer, plans_[r].rank}];
        if (queue.empty() || static_cast<int>(queue.front().size()) != m.count) return false;
        for (int i = 0; i < m.count; ++i)
          if (!write(r, {m.at.buffer, m.at.slot + i}, queue.front()[static_cast<std::size_t>(i)]))
            return false;
        queue.pop_front();
      }
    return std::all_of(under_way.begin(), under_way.end(),
                       [](auto const& queue) { return queue.second.empty(); });
  }

  bool compare() {
    for (std::size_t r = 0; r < plans_.size(); ++r)
      for (std::size_t i = 0; i < plans_[r].output.size(); ++i) {
        moe::piece const& name = plans_[r].output[i];
        rows expected;
        for (int const t : wanted(name.source, name.part, name.destination, name.span))
          expected[t] = 0;
        for (auto const& [in, tokens] : inputs_) {
          int const first = std::max(in.destination, name.destination);
          int const last = std::min(in.destination + in.span, name.destination + name.span);
          if (in.source != name.source || in.part != name.part || first >= last) continue;
          for (int const t : wanted(name.source, name.part, first, last - first))
            expected[t] = static_cast<std::int64_t>(static_cast<std::uint64_t>(expected[t]) +
                                                    static_cast<std::uint64_t>(tokens.at(t)));
        }
        slot const* const got = read(r, {1, static_cast<int>(i)});
        if (got == nullptr || got->source != name.source || got->part != name.part ||
            got->tokens != expected)
          return false;
      }
    return true;
  }

  std::vector<moe::exchange_plan> const& plans_;
  std::mt19937 random_;
  std::map<std::vector<int>, std::vector<bool>> wishes_;  // by (source, part, token)
  std::vector<std::pair<moe::piece, rows>> inputs_;
  std::vector<std::vector<std::vector<std::optional<slot>>>> slots_;  // [ranks][buffers][slots]
};

}  // namespace moe_test
