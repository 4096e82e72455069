// Preconditions that dispatch, combine and their backwards share.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Checks the arguments of `function`. O(1) each; a message is only made when one is refused.
class movement_checks {
 public:
  movement_checks(char const* function, routing_table const& table, call_site site)
      : function_(function), table_(table), site_(site) {
    demand(table.T >= 0 && table.counts != nullptr && (table.T == 0 || table.row_of != nullptr), "",
           "table was filled by build_table", {{"table.T", table.T}});
  }

  /// A [T,M] view.
  template <class S>
  void tokens(matrix_view<S> view, char const* name, std::int64_t M) const {
    demand(view.rows() == table_.T && view.cols() == M && view.ld() >= M, name,
           " is [T,M] with ld >= M",
           {{"rows", view.rows()},
            {"cols", view.cols()},
            {"ld", view.ld()},
            {"T", table_.T},
            {"M", M}});
  }

  /// A [N,M] view or longer.
  template <class S>
  void rows(matrix_view<S> view, char const* name, std::int64_t M) const {
    std::int64_t const N = table_.counts->rows;
    demand(view.rows() >= N && view.cols() == M && view.ld() >= M, name,
           " has N rows or more of M columns, ld >= M",
           {{"rows", view.rows()}, {"cols", view.cols()}, {"ld", view.ld()}, {"N", N}, {"M", M}});
  }

  /// A value for each pair: [T,K].
  template <class V>
  void pairs(vector_view<V> view, char const* name) const {
    demand(view.size() == table_.pairs(), name, " has one value for each pair",
           {{"size", view.size()}, {"pairs", table_.pairs()}});
  }

  template <class A, class B>
  void apart(matrix_view<A> a, matrix_view<B> b, char const* names) const {
    demand(!overlap(a, b), names, " do not overlap", {});
  }

  /// Overlapping views are one view, or there is no overlap.
  template <class A, class B>
  void same_or_apart(matrix_view<A> a, matrix_view<B> b, char const* names) const {
    bool const same = a.data() == b.data() && a.ld() == b.ld();
    demand(same || !overlap(a, b), names, " are one view or do not overlap", {});
  }

  /// Nobody but the caller knows whether a pair without a row is at a copy expert.
  void all_computed() const {
    demand(table_.counts->uncomputed == 0, "",
           "tokens are given if pairs are at experts that are not computed",
           {{"uncomputed", table_.counts->uncomputed}});
  }

  void demand(bool condition, char const* name, char const* rule,
              std::initializer_list<named_value> values) const {
    if (!condition) [[unlikely]]
      refuse((std::string(function_) + ": " + name + rule).c_str(), site_, values);
  }

 private:
  char const* function_;
  routing_table const& table_;
  call_site site_;
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
