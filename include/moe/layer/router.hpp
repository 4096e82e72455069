// The router: one projection from tokens to logits, with noise on its input, and its gradient.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/grouped_gemm.hpp>
#include <moe/expert/segments.hpp>
#include <moe/gate/jitter.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch for compute_logits and its backward, of T tokens of width M.
template <std::floating_point V>
std::size_t compute_logits_scratch(cpu const& exec, std::int64_t T, std::int64_t M) noexcept {
  memory_size size;
  for (int i = 0; i < 3; ++i) size.add<V>(T * M);  // jittered, of valid tokens alone; its gradient
  return size.bytes() + builtin_gemm::scratch_bytes<V>(exec, 1);
}

namespace detail {

inline constexpr char const* logits_rule = "compute_logits: scratch >= compute_logits_scratch";

/// What the router sees; drawn again in backward, because draws are functions of the ids.
template <class V>
matrix_view<V const> router_input(cpu const& exec, matrix_view<V const> tokens, float eps,
                                  batch const& ids, memory& scratch, call_site site) {
  if (!(eps > 0 && ids.training)) return tokens;
  std::int64_t const T = tokens.rows(), M = tokens.cols();
  matrix_view<V> const out(scratch.take<V>(T * M, logits_rule, site), T, M);
  jitter(exec, tokens, eps, ids, out, site);
  return out;
}

/// The same rows, but zeros for tokens whose logits are no numbers: their dlogits are 0, and 0 times NaN
/// must not reach the router's gradient.
template <class V>
matrix_view<V const> valid_rows(cpu const& exec, matrix_view<V const> input,
                                matrix_view<V const> logits, memory& scratch, call_site site) {
  std::int64_t const T = input.rows(), M = input.cols();
  auto const valid = [&](std::int64_t t) {
    return std::none_of(logits.row(t), logits.row(t) + logits.cols(),
                        [](V l) { return is_invalid_logit(l); });
  };
  std::int64_t first = 0;
  while (first < T && valid(first)) ++first;
  if (first == T) return input;
  matrix_view<V> const out(scratch.take<V>(T * M, logits_rule, site), T, M);
  exec.split(T, 16, [&](std::int64_t begin, std::int64_t end, int) {
    for (std::int64_t t = begin; t < end; ++t)
      if (valid(t))
        std::copy_n(input.row(t), M, out.row(t));
      else
        std::fill_n(out.row(t), M, V(0));
  });
  return out;
}

}  // namespace detail

/// logits = jittered tokens * router.
///
/// @param tokens   [T,M]   @param router  [M,E]   @param logits  [T,E] out.
/// @param eps      Of `jitter`; 0, or ids that are not of training, mean none.
/// @param scratch  compute_logits_scratch<V>(exec, T, M).
/// @throws precondition_error if shapes disagree or scratch is too small.
/// @note  Allocates nothing. Bitwise the same for any number of threads.
template <std::floating_point V>
void compute_logits(cpu const& exec, matrix_view<std::type_identity_t<V> const> tokens,
                    matrix_view<std::type_identity_t<V> const> router, float eps, batch const& ids,
                    matrix_view<V> logits, memory scratch, call_site site = call_site::here()) {
  auto const input = detail::router_input<V>(exec, tokens, eps, ids, scratch, site);
  builtin_gemm::forward<V>(exec, input, stacked_view(router), {}, all_rows(tokens.rows(), site),
                           logits, scratch, site);
}

/// The gradient of compute_logits.
///
/// @param logits   [T,E]: what forward gave. Tokens with NaN or +inf among them add nothing to drouter.
/// @param dlogits  [T,E]; 0 for those tokens.
/// @param dtokens  [T,M] in and out: the gradient is added.
/// @param drouter  [M,E] out: assigned, or added to.
template <std::floating_point V>
void compute_logits_backward(cpu const& exec, matrix_view<std::type_identity_t<V> const> tokens,
                             matrix_view<std::type_identity_t<V> const> router, float eps,
                             batch const& ids, matrix_view<std::type_identity_t<V> const> logits,
                             matrix_view<std::type_identity_t<V> const> dlogits,
                             matrix_view<V> dtokens, matrix_view<V> drouter, update how,
                             memory scratch, call_site site = call_site::here()) {
  std::int64_t const T = tokens.rows(), M = tokens.cols();
  all_rows const all(T, site);
  stacked_view<V const> const weights(router);
  auto const input = detail::router_input<V>(exec, tokens, eps, ids, scratch, site);
  auto const valid = detail::valid_rows<V>(exec, input, logits, scratch, site);
  builtin_gemm::weight_gradient<V>(exec, valid, dlogits, all, how, stacked_view(drouter), scratch,
                                   site);
  if (input.data() == tokens.data())
    return builtin_gemm::input_gradient<V>(exec, dlogits, weights, all, update::add, dtokens,
                                           scratch, site);
  matrix_view<V> const dinput(scratch.take<V>(T * M, detail::logits_rule, site), T, M);
  builtin_gemm::input_gradient<V>(exec, dlogits, weights, all, update::assign, dinput, scratch,
                                  site);
  jitter_backward(exec, dinput, eps, ids, dinput, site);
  exec.split(T, 64, [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t m = 0; m < M; ++m) dtokens(t, m) += dinput(t, m);
  });
}

}  // namespace moe::inline MOE_ABI
