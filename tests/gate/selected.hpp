// What a select policy chooses from a row of keys, for tests.
// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>
#include <support/laws.hpp>
#include <vector>

#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>

namespace moe_test {

template <class P, class V>
std::vector<int> selected(P const& p, std::vector<V> const& keys, moe::token const& t = {}) {
  owned_row<V> row(keys, copies_of<P>(0));
  moe::choices<P::max_k, V> chosen;
  p(row.row(), chosen, t);
  REQUIRE(chosen.k == p.k());
  return {chosen.expert, chosen.expert + chosen.k};
}

using ids = std::vector<int>;

}  // namespace moe_test
