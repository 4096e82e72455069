// Weights after the table is built: dropped pairs weigh nothing; the kept ones may share their part.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/execution.hpp>
#include <moe/routing/detail/pair_walk.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// What becomes of the weights of a token that lost a pair.
enum class kept_weights : std::uint8_t {
  as_routed,  ///< Those of kept pairs stay as they are (Switch, Tutel).
  renormalised  ///< Those of kept pairs are divided by max(their sum, FLT_EPSILON) (DeepSpeed, k >= 2).
};

namespace detail {

/// Whether the table dropped pair i. Experts that are not computed drop nothing.
MOE_HOST_DEVICE constexpr bool is_dropped(routing_table const& table, std::int64_t i) noexcept {
  return table.row_of[i] == dropped_row;
}

template <class V>
MOE_HOST_DEVICE constexpr V kept_sum(routing_table const& table, V const* weight,
                                     pair_range pairs) noexcept {
  V sum = 0;
  for (std::int64_t i = pairs.first; i < pairs.last; ++i)
    if (!is_dropped(table, i)) sum += weight[i];
  return sum;
}

/// The least sum to divide by.
inline constexpr float least_sum = std::numeric_limits<float>::epsilon();

/// weigh_kept of one token.
template <class V>
MOE_HOST_DEVICE constexpr void weigh_kept_token(kept_weights rule, routing_table const& table,
                                                V const* weight, V* out,
                                                pair_range pairs) noexcept {
  constexpr V least = least_sum;
  V divisor = 1;
  if (rule == kept_weights::renormalised) {
    V const sum = kept_sum(table, weight, pairs);
    divisor = sum < least ? least : sum;
  }
  for (std::int64_t i = pairs.first; i < pairs.last; ++i)
    out[i] = is_dropped(table, i) ? V(0) : weight[i] / divisor;
}

template <class V>
MOE_HOST_DEVICE constexpr void weigh_kept_token_backward(kept_weights rule,
                                                         routing_table const& table,
                                                         V const* weight, V const* dout, V* dweight,
                                                         pair_range pairs) noexcept {
  constexpr V least = least_sum;
  V divisor = 1, shared = 0;
  if (rule == kept_weights::renormalised) {
    V const sum = kept_sum(table, weight, pairs);
    divisor = sum < least ? least : sum;
    // out = w / sum: each weight also lowers all others. Below `least` the divisor is constant.
    if (sum >= least)
      for (std::int64_t i = pairs.first; i < pairs.last; ++i)
        if (!is_dropped(table, i)) shared += dout[i] * (weight[i] / divisor);
  }
  for (std::int64_t i = pairs.first; i < pairs.last; ++i)
    dweight[i] = is_dropped(table, i) ? V(0) : (dout[i] - shared) / divisor;
}

template <class V>
void check_weigh_kept(std::int64_t pairs, routing_table const& table, V const* weight, V const* out,
                      call_site site) {
  expects(pairs == 0 || (table.row_of != nullptr && weight != nullptr && out != nullptr),
          "weigh_kept: row_of, weight and out are given", site, {{"pairs", pairs}});
}

template <class V>
void check_weigh_kept_backward(std::int64_t pairs, routing_table const& table, V const* weight,
                               V const* dout, V const* dweight, call_site site) {
  expects(
      pairs == 0 ||
          (table.row_of != nullptr && weight != nullptr && dout != nullptr && dweight != nullptr),
      "weigh_kept_backward: row_of, weight, dout and dweight are given", site, {{"pairs", pairs}});
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
  detail::check_weigh_kept(table.pairs(), table, weight, out, site);
  exec.split(table.T, detail::tokens_per_thread, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      detail::weigh_kept_token(rule, table, weight, out,
                               {table.first_pair(t), table.first_pair(t + 1)});
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
  detail::check_weigh_kept_backward(table.pairs(), table, weight, dout, dweight, site);
  exec.split(table.T, detail::tokens_per_thread, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      detail::weigh_kept_token_backward(rule, table, weight, dout, dweight,
                                        {table.first_pair(t), table.first_pair(t + 1)});
  });
}

}  // namespace moe::inline MOE_ABI
