// Preconditions that dispatch, combine and their backwards share.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Checks the arguments of `function`, one after the other. Views of constant elements are inputs, the
/// others outputs, and an output overlaps no other argument. O(1) each; a message is only made when
/// one is refused.
class movement_checks {
 public:
  movement_checks(char const* function, routing_table const& table, std::int64_t M, call_site site)
      : function_(function), table_(table), M_(M), site_(site) {
    demand(table.T >= 0 && table.counts != nullptr && (table.T == 0 || table.row_of != nullptr), "",
           "table was filled by build_table", {{"table.T", table.T}});
    demand(M >= 0, "", "M >= 0", {{"M", M}});
  }

  /// A [T,M] view.
  template <class S>
  void tokens(matrix_view<S> view, char const* name) {
    demand(view.rows() == table_.T && view.cols() == M_ && view.ld() >= M_, name,
           " is [T,M] with ld >= M",
           {{"rows", view.rows()},
            {"cols", view.cols()},
            {"ld", view.ld()},
            {"T", table_.T},
            {"M", M_}});
    add(view, name);
  }

  /// A [N,M] view or longer.
  /// @param in_place_of  An argument that it may be: what this returned for that; -1 = none.
  template <class S>
  int rows(matrix_view<S> view, char const* name, int in_place_of = -1) {
    std::int64_t const N = table_.counts->rows;
    demand(view.rows() >= N && view.cols() == M_ && view.ld() >= M_, name,
           " has N rows or more of M columns, ld >= M",
           {{"rows", view.rows()}, {"cols", view.cols()}, {"ld", view.ld()}, {"N", N}, {"M", M_}});
    return add(view, name, in_place_of);
  }

  /// A value for each pair: [T,K].
  template <class V>
  void pairs(vector_view<V> view, char const* name) {
    demand(view.size() == table_.pairs(), name, " has one value for each pair",
           {{"size", view.size()}, {"pairs", table_.pairs()}});
    add(matrix_view(view.data(), 1, view.size()), name);
  }

  /// Nobody but the caller knows whether a pair without a row is at a copy expert.
  void all_computed() const {
    demand(table_.counts->uncomputed == 0, "",
           "tokens are given if pairs are at experts that are not computed",
           {{"uncomputed", table_.counts->uncomputed}});
  }

 private:
  struct argument {
    char const* name;
    matrix_view<std::byte const> bytes;
    std::int64_t ld;
    bool is_output;
  };

  template <class S>
  int add(matrix_view<S> view, char const* name, int in_place_of = -1) {
    auto const size = view.span() * static_cast<std::int64_t>(sizeof(S));
    argument const added{name,
                         {reinterpret_cast<std::byte const*>(view.data()), 1, size},
                         view.ld(),
                         !std::is_const_v<S>};
    for (int i = 0; i < count_; ++i) {
      argument const& other = arguments_[i];
      bool const same = other.bytes.data() == added.bytes.data() && other.ld == added.ld;
      bool const apart = !overlap(other.bytes, added.bytes);
      bool const fine =
          !(other.is_output || added.is_output) || (i == in_place_of && same) || apart;
      if (!fine) [[unlikely]]
        demand(false, (std::string(other.name) + " and " + name).c_str(),
               i == in_place_of ? " are one view or do not overlap" : " do not overlap", {});
    }
    arguments_[count_] = added;
    return count_++;
  }

  void demand(bool condition, char const* name, char const* rule,
              std::initializer_list<named_value> values) const {
    if (!condition) [[unlikely]]
      refuse((std::string(function_) + ": " + name + rule).c_str(), site_, values);
  }

  static constexpr int most = 8;

  char const* function_;
  routing_table const& table_;
  std::int64_t M_;
  call_site site_;
  argument arguments_[most];
  int count_ = 0;
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
