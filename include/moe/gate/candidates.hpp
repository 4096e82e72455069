// Selection among candidates that differ from token to token: lists of experts, masks of modalities.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/expects_on_host.hpp>
#include <moe/gate/row_copies.hpp>
#include <moe/gate/select.hpp>

namespace moe::inline MOE_ABI {

// As with `visible`, scores are not changed: a softmax still counts the experts that are no candidates. To
// leave them out there, too, set their logits to -inf.

/// Select among the experts that the token's list names; the others' keys become -inf.
template <class Select>
struct listed {
  static constexpr int max_k = Select::max_k;
  static constexpr int copies = 1 + row_copies<Select>;

  [[no_unique_address]] Select select{};
  /// [T+1] and [begin[T]]: the list of the token in row t of the logits is expert[begin[t] .. begin[t + 1]), in
  /// any order; what is no expert is passed over. Null begin: no lists, all are candidates. The caller's.
  std::int64_t const* begin = nullptr;
  std::int32_t const* expert = nullptr;

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    if (begin != nullptr) {
      R named = keys.copy();
      named.transform([](int, V) { return V(0); });
      for (std::int64_t i = begin[t.row]; i < begin[t.row + 1]; ++i)
        if (expert[i] >= 0 && expert[i] < keys.size()) named.add(expert[i], V(1));
      keys.transform(named, [](int, V s, V times) { return where(times > 0, s, no_score<V>); });
    }
    select(keys, chosen, t);
  }
};

/// Select among the experts that the mask shows to the token's class (its modality, say); the others' keys
/// become -inf.
template <class Select>
struct visible_to {
  static constexpr int max_k = Select::max_k;
  static constexpr int copies = row_copies<Select>;

  [[no_unique_address]] Select select{};
  /// [classes,E]: 0 hides an expert from a class; absent: all see all. The caller's.
  matrix_view<std::uint8_t const> mask{};
  /// [T]: the class of the token in row t of the logits, one outside of the mask sees no expert. Null: each
  /// row is its own class, mask is [T,E]. The caller's.
  std::int32_t const* class_of = nullptr;

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  /// @throws precondition_error on the CPU unless the mask has E columns.
  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    if (!mask.absent()) {
      detail::expects_on_host(mask.cols() == keys.size(), "visible_to: the mask has E columns",
                              "columns", mask.cols());
      std::int64_t const c = class_of == nullptr ? t.row : class_of[t.row];
      bool const known = c >= 0 && c < mask.rows();
      std::uint8_t const* const shown = mask.row(known ? c : 0);
      keys.transform([=](int e, V s) { return known && shown[e] != 0 ? s : no_score<V>; });
    }
    select(keys, chosen, t);
  }
};

static_assert(select_policy<listed<top_k<2>>, array_row<float>>);
static_assert(select_policy<visible_to<top_k<2>>, array_row<float>>);

}  // namespace moe::inline MOE_ABI
