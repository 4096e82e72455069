// Group-limited selection: a token goes to experts of its best groups alone.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/gate/row_copies.hpp>
#include <moe/gate/select.hpp>

namespace moe::inline MOE_ABI {

/// Select among the experts of the `kept` best groups; the others' keys become -inf.
///
/// Group g of G has experts [g n, g n + n), n = E / G rounded up: the last ones have fewer where G does
/// not divide E. A group's key is the sum of its `best` highest keys (of all that it has, if they are
/// fewer; -inf if it has no candidate), ties between groups go to the lower one. With groups that are
/// nodes, `kept` bounds the nodes a token is sent to. Where the kept groups have fewer than k candidates,
/// the last choices are -1: never an expert of another group.
///
/// Keys may be negative, as biased ones are: the others' have to become -inf for that. (0, as some
/// implementations have it, puts them above the negative keys of the kept groups.)
/// Source: DeepSeek-V2 (best = 1), DeepSeek-V3 (2), Megatron (k / kept).
template <class Select>
class group_limited {
 public:
  static constexpr int max_k = Select::max_k;
  static constexpr int most_groups = 64;
  /// One has the keys of the groups; the best keys are taken out of the other.
  static constexpr int copies = 2 + row_copies<Select>;

  constexpr group_limited() noexcept = default;
  /// @param groups  G. @param kept  Groups whose experts may be selected. @param best  See above.
  /// @throws precondition_error unless 1 <= kept <= groups <= 64 and best >= 1.
  constexpr group_limited(int groups, int kept, int best, Select const& select = {},
                          call_site site = call_site::here())
      : select_(select), groups_(groups), kept_(kept), best_(best) {
    expects(kept >= 1 && kept <= groups && groups <= most_groups && best >= 1,
            "group_limited: 1 <= kept <= groups <= 64, best >= 1", site,
            {{"kept", kept}, {"groups", groups}, {"best", best}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select_.k(); }

  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    int const n = (keys.size() + groups_ - 1) / groups_;
    std::uint64_t const kept = kept_ < groups_ ? best_groups(keys, n) : ~std::uint64_t{0};
    // Group by group: a quotient e / n for each expert is no vector code.
    for (int g = 0; g < groups_ && kept_ < groups_; ++g)
      if ((kept >> g & 1u) == 0)
        keys.transform([first = g * n, last = g * n + n](int e, V s) {
          return where(e >= first && e < last, no_score<V>, s);
        });
    select_(keys, chosen, t);
  }

 private:
  /// Bit g: whether group g is kept. A group past the last expert is none.
  template <class R>
  MOE_HOST_DEVICE constexpr std::uint64_t best_groups(R const& keys, int n) const {
    using V = typename R::value_type;
    int const E = keys.size(), groups = (E + n - 1) / n;
    // The keys of groups stand in the places of the first experts, so that a row of lanes keeps them, too.
    R of_groups = keys.copy();
    of_groups.transform([=](int g, V) { return where(g < groups, V(0), no_score<V>); });
    R left = keys.copy();
    for (int g = 0; g < groups; ++g) {
      int const first = g * n, last = first + n < E ? first + n : E;
      V sum = 0;
      for (int i = 1; i < best_; ++i) sum += taken(left.pop_max(first, last).key, i > 1);
      sum += taken(left.max(first, last), best_ > 1);
      of_groups.add(g, sum);
    }
    std::uint64_t kept = 0;
    for (int i = 0; i < kept_; ++i) {
      int const g = of_groups.pop_max(0, groups).expert;
      kept |= g < 0 ? 0 : std::uint64_t{1} << g;
    }
    return kept;
  }

  /// A key of a group; 0 for what it does not have besides others.
  template <class V>
  MOE_HOST_DEVICE static constexpr V taken(V key, bool besides) {
    return where(besides && !is_candidate(key), V(0), key);
  }

  [[no_unique_address]] Select select_{};
  int groups_ = 1;
  int kept_ = 1;
  int best_ = 1;
};

static_assert(select_policy<group_limited<top_k<8>>, array_row<float>>);
static_assert(select_policy<group_limited<top_k<8>>, array_row<double>>);

}  // namespace moe::inline MOE_ABI
