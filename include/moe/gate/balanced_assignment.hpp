// BASE: in training tokens are assigned so that all experts have the same load, by an auction.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/assign_checks.hpp>
#include <moe/gate/route.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// What became of an auction.
struct auction_result {
  double eps = 0;         ///< The assignment's sum of logits is within tokens * eps of the best.
  std::int64_t bids = 0;  ///< Each costs O(E).
  std::int64_t unassigned = 0;  ///< Tokens that no expert had room for: only where logits are -inf.
};

namespace detail {

/// A place at an expert, and what the next token has to outbid.
struct auction_slot {
  double price;
  std::int32_t token;  ///< -1: nobody's.

  /// For heaps whose first element is the cheapest.
  friend constexpr bool operator<(auction_slot const& a, auction_slot const& b) noexcept {
    return a.price > b.price;
  }
};

inline constexpr char const* auction_rule =
    "assign_balanced: scratch has auction_scratch(T, E) bytes";

/// Tokens bid for places, one after another; each bid keeps its token within eps of the best it could do
/// at these prices, and so the whole within tokens * eps (Bertsekas' auction, C equal places each).
template <class L>
class auction {
 public:
  auction(matrix_view<L> logits, std::int64_t C, auction_slot* slots, std::int32_t* waiting,
          auction_result& result, double range)
      : logits_(logits),
        C_(C),
        slots_(slots),
        waiting_(waiting),
        result_(result),
        most_raise_(range + result.eps) {}

  /// @param waiting  The first n of [T]: tokens without a place; used as a ring.
  /// @param most     Bids, so that nothing hangs where -inf logits leave too few places.
  void run(std::int64_t n, std::int64_t most, matrix_view<std::int32_t> ids) {
    std::int64_t const E = logits_.cols(), T = logits_.rows();
    std::fill_n(slots_, E * C_, auction_slot{0, -1});
    std::int64_t head = 0;
    while (n > 0 && result_.bids < most) {
      std::int32_t const t = waiting_[head];
      head = head + 1 == T ? 0 : head + 1;
      --n;
      std::int32_t const loser = bid(t);
      if (loser < 0) continue;
      std::int64_t const tail = head + n < T ? head + n : head + n - T;
      waiting_[tail] = loser;
      ++n;
    }
    for (std::int64_t e = 0; e < E; ++e)
      for (std::int64_t c = 0; c < C_; ++c)
        if (std::int32_t const t = slots_[e * C_ + c].token; t >= 0)
          ids(t, 0) = static_cast<std::int32_t>(e);
    result_.unassigned = n;
  }

 private:
  double value(std::int32_t t, std::int64_t e) const noexcept {
    return static_cast<double>(logits_(t, e)) - slots_[e * C_].price;
  }

  /// @return The token that lost its place, or -1.
  std::int32_t bid(std::int32_t t) noexcept {
    ++result_.bids;
    double best = no_score<double>, second = no_score<double>;
    std::int64_t at = 0;
    for (std::int64_t e = 0; e < logits_.cols(); ++e) {
      double const v = value(t, e);
      if (v > best) {
        second = best;
        best = v;
        at = e;
      } else if (v > second) {
        second = v;
      }
    }
    auction_slot* const slot = slots_ + at * C_;
    // The next cheapest place of the same expert: one of the first element's two children.
    for (std::int64_t c = 1; c <= 2 && c < C_; ++c)
      second = std::max(second, static_cast<double>(logits_(t, at)) - slot[c].price);
    double const raise = std::min(best - second + result_.eps, most_raise_);
    double const price = slot->price + raise;
    std::int32_t const loser = slot->token;
    std::pop_heap(slot, slot + C_);
    slot[C_ - 1] = {price, t};
    std::push_heap(slot, slot + C_);
    return loser;
  }

  matrix_view<L> logits_;
  std::int64_t C_;
  auction_slot* slots_;    // [E,C], a heap for each expert
  std::int32_t* waiting_;  // [T]
  auction_result& result_;
  double most_raise_;
};

}  // namespace detail

/// Bytes of scratch for assign_balanced.
inline std::size_t auction_scratch(std::int64_t T, int E) noexcept {
  return memory_size().add<std::int32_t>(T).add<detail::auction_slot>((T + E - 1) / E * E).bytes();
}

/// One expert for each token. In training: so that each expert has at most T'/E tokens, rounded up (T'
/// counts those that take part), and the sum of the tokens' logits with their experts is the greatest
/// possible within T' eps, eps = max((greatest - least logit) / 50, 1e-4). Outside training: the
/// expert of the highest logit. Ties go to the lower id.
///
/// No gradient flows. The weight is that of a gate which is told the ids,
///
///     moe::gate<moe::sigmoid, moe::replayed<1>, moe::as_scored> const gate{
///         {}, moe::replayed<1>(ids.data(), 1, ids.ld()), {}};
///
/// and `mix_with_token` makes out = a FFN(x) + (1 - a) x of it.
///
/// @param logits   [T,E] in; -inf = no candidate.
/// @param tokens   Masked tokens, and those with NaN or +inf, take no part and get no_candidate.
/// @param scratch  auction_scratch(T, E) bytes.
/// @param ids      [T,1] out.
/// @throws precondition_error if a shape is out of range or scratch is too small.
/// @note  One thread: tokens bid in turn. Allocates nothing. Not causal in training. Logits of -inf may
///        leave tokens without a place; they get no_candidate and are counted in `unassigned`.
/// @cost  O(E) for each bid; without -inf logits a place gets at most about 50 bids, in practice few.
/// Source: Lewis et al., "BASE layers", 2021; Bertsekas, "Auction algorithms for network flow problems".
template <class L>
auction_result assign_balanced(cpu const&, matrix_view<L> logits, batch const& tokens,
                               memory scratch, matrix_view<std::int32_t> ids,
                               call_site site = call_site::here()) {
  detail::check_assign("assign_balanced: logits are [T,E], E >= 1, ld >= E",
                       "assign_balanced: ids are [T,1], and do not overlap the logits", logits, ids,
                       1, site);
  std::int64_t const T = logits.rows(), E = logits.cols();
  auto* const waiting = scratch.take<std::int32_t>(T, detail::auction_rule, site);
  std::int64_t n = 0;
  double least = -no_score<double>, greatest = no_score<double>;
  for (std::int64_t t = 0; t < T; ++t) {
    double low = -no_score<double>, high = no_score<double>;
    int best = no_candidate;
    bool takes_part = tokens.is_live(t);
    for (std::int64_t e = 0; e < E && takes_part; ++e) {
      auto const l = static_cast<double>(logits(t, e));
      takes_part = !is_invalid_logit(l);
      if (!is_candidate(l)) continue;
      low = std::min(low, l);
      if (l > high) {
        high = l;
        best = static_cast<int>(e);
      }
    }
    ids(t, 0) = takes_part && !tokens.training ? best : static_cast<int>(no_candidate);
    if (!takes_part || best < 0) continue;
    least = std::min(least, low);
    greatest = std::max(greatest, high);
    waiting[n++] = static_cast<std::int32_t>(t);
  }
  auction_result result;
  if (!tokens.training || n == 0) return result;
  std::int64_t const C = (n + E - 1) / E;
  auto* const slots = scratch.take<detail::auction_slot>(E * C, detail::auction_rule, site);
  result.eps = std::max((greatest - least) / 50, 1e-4);
  detail::auction(logits, C, slots, waiting, result, greatest - least).run(n, 200 * n, ids);
  return result;
}

/// From the routing of one choice with weight a, over E experts, to one of two over E + 1: the second
/// choice is expert E with weight 1 - a. With an expert_map in which E is a copy expert, combine gives
/// a FFN(x) + (1 - a) x. A token without an expert keeps having none.
///
/// @param one  T tokens, K = 1, E experts; made by `route`.
/// @param two  Arrays for T tokens, K = 2, E + 1 experts. Out: expert, weight, score, tokens.
/// @throws precondition_error if the shapes are others.
/// @note  Allocates nothing.
template <std::floating_point V>
void mix_with_token(basic_routing<V> const& one, basic_routing<V>& two,
                    call_site site = call_site::here()) {
  expects(one.K == 1 && one.token_begin == nullptr && two.K == 2 && two.T == one.T &&
              two.E == one.E + 1,
          "mix_with_token: one has K = 1, two has K = 2, the same T and an expert more", site,
          {{"one.K", one.K},
           {"two.K", two.K},
           {"one.T", one.T},
           {"two.T", two.T},
           {"one.E", one.E},
           {"two.E", two.E}});
  two.token_begin = nullptr;
  two.tokens = one.tokens;
  two.chunk_counts = {};
  for (std::int64_t t = 0; t < one.T; ++t) {
    std::int32_t const e = one.expert[t];
    two.expert[2 * t] = e;
    two.expert[2 * t + 1] = e < 0 ? e : one.E;
    two.weight[2 * t] = e < 0 ? V(0) : one.weight[t];
    two.weight[2 * t + 1] = e < 0 ? V(0) : 1 - one.weight[t];
    if (two.score != nullptr)
      two.score[2 * t] = two.score[2 * t + 1] = e < 0 ? V(0) : one.rank_score(t);
  }
}

/// The gradient of mix_with_token: dweight[t] = dtwo[2 t] - dtwo[2 t + 1], 0 for tokens without an expert.
///
/// @param two      What mix_with_token made.
/// @param dtwo     [T*2] in. @param dweight  [T] out.
/// @throws precondition_error if the shapes are others.
template <std::floating_point V>
void mix_with_token_backward(basic_routing<V> const& two,
                             std::type_identity_t<vector_view<V const>> dtwo,
                             std::type_identity_t<vector_view<V>> dweight,
                             call_site site = call_site::here()) {
  expects(two.K == 2 && dtwo.size() == 2 * two.T && dweight.size() == two.T,
          "mix_with_token_backward: two has K = 2, dtwo is [T*2], dweight is [T]", site,
          {{"two.K", two.K}, {"T", two.T}, {"dtwo", dtwo.size()}, {"dweight", dweight.size()}});
  for (std::int64_t t = 0; t < two.T; ++t)
    dweight[t] = two.expert[2 * t] < 0 ? V(0) : dtwo[2 * t] - dtwo[2 * t + 1];
}

}  // namespace moe::inline MOE_ABI
