// Preconditions that dispatch, combine and their backwards share.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/kernel_executor.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {
namespace detail {

/// Checks the arguments of `function`, one after the other. Views of constant elements are inputs, the
/// others outputs, and an output overlaps no other argument. O(1) each; a message is only made when
/// one is refused.
class movement_checks {
 public:
  movement_checks(cpu const&, char const* function, routing_table const& table, std::int64_t M,
                  call_site site)
      : movement_checks(function, table, M, site) {
    N_ = table.counts->rows;
    fewest_pairs_ = most_pairs_ = table.pairs();
    uncomputed_ = table.counts->uncomputed;
  }

  /// What lies in the memory of a device is not read: only bounds of the sizes are known.
  template <kernel_executor X>
  movement_checks(X const&, char const* function, routing_table const& table, std::int64_t M,
                  call_site site)
      : movement_checks(function, table, M, site) {
    demand(table.K >= 1 && table.K <= max_choices && table.max_rows >= 0, "",
           "1 <= table.K <= 16, table.max_rows >= 0",
           {{"table.K", table.K}, {"table.max_rows", table.max_rows}});
    N_ = table.max_rows;
    most_pairs_ = table.T * table.K;
    fewest_pairs_ = table.token_begin == nullptr || table.T == 0 ? most_pairs_ : 1;
    uncomputed_ = table.computed_only ? 0 : most_pairs_;
    uncomputed_name_ = "at most";
    rows_rule_ = " has table.max_rows rows or more of M columns, ld >= M";
    rows_name_ = "table.max_rows";
    pairs_rule_ = table.token_begin == nullptr ? " has a value for each pair: T * K"
                                               : " has a value for each pair, 1 to T * K of them";
    pairs_name_ = "T * K";
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
    demand(view.rows() >= N_ && view.cols() == M_ && view.ld() >= M_, name, rows_rule_,
           {{"rows", view.rows()},
            {"cols", view.cols()},
            {"ld", view.ld()},
            {rows_name_, N_},
            {"M", M_}});
    return add(view, name, in_place_of);
  }

  /// A value for each pair: [T,K].
  template <class V>
  void pairs(vector_view<V> view, char const* name) {
    demand(view.size() >= fewest_pairs_ && view.size() <= most_pairs_, name, pairs_rule_,
           {{"size", view.size()}, {pairs_name_, most_pairs_}});
    add(matrix_view(view.data(), 1, view.size()), name);
  }

  /// Nobody but the caller knows whether a pair without a row is at a copy expert.
  void all_computed() const {
    demand(uncomputed_ == 0, "", "tokens are given if pairs are at experts that are not computed",
           {{uncomputed_name_, uncomputed_}});
  }

 private:
  movement_checks(char const* function, routing_table const& table, std::int64_t M, call_site site)
      : function_(function), table_(table), M_(M), site_(site) {
    demand(table.T >= 0 && table.counts != nullptr && (table.T == 0 || table.row_of != nullptr), "",
           "table was filled by build_table", {{"table.T", table.T}});
    demand(M >= 0, "", "M >= 0", {{"M", M}});
  }

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
  std::int64_t N_ = 0;  ///< Rows that the table may have.
  std::int64_t fewest_pairs_ = 0, most_pairs_ = 0;
  std::int64_t uncomputed_ = 0;  ///< Pairs, or the most there may be.
  char const* rows_rule_ = " has N rows or more of M columns, ld >= M";
  char const* rows_name_ = "N";
  char const* pairs_rule_ = " has one value for each pair";
  char const* pairs_name_ = "pairs";
  char const* uncomputed_name_ = "uncomputed";
  call_site site_;
  argument arguments_[most];
  int count_ = 0;
};

}  // namespace detail
}  // namespace moe::inline MOE_ABI
