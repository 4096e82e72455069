// Numbers that stand for rows, so that plans can be run without any.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include <moe/comm/exchange_plan.hpp>
#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

constexpr std::uint64_t mix_bits(std::uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
constexpr std::uint64_t mix_bits(std::uint64_t seed, int x) {
  return mix_bits(seed ^ static_cast<std::uint32_t>(x));
}

/// What a slot holds. How many rows those are depends on the source and the part, which are those of
/// input slot `like`, and on the destinations.
struct symbolic_slot {
  enum class phase : std::uint8_t {
    unwritten,
    growing,  // cleared and not read yet: for the destinations that were scattered to it
    settled
  };

  std::uint64_t rows = 0;     // sums of rows are sums
  std::uint64_t covered = 0;  // of a growing slot: the sum of `destinations_sum` of what it got
  std::int64_t like = -1;     // a number of an input slot; -1: nothing is known
  int first = 0;
  int last = 0;  // destinations [first, last): of a growing slot, with holes
  phase state = phase::unwritten;

  /// Depends on how often each destination occurs, so that holes and repetitions show.
  static constexpr std::uint64_t destinations_sum(int first, int last) {
    return mix_bits(0, last) - mix_bits(0, first);
  }
  /// Reading a slot fixes its size. False if it does not hold all tokens of its destinations.
  bool settle() {
    if (state == phase::growing && like >= 0 && covered == destinations_sum(first, last))
      state = phase::settled;
    return state == phase::settled;
  }
  void grow(std::int64_t like_slot, int from, int to) {
    first = like < 0 ? from : std::min(first, from);
    last = like < 0 ? to : std::max(last, to);
    like = like_slot;
    covered += destinations_sum(from, to);
  }
};

/// The input slots of all plans, by number.
class symbolic_input {
 public:
  /// @return Its number.
  /// @pre  last_destination(name) does not overflow.
  std::int64_t push_back(piece const& name) {
    auto const number = static_cast<std::int64_t>(names_.size());
    names_.push_back(name);
    std::uint64_t const all = rows(number, name.destination, last_destination(name));
    (name.span == 1 ? single_ : wide_)
        .push_back({name.source, name.part, name.destination, number, all});
    return number;
  }
  /// After the last slot: now there are sums.
  void close() {
    std::sort(single_.begin(), single_.end());
    std::sort(wide_.begin(), wide_.end());
    std::uint64_t sum = 0;
    for (located& s : single_) s.rows_before = std::exchange(sum, sum + s.rows_before);
    single_.push_back({0, 0, 0, -1, sum});
  }

  static constexpr int last_destination(piece const& name) { return name.destination + name.span; }

  piece const& name(std::int64_t number) const { return names_[static_cast<std::size_t>(number)]; }
  bool same_origin(std::int64_t a, std::int64_t b) const {
    return name(a).source == name(b).source && name(a).part == name(b).part;
  }

  /// The rows of a slot that any of destinations [first, last) wants, each once: 64 random bits. So
  /// those of several destinations are not the sum over them, which has tokens more than once.
  static constexpr std::uint64_t rows(std::int64_t number, int first, int last) {
    return mix_bits(mix_bits(mix_bits(static_cast<std::uint64_t>(number)), first), last);
  }

  /// What an output slot of that name has to hold: of every input slot of its source and part the rows
  /// for the destinations that both have.
  std::uint64_t sum(piece const& name) const {
    int const first = name.destination, last = last_destination(name);
    auto const end = single_.end() - 1;
    auto const before = [&](int destination) {
      return std::lower_bound(single_.begin(), end,
                              located{name.source, name.part, destination, -1, 0})
          ->rows_before;
    };
    std::uint64_t total = before(last) - before(first);
    located const key{name.source, name.part, std::numeric_limits<int>::min(), -1, 0};
    for (auto s = std::lower_bound(wide_.begin(), wide_.end(), key);
         s != wide_.end() && s->source == name.source && s->part == name.part; ++s) {
      int const from = std::max(first, s->destination);
      int const to = std::min(last, last_destination(this->name(s->number)));
      if (from < to) total += rows(s->number, from, to);
    }
    return total;
  }

 private:
  struct located {
    int source, part, destination;
    std::int64_t number;
    std::uint64_t rows_before;  // the sum over all slots before this one; until close: its own rows
    friend bool operator<(located const& a, located const& b) {
      return std::tie(a.source, a.part, a.destination, a.number) <
             std::tie(b.source, b.part, b.destination, b.number);
    }
  };

  std::vector<piece> names_;
  std::vector<located> single_;  // sorted, and one that ends them
  std::vector<located> wide_;    // of several destinations; sorted
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
