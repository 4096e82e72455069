// DeepSeek-V2's losses over devices: they fall as choices, or the tokens sent, spread over devices.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/loss/detail/sum_tokens.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// What the losses over devices differ in. The one over experts is `load_balance` with
/// {.choices = counted::all}.
struct device_balance_rule {
  enum class counted : std::uint8_t {
    choices,  ///< f[d] = D / (K T) * choices of experts of d: the device-level loss.
    tokens    ///< f[d] = D / (most T) * tokens sent to d, once each: the communication-level loss.
  };

  int devices = 1;  ///< D: device d has experts [d E / D, (d + 1) E / D).
  counted count = counted::choices;
  int most = 1;  ///< Of `tokens`: devices that a token is sent to at most (topk_group).
};

namespace detail {

template <class V>
void check_device_balance(basic_routing<V> const& routed, device_balance_rule const& rule,
                          std::int64_t sums, call_site site) {
  expects(routed.E >= 1 && routed.K >= 1 && rule.devices >= 1 && routed.E % rule.devices == 0 &&
              rule.most >= 1,
          "device_balance: K >= 1, devices >= 1 divide E, most >= 1", site,
          {{"E", routed.E}, {"K", routed.K}, {"devices", rule.devices}, {"most", rule.most}});
  expects(sums == 2 * std::int64_t{rule.devices} + 1, "device_balance: sums is [2D + 1]", site,
          {{"size", sums}, {"D", rule.devices}});
}

template <class V>
double device_balance_scale(basic_routing<V> const& routed, device_balance_rule const& rule) {
  bool const choices = rule.count == device_balance_rule::counted::choices;
  return static_cast<double>(rule.devices) / (choices ? routed.K : rule.most);
}

}  // namespace detail

/// Bytes of scratch for device_balance.
constexpr std::size_t device_balance_scratch(std::int64_t T, int devices) noexcept {
  memory_size size;
  size.add<double>(2 * std::int64_t{devices} + 1);
  return detail::add_sum_tokens(size, T, 2 * std::int64_t{devices} + 1).bytes();
}

/// How many sums over tokens the loss is made of: of the scores of each device, of what it is sent, and of
/// the tokens that count.
constexpr std::int64_t device_balance_sums(int devices) noexcept {
  return 2 * std::int64_t{devices} + 1;
}

/// The first step of device_balance: its sums, which may be added up over batches or ranks before the
/// second.
///
/// @param scores, routed, scratch  As device_balance takes them.
/// @param sums  [device_balance_sums(D)] out.
/// @throws precondition_error as device_balance, or if sums has another size.
template <class V>
void sum_device_balance(cpu const& exec, std::type_identity_t<matrix_view<V const>> scores,
                        basic_routing<V> const& routed, device_balance_rule const& rule,
                        memory scratch, vector_view<double> sums,
                        call_site site = call_site::here()) {
  detail::check_device_balance(routed, rule, sums.size(), site);
  detail::check_load_balance(scores, routed, routed.pairs(), site);
  std::int64_t const D = rule.devices, per_device = routed.E / D;
  bool const once = rule.count == device_balance_rule::counted::tokens;
  double const* const found = detail::sum_tokens(
      exec, routed.T, 2 * D + 1, scratch, "device_balance: scratch >= device_balance_scratch(T, D)",
      site, [&](std::int64_t first, std::int64_t last, double* sum) {
        for (std::int64_t t = first; t < last; ++t) {
          std::int64_t const begin = routed.first_pair(t), end = routed.first_pair(t + 1);
          bool const invalid = begin < end && routed.expert[begin] == invalid_token;
          if (invalid || !routed.tokens.is_live(t)) continue;
          sum[2 * D] += 1;
          for (std::int64_t e = 0; e < routed.E; ++e)
            sum[e / per_device] += static_cast<double>(detail::score_or_zero(scores(t, e)));
          for (std::int64_t i = begin; i < end; ++i) {
            std::int64_t const e = routed.expert[i];
            if (e < 0 || e >= routed.E) continue;
            bool const again =
                std::any_of(routed.expert + begin, routed.expert + i, [&](int other) {
                  return other >= 0 && other < routed.E && other / per_device == e / per_device;
                });
            if (!once || !again) sum[D + e / per_device] += 1;
          }
        }
      });
  std::copy_n(found, sums.size(), sums.begin());
}

/// The second step: the loss of the tokens that were summed; 0 if none counts.
/// @param routed  Its E and K alone matter.
template <class V>
double device_balance(basic_routing<V> const& routed, device_balance_rule const& rule,
                      vector_view<double const> sums, call_site site = call_site::here()) {
  detail::check_device_balance(routed, rule, sums.size(), site);
  int const D = rule.devices;
  double const tokens = sums[2 * D];
  if (tokens == 0) return 0;
  double total = 0;
  for (int d = 0; d < D; ++d) total += sums[d] * sums[D + d];
  return detail::device_balance_scale(routed, rule) * total / (tokens * tokens);
}

/// The sum over devices of f[d] P[d]: P[d] is the mean over tokens of what the scores of the experts of d add
/// up to, f[d] as the rule says; it carries no gradient. 1 if choices are even and scores add up to 1.
///
/// @param scores   [T,E] in, as the gate's score policy made them; -inf counts as 0.
/// @param routed   [T,K] in: `expert` before anything was dropped, and the token mask.
/// @param scratch  device_balance_scratch(T, D) bytes.
/// @return The loss, unscaled; multiply by a coefficient.
/// @throws precondition_error if shapes disagree, D does not divide E, or scratch is short.
/// @note  Masked and invalid tokens do not count. In double; does not depend on the number of threads.
///        Allocates nothing.
/// @cost  Reads T*E scores and T*K ids.
/// Example: E = 4, D = 2, K = 2, a token with scores {0.4, 0.3, 0.2, 0.1} that goes to experts 0 and 1:
///          P = {0.7, 0.3}; choices give f = {2, 0} and 1.4, tokens with most = 2 f = {1, 0} and 0.7.
/// Source: "DeepSeek-V2", 2024, section 2.2.3.
template <class V>
double device_balance(cpu const& exec, std::type_identity_t<matrix_view<V const>> scores,
                      basic_routing<V> const& routed, device_balance_rule const& rule,
                      memory scratch, call_site site = call_site::here()) {
  std::int64_t const n = 2 * std::int64_t{std::max(rule.devices, 0)} + 1;
  vector_view<double> const sums(
      scratch.take<double>(n, "device_balance: scratch >= device_balance_scratch(T, D)", site), n);
  sum_device_balance(exec, scores, routed, rule, scratch, sums, site);
  return device_balance(routed, rule, vector_view<double const>(sums), site);
}

/// The gradient of the loss of all tokens that were summed: the same for every token that counts.
///
/// @param sums     [device_balance_sums(D)].
/// @param dloss    Gradient of the objective with respect to the loss: its coefficient.
/// @param dscores  [E] out: for score_gradient::expert.
template <class V>
void device_balance_backward(basic_routing<V> const& routed, device_balance_rule const& rule,
                             vector_view<double const> sums, double dloss,
                             std::type_identity_t<vector_view<V>> dscores,
                             call_site site = call_site::here()) {
  detail::check_device_balance(routed, rule, sums.size(), site);
  expects(dscores.size() == routed.E, "device_balance_backward: dscores is [E]", site,
          {{"size", dscores.size()}, {"E", routed.E}});
  int const D = rule.devices, per_device = routed.E / D;
  double const tokens = sums[2 * D];
  double const scale = detail::device_balance_scale(routed, rule) * dloss;
  for (int e = 0; e < routed.E; ++e)
    dscores[e] =
        tokens == 0 ? V(0) : static_cast<V>(scale * sums[D + e / per_device] / (tokens * tokens));
}

}  // namespace moe::inline MOE_ABI
