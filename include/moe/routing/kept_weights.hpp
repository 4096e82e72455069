// Weights after the table is built: dropped pairs weigh nothing; the kept ones may share their part.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// What becomes of the weights of a token that lost a pair.
enum class kept_weights : std::uint8_t {
  as_routed,  ///< Those of kept pairs stay as they are (Switch, Tutel).
  renormalised  ///< Those of kept pairs are divided by max(their sum, FLT_EPSILON) (DeepSpeed, k >= 2).
};

namespace detail {

/// Whether the table dropped pair i. Experts that are not computed drop nothing.
constexpr bool is_dropped(routing_table const& table, std::int64_t i) noexcept {
  return table.row_of[i] == dropped_row;
}

template <class V>
constexpr V kept_sum(routing_table const& table, V const* weight, std::int64_t t) noexcept {
  V sum = 0;
  for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i)
    if (!is_dropped(table, i)) sum += weight[i];
  return sum;
}

inline constexpr std::int64_t tokens_per_thread = 512;  // a guess: some microseconds

}  // namespace detail

/// The weights that combine multiplies with, once it is known which pairs were kept.
///
/// @param weight  [T,K] (or as token_begin says) in: the routing's.
/// @param out     [T,K] out: 0 where the pair was dropped. May be `weight`.
/// @post   renormalised: a token's weights sum to 1 unless their sum was below FLT_EPSILON; a token
///         that lost all pairs has all weights 0.
/// @throws precondition_error if the table holds pairs and an array is null.
/// @note   Bitwise the same for any number of threads. Allocates nothing.
/// @cost   O(T K).
template <std::floating_point V>
void weigh_kept(cpu const& exec, kept_weights rule, routing_table const& table, V const* weight,
                V* out, call_site site = call_site::here()) {
  expects(table.pairs() == 0 || (table.row_of != nullptr && weight != nullptr && out != nullptr),
          "weigh_kept: row_of, weight and out are given", site, {{"pairs", table.pairs()}});
  constexpr V least = std::numeric_limits<float>::epsilon();
  exec.split(table.T, detail::tokens_per_thread, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      V divisor = 1;
      if (rule == kept_weights::renormalised) {
        V const sum = detail::kept_sum(table, weight, t);
        divisor = sum < least ? least : sum;
      }
      for (std::int64_t i = table.first_pair(t); i < table.first_pair(t + 1); ++i)
        out[i] = detail::is_dropped(table, i) ? V(0) : weight[i] / divisor;
    }
  });
}

/// The gradient of weigh_kept.
///
/// @param weight   [T,K] in: as given to weigh_kept.
/// @param dout     [T,K] in: d/dout.
/// @param dweight  [T,K] out: d/dweight, 0 where the pair was dropped. May be `dout`.
/// @throws precondition_error if the table holds pairs and an array is null.
/// @note   Bitwise the same for any number of threads. Allocates nothing.
/// @cost   O(T K).
template <std::floating_point V>
void weigh_kept_backward(cpu const& exec, kept_weights rule, routing_table const& table,
                         V const* weight, V const* dout, V* dweight,
                         call_site site = call_site::here()) {
  expects(table.pairs() == 0 || (table.row_of != nullptr && weight != nullptr && dout != nullptr &&
                                 dweight != nullptr),
          "weigh_kept_backward: row_of, weight, dout and dweight are given", site,
          {{"pairs", table.pairs()}});
  constexpr V least = std::numeric_limits<float>::epsilon();
  exec.split(table.T, detail::tokens_per_thread, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      std::int64_t const i0 = table.first_pair(t), i1 = table.first_pair(t + 1);
      V divisor = 1, shared = 0;
      if (rule == kept_weights::renormalised) {
        V const sum = detail::kept_sum(table, weight, t);
        divisor = sum < least ? least : sum;
        // out = w / sum: each weight also lowers all others. Below `least` the divisor is constant.
        if (sum >= least)
          for (std::int64_t i = i0; i < i1; ++i)
            if (!detail::is_dropped(table, i)) shared += dout[i] * (weight[i] / divisor);
      }
      for (std::int64_t i = i0; i < i1; ++i)
        dweight[i] = detail::is_dropped(table, i) ? V(0) : (dout[i] - shared) / divisor;
    }
  });
}

}  // namespace moe::inline MOE_ABI
