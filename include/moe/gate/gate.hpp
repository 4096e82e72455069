// A token-choice gate as the composition of a score, a select and a weigh policy.
// SPDX-License-Identifier: MIT
#pragma once

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/gate/row_copies.hpp>

namespace moe::inline MOE_ABI {

/// logits -> Score -> scores -> Select -> experts -> Weigh -> weights, for one token.
///
/// A trivially copyable value if its policies are: it can be a kernel argument.
/// Example: `gate<softmax, top_k<2>, renormalised>` is Mixtral's router.
template <class Score, class Select, class Weigh>
struct gate {
  using score_type = Score;
  using select_type = Select;
  using weigh_type = Weigh;

  static constexpr int max_k = Select::max_k;
  /// The keys that Select may destroy are one copy.
  static constexpr int copies = 1 + row_copies<Score> + row_copies<Select>;

  [[no_unique_address]] Score score{};
  [[no_unique_address]] Select select{};
  [[no_unique_address]] Weigh weigh{};

  MOE_HOST_DEVICE constexpr int k() const noexcept { return select.k(); }

  /// @param row  [E] in: logits; out: scores, -inf where there is no candidate.
  /// @post  chosen.k == k(); chosen.expert and .weight filled as Select and Weigh say.
  template <score_row R>
    requires score_policy<Score, R> && select_policy<Select, R> && weigh_policy<Weigh, R, max_k>
  MOE_HOST_DEVICE constexpr void operator()(R& row, choices<max_k, typename R::value_type>& chosen,
                                            token const& t) const {
    score(row, t);
    R keys = row.copy();
    select(keys, chosen, t);
    weigh(row, chosen);
  }

  /// What backward needs, from the logits again and without selecting again.
  /// @param row     [E] in: logits; out: scores.
  /// @param chosen  in: k and experts as the forward left them; out: their weights. An expert that
  ///                is not a candidate becomes -1.
  template <score_row R>
    requires score_policy<Score, R> && weigh_policy<Weigh, R, max_k>
  MOE_HOST_DEVICE constexpr void rescore(R& row, choices<max_k, typename R::value_type>& chosen,
                                         token const& t) const {
    score(row, t);
    read_scores(row, chosen);
    chosen.each([&](int j) {
      if (!is_candidate(chosen.weight[j])) chosen.expert[j] = -1;
    });
    weigh(row, chosen);
  }

  /// @param scores   [E] as the forward left them.
  /// @param chosen   As the forward left them.
  /// @param dchosen  weight[j]: gradient of the loss with respect to chosen.weight[j].
  /// @param dscores  [E] in: gradient that reaches the scores directly; out: that of the logits.
  template <score_row R>
    requires score_policy<Score, R> && weigh_policy<Weigh, R, max_k>
  MOE_HOST_DEVICE constexpr void backward(R const& scores,
                                          choices<max_k, typename R::value_type> const& chosen,
                                          choices<max_k, typename R::value_type> const& dchosen,
                                          R& dscores, token const& t) const {
    weigh.backward(scores, chosen, dchosen, dscores);
    score.backward(scores, dscores, t);
  }
};

}  // namespace moe::inline MOE_ABI
