// Choices that no expert answers any more: what becomes of their tokens, and of the gradient.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// What becomes of a token some of whose choices are lost: at an expert that is on no rank that is alive,
/// or without room on the way. They are counted in any case.
enum class lost_contributions : std::uint8_t {
  fail,                 ///< The call fails.
  drop,                 ///< They add nothing.
  drop_and_renormalise  ///< The weights of what is left are scaled to the sum of all.
};

namespace detail {

/// The choices of one token: [K] of each.
template <class V>
struct token_choices {
  std::int32_t const* row;  // in the table; negative: was dropped before, and is not lost
  std::uint8_t const* lost;
  V const* weight;
  int K;

  bool had(int j) const { return row[j] >= 0; }
  bool kept(int j) const { return had(j) && lost[j] == 0; }
  /// What the weights of kept choices are multiplied with: all / left, or 1.
  V all() const {
    return sum([this](int j) { return had(j); });
  }
  V left() const {
    return sum([this](int j) { return kept(j); });
  }

 private:
  template <class F>
  V sum(F const& counts) const {
    V s = 0;
    for (int j = 0; j < K; ++j)
      if (counts(j)) s += weight[j];
    return s;
  }
};

/// Whether weights are scaled: something is left, and its sum is one to divide by.
template <class V>
bool renormalises(lost_contributions rule, token_choices<V> const& c) {
  if (rule != lost_contributions::drop_and_renormalise || !(c.left() > 0)) return false;
  for (int j = 0; j < c.K; ++j)
    if (c.had(j) && !c.kept(j)) return true;
  return false;
}

/// kept[j] = what choice j weighs now. @return How many are lost.
template <class V>
int keep_contributions(lost_contributions rule, token_choices<V> const& c, V* kept) {
  V const scale = renormalises(rule, c) ? c.all() / c.left() : V(1);
  int lost = 0;
  for (int j = 0; j < c.K; ++j) {
    kept[j] = c.kept(j) ? scale * c.weight[j] : V(0);
    if (c.had(j) && !c.kept(j)) ++lost;
  }
  return lost;
}

/// Its gradient: with s = all / left, kept[j] = s weight[j], and s rises with the weight of every choice
/// and falls with that of those that are left.
template <class V>
void keep_contributions_backward(lost_contributions rule, token_choices<V> const& c, V const* dkept,
                                 V* dweight) {
  bool const scaled = renormalises(rule, c);
  V const left = scaled ? c.left() : V(1), s = scaled ? c.all() / left : V(1);
  V ds = 0;
  for (int j = 0; j < c.K && scaled; ++j)
    if (c.kept(j)) ds += dkept[j] * c.weight[j];
  for (int j = 0; j < c.K; ++j)
    dweight[j] = (c.kept(j) ? s * (dkept[j] - ds / left) : V(0)) + (c.had(j) ? ds / left : V(0));
}

}  // namespace detail

}  // namespace moe::inline MOE_ABI
