// The body of the kernel that routes: logits to experts, weights and counts, in one pass.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/lane_row.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// What `route` does, as a kernel body, and the first step of a routing table: how many pairs each
/// chunk of tokens sends to each expert. Block c has tokens [c chunk, c chunk + chunk).
///
/// The same experts, weights and scores as `route` in float, within what `lane_row` says of a GPU.
/// Never run on a GPU yet.
/// @note  Where a policy loops up to a k that is known at run time, `choices` lie in local memory (for
///        top_k<8>: 72 bytes a thread); what nvcc unrolls stays in registers.
/// @tparam MaxE   E is at most this; a multiple of Width. What a thread keeps is MaxE / Width scores.
/// @tparam Width  Threads that keep one token's row: 1, 2, 4, ... 32, or Threads for a whole block.
template <class Gate, int MaxE, int Width, int Threads = 128>
struct gate_kernel {
  static_assert(Width <= warp_size || Width == Threads);
  static_assert(MaxE % Width == 0 && Threads % warp_size == 0);

  static constexpr int threads = Threads;
  static constexpr bool in_warp = Width <= warp_size;

  struct nothing {};
  struct shared {
    std::int32_t count[MaxE];
    [[no_unique_address]] std::conditional_t<in_warp, nothing, row_exchange<MaxE>> exchange;
  };

  template <thread_block B>
  using lanes = std::conditional_t<in_warp, sub_warp<B, Width>, whole_block<B, MaxE>>;
  template <thread_block B>
  using row = lane_row<lanes<B>, MaxE / Width>;

  [[no_unique_address]] Gate gate{};

  /// @param logits  [T,E] in; as for `route`.
  /// @param chunk   Tokens of a block, at least 1; there are at least T / chunk blocks, rounded up.
  /// @param out     T, K = gate.k(), E, tokens in; expert, weight, score (if not null) out.
  /// @param scores  [T,E] out, or absent; as for `route`.
  /// @param counts  [blocks,E] out, or null: pairs of a chunk that go to an expert.
  /// @pre   What `route` demands, which the caller of the kernel has to check.
  template <thread_block B, class L>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<L> logits, int chunk,
                                  basic_routing<float> out, matrix_view<float> scores,
                                  std::int32_t* counts) const {
    static_assert(token_gate<Gate, row<B>>);
    auto group = group_of(b, s);
    for (int e = b.thread(); e < out.E; e += Threads) s.count[e] = 0;
    b.sync();

    std::int64_t const first = std::int64_t(chunk) * b.block();
    std::int64_t const last = first + chunk < out.T ? first + chunk : out.T;
    // As many rounds in every thread, so that the compiler knows the warp to be together.
    for (int i = 0; i < chunk; i += Threads / Width) {
      std::int64_t const t = first + i + b.thread() / Width;
      if (t < last) route_token(b, s, group, t, logits, out, scores);
    }

    b.sync();
    if (counts == nullptr) return;
    std::int32_t* const own = counts + std::int64_t(b.block()) * out.E;  // [E]
    for (int e = b.thread(); e < out.E; e += Threads) own[e] = s.count[e];
  }

 private:
  template <thread_block B>
  MOE_HOST_DEVICE static lanes<B> group_of(B& b, shared& s) {
    if constexpr (in_warp)
      return lanes<B>(b);
    else
      return lanes<B>(b, s.exchange);
  }

  template <thread_block B, class L>
  MOE_HOST_DEVICE void route_token(B& b, shared& s, lanes<B>& group, std::int64_t t,
                                   matrix_view<L> logits, basic_routing<float> const& out,
                                   matrix_view<float> scores) const {
    bool const live = out.tokens.is_live(t);
    std::uint32_t invalid = 0;
    row<B> r(group, out.E, [&](int e) {
      auto const l = static_cast<float>(logits(t, e));
      invalid |= static_cast<std::uint32_t>(is_invalid_logit(l));
      return l;
    });
    bool const valid = group.highest(invalid) == 0;
    choices<Gate::max_k> chosen;
    if (!valid)
      r.transform([](int, float) { return no_score<float>; });
    else if (live || !scores.absent())
      gate(r, chosen, out.tokens.at(t));
    if (!scores.absent()) r.transform([&](int e, float v) { return scores(t, e) = v; });

    int const nowhere = live ? invalid_token : no_candidate;
    MOE_UNROLL
    for (int j = 0; j < Gate::max_k; ++j) {
      if (j >= out.K) break;
      int const expert = valid && live ? chosen.expert[j] : nowhere;
      float const score = out.score != nullptr && expert >= 0 ? r.at(expert) : 0.0f;
      if (group.rank() != j % Width) continue;
      std::int64_t const i = t * out.K + j;
      out.expert[i] = expert;
      out.weight[i] = expert < 0 ? 0.0f : chosen.weight[j];
      if (out.score != nullptr) out.score[i] = score;
      if (expert >= 0) b.atomic_add(&s.count[expert], 1);
    }
  }
};

}  // namespace moe::inline MOE_ABI
