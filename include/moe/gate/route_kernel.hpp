// The body of the kernel that routes: logits to experts, weights and sums, in one pass.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/lane_row.hpp>
#include <moe/core/lanes.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/gate_sums.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// Who keeps one token's row in a kernel: `Width` lanes of a warp, or all Threads of a block.
/// @tparam MaxE  E is at most this; a multiple of Width. A thread keeps MaxE / Width scores.
/// @tparam MinE  E is at least this: what every lane has needs no check.
template <int MaxE, int Width, int Threads, int MinE = 1>
struct row_home {
  static_assert(Width <= warp_size || Width == Threads);
  static_assert(MaxE % Width == 0 && Threads % warp_size == 0);

  static constexpr int max_E = MaxE, width = Width, threads = Threads;
  static constexpr bool in_warp = Width <= warp_size;
  static constexpr int rows = Threads / Width;  ///< That a block keeps at once.

  struct nothing {};
  using shared = std::conditional_t<in_warp, nothing, row_exchange<MaxE>>;
  template <thread_block B>
  using lanes = std::conditional_t<in_warp, sub_warp<B, Width>, whole_block<B, MaxE>>;
  template <thread_block B>
  using row = lane_row<lanes<B>, MaxE / Width, MinE / Width>;

  /// Which of the block's rows this thread works on.
  template <thread_block B>
  MOE_HOST_DEVICE static int row_of(B& b) {
    if constexpr (!in_warp)
      return 0;
    else if constexpr (Width == warp_size)
      // From one lane, so that the compiler knows that all go the same way: no shuffle then has to
      // wait for lanes that may have parted.
      return b.shuffle(all_lanes, b.thread() / warp_size, 0);
    else
      return b.thread() / Width;
  }

  template <thread_block B>
  MOE_HOST_DEVICE static lanes<B> lanes_of(B& b, [[maybe_unused]] shared& s) {
    if constexpr (in_warp)
      return lanes<B>(b);
    else
      return lanes<B>(b, s);
  }
};

namespace detail {

/// Whether a logit is NaN or +inf: in a kernel one instruction.
MOE_HOST_DEVICE inline bool is_no_logit(float l) noexcept {
  return !(l < -no_score<float>);
}

/// The score of the expert that each lane has, choice begin + rank.
template <class Row, int MaxK>
MOE_HOST_DEVICE float score_of_own(Row const& row, choices<MaxK> const& chosen, int begin, int rank,
                                   int expert) {
  if constexpr (requires { row.gather(expert); }) {
    return row.gather(expert < 0 ? 0 : expert);
  } else {
    float score = 0;
    chosen.each([&](int j) {
      float const s = row.at(chosen.expert[j] < 0 ? 0 : chosen.expert[j]);
      score = j == begin + rank ? s : score;
    });
    return score;
  }
}

/// One token's gate, by the lanes of its row, from its logits on.
///
/// No lane branches by what the row tells, so that the compiler sees the lanes together: of a token
/// without valid logits the gate sees a row without candidates.
/// @param row   In: logits; out: scores.
/// @param took  took(j, expert), for each choice in one of the lanes.
template <int Width, class Row, class Gate, class Took>
MOE_HOST_DEVICE void route_row(Gate const& gate, Row& row, int rank, bool valid, std::int64_t t,
                               basic_routing<float> const& out, matrix_view<float> scores,
                               Took const& took) {
  constexpr int max_k = Gate::max_k;
  if (!valid) row.transform([](int, float) { return no_score<float>; });
  choices<max_k> chosen;
  gate(row, chosen, out.tokens.at(t));
  if (!scores.absent()) {
    float* const own = scores.row(t) + rank;
    row.transform([=](int e, float s) { return own[e - rank] = s; });
  }
  bool const live = out.tokens.is_live(t);
  int const nowhere = live ? invalid_token : no_candidate;
  MOE_UNROLL
  for (int begin = 0; begin < max_k; begin += Width) {
    // Lane j has choice begin + j.
    int expert = -1;
    float weight = 0, score = 0;
    MOE_UNROLL
    for (int j = begin; j < max_k && j < begin + Width; ++j) {
      bool const mine = rank == j - begin;
      expert = mine ? chosen.expert[j] : expert;
      weight = mine ? chosen.weight[j] : weight;
    }
    if (out.score != nullptr) score = score_of_own(row, chosen, begin, rank, expert);
    expert = valid && live ? expert : nowhere;
    int const j = begin + rank;
    if (rank >= Width || j >= out.K) continue;
    std::int64_t const i = t * out.K + j;
    out.expert[i] = expert;
    out.weight[i] = expert < 0 ? 0.0f : weight;
    if (out.score != nullptr) out.score[i] = expert < 0 ? 0.0f : score;
    took(j, expert);
  }
}

}  // namespace detail

/// What `route` does, as a kernel body. Block c has tokens [c chunk, c chunk + chunk), and makes the
/// sums of that chunk.
///
/// The same experts, weights and scores as `route` in float, within what `lane_row` says of a GPU.
/// Never run on a GPU yet.
/// @tparam Home  A `row_home` with room for E.
template <class Gate, class Home>
struct route_kernel {
  using home = Home;

  static constexpr int threads = home::threads;
  static constexpr int MaxE = home::max_E, Width = home::width;

  struct shared {
    typename home::shared exchange;
    std::int32_t count[MaxE];  // pairs, and above them, by 2^16, first choices
    std::int32_t missing, out_of_range, masked, invalid;
    // Of each row that the block keeps at once; the block's one row has it in registers.
    float score[home::in_warp ? home::rows : 1][home::in_warp ? MaxE : 1];
    double z[home::rows][2];
  };

  [[no_unique_address]] Gate gate{};

  /// @param logits  [T,E] in; as for `route`.
  /// @param chunk   Tokens of a block, at least 1, at most gate_sums::most_tokens; there are T / chunk
  ///                blocks, rounded up.
  /// @param out     T, K = gate.k(), E, tokens in; expert, weight, score (if not null) out.
  /// @param scores  [T,E] out, or absent; as for `route`.
  /// @param sums    Its arrays out, those that are not null.
  /// @pre   What `route` demands, which the caller of the kernel has to check.
  template <thread_block B, class L>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<L> logits, std::int64_t chunk,
                                  basic_routing<float> out, matrix_view<float> scores,
                                  gate_sums sums) const {
    static_assert(token_gate<Gate, typename home::template row<B>>);
    using row_type = typename home::template row<B>;
    auto lanes = home::lanes_of(b, s.exchange);
    int const E = out.E, rank = lanes.rank();
    bool const counting = sums.pairs != nullptr || sums.first != nullptr;
    for (int e = b.thread(); e < E; e += threads) s.count[e] = 0;
    if (b.thread() == 0) s.missing = s.out_of_range = s.masked = s.invalid = 0;
    b.sync();
    b.wait_for_previous();
    b.let_next_start();

    std::int64_t const first = chunk * b.block();
    std::int64_t const last = first + chunk < out.T ? first + chunk : out.T;
    row_type total(lanes, E, [](int) { return 0.0f; });  // of scores
    double squares = 0, finite = 0;
    for (std::int64_t t = first + home::row_of(b); t < last; t += home::rows) {
      bool const live = out.tokens.is_live(t);
      L* const from = logits.row(t) + rank;  // rank: so that addresses are a constant away
      bool broken = false;
      row_type row(lanes, E, [&](int e) {
        auto const l = static_cast<float>(from[e - rank]);
        broken |= detail::is_no_logit(l);
        return l;
      });
      bool const valid = lanes.highest(std::uint32_t(broken)) == 0;
      if (sums.z != nullptr) {
        float const highest = row.max(0, E);
        float const sum = row.sum(
            [=](int, float l) { return where(is_candidate(l), moe::exp(l - highest), 0.0f); });
        double const z = static_cast<double>(highest + std::log(sum));
        bool const counts = live && valid && is_candidate(highest);
        squares += counts ? z * z : 0;
        finite += counts ? 1 : 0;
      }
      detail::route_row<Width>(gate, row, rank, valid, t, out, scores, [&](int j, int expert) {
        if (!counting || expert == invalid_token || !live) return;
        bool const known = expert >= 0 && expert < E;
        std::int32_t* const other = expert < 0 ? &s.missing : &s.out_of_range;
        b.atomic_add(known ? &s.count[expert] : other, known && j == 0 ? 0x10001 : 1);
      });
      if (counting && rank == 0) {
        if (!live) b.atomic_add(&s.masked, 1);
        if (live && !valid) b.atomic_add(&s.invalid, 1);
      }
      if (sums.score != nullptr && (live || sums.scores_masked))
        total.transform(row, [](int, float sum, float score) {
          return sum + where(is_candidate(score), score, 0.0f);
        });
    }

    if (home::in_warp && sums.score != nullptr)
      total.transform([&](int e, float sum) {
        return s.score[b.thread() / Width][home::in_warp ? e : 0] = sum;
      });
    if (rank == 0) {
      s.z[b.thread() / Width][0] = squares;
      s.z[b.thread() / Width][1] = finite;
    }
    b.sync();
    std::int64_t const c = b.block();
    if (sums.pairs != nullptr) {
      std::int32_t* const own = sums.pairs + c * (E + 4);
      for (int e = b.thread(); e < E; e += threads) own[e] = s.count[e] & 0xffff;
      if (b.thread() == 0) {
        own[E] = s.missing;
        own[E + 1] = s.out_of_range;  // of a gate that breaks its promise
        own[E + 2] = s.masked;
        own[E + 3] = s.invalid;
      }
    }
    if (sums.first != nullptr)
      for (int e = b.thread(); e < E; e += threads) sums.first[c * E + e] = s.count[e] >> 16;
    if (sums.score != nullptr) {
      float* const own = sums.score + c * E;  // [E]
      if constexpr (home::in_warp) {
        for (int e = b.thread(); e < E; e += threads) {
          float sum = s.score[0][e];
          for (int r = 1; r < home::rows; ++r) sum += s.score[r][e];
          own[e] = sum;
        }
      } else {
        total.transform([=](int e, float sum) { return own[e] = sum; });
      }
    }
    if (sums.z != nullptr && b.thread() < 2) {
      double sum = 0;
      for (int r = 0; r < home::rows; ++r) sum += s.z[r][b.thread()];
      sums.z[c * 2 + b.thread()] = sum;
    }
  }
};

}  // namespace moe::inline MOE_ABI
