// Selection that does not look at scores: experts from a table of words, or by a hash of the word.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

// Both take the scores of their experts, if a weigh policy wants them, from any logits; `constant_weight`
// wants none. An expert that is hidden or no live candidate gives -1 in its place, as with `replayed`.

/// The experts that a table has for the token's word.
/// Source: Roller et al., "Hash layers", 2021; DeepSeek-V4's first layers (tid2eid).
template <int MaxK>
class by_table {
 public:
  static constexpr int max_k = MaxK;

  constexpr by_table() noexcept = default;
  /// @param table  [words,k]: experts of each word, different ones; one that comes twice, or is no expert,
  ///               gives -1. The caller's.
  /// @param word   [T]: that of the token in row t of the logits; one outside of the table has no experts.
  ///               The caller's.
  /// @throws precondition_error unless 1 <= k <= MaxK, ld >= k and both are given.
  constexpr by_table(matrix_view<std::int32_t const> table, std::int32_t const* word,
                     call_site site = call_site::here())
      : table_(table), word_(word) {
    expects(table.cols() >= 1 && table.cols() <= MaxK && table.ld() >= table.cols() &&
                !table.absent() && word != nullptr,
            "by_table: the table is [words,k], 1 <= k <= MaxK, ld >= k; words are given", site,
            {{"k", table.cols()}, {"MaxK", MaxK}, {"ld", table.ld()}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept {
    return word_ == nullptr ? MaxK : static_cast<int>(table_.cols());
  }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<MaxK, typename R::value_type>& chosen,
                                            token const& t) const {
    std::int64_t const word = word_ == nullptr ? -1 : word_[t.row];
    bool const listed = word >= 0 && word < table_.rows();
    chosen.k = k();
    chosen.each([&](int j) {
      int const e = listed ? table_(word, j) : -1;
      bool const known = e >= 0 && e < keys.size();
      chosen.expert[j] = keys.pop_max(known ? e : 0, known ? e + 1 : 0).expert;
    });
  }

 private:
  matrix_view<std::int32_t const> table_{};
  std::int32_t const* word_ = nullptr;
};

/// k different experts by a hash of the token's word.
///
/// Choice j is expert (h0 + j h1) mod E, h0 in [0, E) and h1 in [1, (E - 1) / (k - 1)] being two parts of
/// word * multiplier mod 2^64 (double hashing): j h1 < E, so the experts differ. Choices are equally good:
/// the first is no better than the last.
/// Source: Roller et al., "Hash layers", 2021; Knuth's multiplicative hash.
template <int MaxK>
class by_hash {
 public:
  static constexpr int max_k = MaxK;
  /// 2^64 over the golden ratio, odd.
  static constexpr std::uint64_t golden = 0x9E3779B97F4A7C15u;

  constexpr by_hash() noexcept = default;
  /// @param word        [T]: that of the token in row t of the logits; null: its id. The caller's.
  /// @param multiplier  Odd: layers that hash differently have different ones.
  /// @throws precondition_error unless 1 <= k <= MaxK and the multiplier is odd.
  explicit constexpr by_hash(int k, std::int32_t const* word = nullptr,
                             std::uint64_t multiplier = golden, call_site site = call_site::here())
      : word_(word), multiplier_(multiplier), k_(k) {
    expects(k >= 1 && k <= MaxK && multiplier % 2 == 1,
            "by_hash: 1 <= k <= MaxK, the multiplier is odd", site,
            {{"k", k}, {"MaxK", MaxK}, {"multiplier", multiplier}});
  }

  MOE_HOST_DEVICE constexpr int k() const noexcept { return k_; }

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& keys, choices<MaxK, typename R::value_type>& chosen,
                                            token const& t) const {
    auto const word = static_cast<std::uint64_t>(word_ == nullptr ? t.id : word_[t.row]);
    // Of a product the high half depends on all of the word; once more, so that both parts do.
    std::uint64_t const once = (word + 1) * multiplier_;
    std::uint64_t const hash = (once ^ once >> 32) * multiplier_;
    auto const E = static_cast<std::uint32_t>(keys.size());
    std::uint32_t const steps = k_ == 1 ? 1 : (E - 1) / static_cast<std::uint32_t>(k_ - 1);
    std::uint32_t const first = share(hash >> 32, E);
    std::uint32_t const step = 1 + share(hash & 0xffffffffu, steps == 0 ? 1 : steps);
    chosen.k = k_;
    chosen.each([&](int j) {
      std::uint32_t const sum = first + static_cast<std::uint32_t>(j) * step;  // < 2 E
      auto const e = static_cast<int>(sum < E ? sum : sum - E);
      chosen.expert[j] = keys.pop_max(e, e + 1 <= keys.size() ? e + 1 : e).expert;
    });
  }

 private:
  /// 32 bits to [0, n), without a division.
  MOE_HOST_DEVICE static constexpr std::uint32_t share(std::uint64_t bits,
                                                       std::uint32_t n) noexcept {
    return static_cast<std::uint32_t>(bits * n >> 32);
  }

  std::int32_t const* word_ = nullptr;  // [T]
  std::uint64_t multiplier_ = golden;
  int k_ = MaxK;
};

static_assert(select_policy<by_table<8>, array_row<float>>);
static_assert(select_policy<by_hash<2>, array_row<double>>);

}  // namespace moe::inline MOE_ABI
