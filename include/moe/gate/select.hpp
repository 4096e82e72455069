// Select policies: which experts a token goes to.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/score_row.hpp>
#include <moe/gate/row_copies.hpp>

namespace moe::inline MOE_ABI {

/// The k highest keys, best first, ties to the lower id; k <= MaxK at run time.
template <int MaxK>
class top_k {
 public:
  static constexpr int max_k = MaxK;

  constexpr top_k() noexcept = default;
  /// @throws precondition_error unless 1 <= k <= MaxK.
  explicit constexpr top_k(int k, call_site site = call_site::here()) : k_(k) {
    expects(k >= 1 && k <= MaxK, "top_k: 1 <= k <= MaxK", site, {{"k", k}, {"MaxK", MaxK}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept { return k_; }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<MaxK, typename R::value_type>& chosen,
                                            token const&) const {
    chosen.k = k_;
    if constexpr (requires { keys.pop_best(k_, chosen.expert); })
      keys.pop_best(k_, chosen.expert);
    else
      chosen.each([&](int j) { chosen.expert[j] = keys.pop_max(0, keys.size()).expert; });
  }

 private:
  int k_ = MaxK;
};

/// Select among the experts that a mask shows; the others' keys become -inf.
///
/// Scores are not changed: a softmax still counts hidden experts. To leave them out there, too, set
/// their logits to -inf.
template <class Select>
struct visible {
  static constexpr int max_k = Select::max_k;
  static constexpr int copies = row_copies<Select>;

  [[no_unique_address]] Select select{};
  std::uint8_t const* mask = nullptr;  ///< [E]: 0 hides an expert; null shows all.

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  template <score_row R>
    requires select_policy<Select, R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    using V = typename R::value_type;
    if (mask != nullptr)
      keys.transform([shown = mask](int e, V s) { return shown[e] != 0 ? s : no_score<V>; });
    select(keys, chosen, t);
  }
};

/// The experts that were given, not the best ones: replay of a recorded routing, forced routing.
///
/// An id that is negative, not below E, not a live candidate, or already taken by an earlier choice
/// gives no expert in its place; the other choices keep theirs.
template <int MaxK>
class replayed {
 public:
  static constexpr int max_k = MaxK;

  constexpr replayed() noexcept = default;
  /// @param ids  [T,k]: those of the token in row t of the logits at t * ld. The caller's.
  /// @throws precondition_error unless ids is given, 1 <= k <= MaxK and ld >= k.
  constexpr replayed(std::int32_t const* ids, int k, std::int64_t ld,
                     call_site site = call_site::here())
      : ids_(ids), ld_(ld), k_(k) {
    expects(ids != nullptr && k >= 1 && k <= MaxK && ld >= k,
            "replayed: ids are given, 1 <= k <= MaxK, ld >= k", site,
            {{"k", k}, {"MaxK", MaxK}, {"ld", ld}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept { return k_; }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<MaxK, typename R::value_type>& chosen,
                                            token const& t) const {
    chosen.k = k_;
    chosen.each([&](int j) {
      int const e = ids_ == nullptr ? -1 : ids_[t.row * ld_ + j];
      bool const known = e >= 0 && e < keys.size();
      chosen.expert[j] = keys.pop_max(known ? e : 0, known ? e + 1 : 0).expert;
    });
  }

 private:
  std::int32_t const* ids_ = nullptr;  // [T,k]
  std::int64_t ld_ = MaxK;
  int k_ = MaxK;
};

static_assert(select_policy<top_k<2>, array_row<float>>);
static_assert(select_policy<top_k<max_choices>, array_row<double>>);
static_assert(select_policy<visible<top_k<2>>, array_row<float>>);
static_assert(select_policy<replayed<2>, array_row<float>>);

}  // namespace moe::inline MOE_ABI
