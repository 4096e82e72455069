// Jitter: multiply what the router reads by random numbers around 1, in training.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <type_traits>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/random.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// What the checks of a function say.
struct jitter_rules {
  char const* shape;
  char const* range;
  char const* apart;
};
inline constexpr jitter_rules jitter_forward{"jitter: tokens and out are [T,M], ld >= M, M < 2^26",
                                             "jitter: 0 <= eps <= 1",
                                             "jitter: out is tokens or does not overlap it"};
inline constexpr jitter_rules jitter_gradient{
    "jitter_backward: dout and dtokens are [T,M], ld >= M, M < 2^26",
    "jitter_backward: 0 <= eps <= 1", "jitter_backward: dtokens is dout or does not overlap it"};

template <class V, class D>
void check_jitter(jitter_rules const& rules, matrix_view<V> from, float eps, matrix_view<D> to,
                  call_site site) {
  std::int64_t const T = from.rows();
  std::int64_t const M = from.cols();
  expects(to.rows() == T && to.cols() == M && from.ld() >= M && to.ld() >= M && M < (1 << 26),
          rules.shape, site,
          {{"T", T},
           {"M", M},
           {"ld", from.ld()},
           {"out T", to.rows()},
           {"out M", to.cols()},
           {"out ld", to.ld()}});
  expects(eps >= 0 && eps <= 1, rules.range, site, {{"eps", eps}});
  bool const in_place =
      static_cast<void const*>(from.data()) == static_cast<void const*>(to.data()) &&
      sizeof(V) == sizeof(D) && from.ld() == to.ld();
  expects(in_place || !overlap(from, to), rules.apart, site);
}

/// y[m] = x[m] U(1 - scale, 1 + scale) for the four m from 4 * quarter on that are below M, which share
/// a block of random bits; scale = 0 copies.
template <class V, class D>
MOE_HOST_DEVICE void jitter_quarter(V const* x, D* y, std::int64_t M, std::int64_t quarter,
                                    float scale, token const& t) {
  using A = accumulate_t<std::remove_const_t<V>>;
  philox_block random{};
  if (scale != 0) random = random_block(t, stream::jitter, static_cast<std::uint32_t>(quarter));
  MOE_UNROLL
  for (int i = 0; i < 4; ++i) {
    std::int64_t const m = 4 * quarter + i;
    if (m >= M) break;
    float const factor = 1.0f + scale * (2.0f * uniform(random.word[i]) - 1.0f);
    y[m] = scale == 0 ? static_cast<D>(x[m]) : static_cast<D>(static_cast<A>(x[m]) * factor);
  }
}

template <class V, class D>
void jitter(cpu const& exec, jitter_rules const& rules, matrix_view<V> from, float eps,
            batch const& tokens, matrix_view<D> to, call_site site) {
  check_jitter(rules, from, eps, to, site);
  float const scale = tokens.training ? eps : 0.0f;
  std::int64_t const M = from.cols();
  exec.split(from.rows(), 1 + 4096 / (M + 1), [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t)
      for (std::int64_t q = 0; 4 * q < M; ++q)
        jitter_quarter<V, D>(from.row(t), to.row(t), M, q, scale, tokens.at(t));
  });
}

}  // namespace detail

/// out[t][m] = tokens[t][m] * U(1 - eps, 1 + eps) in training, else a copy: the input of the
/// router's matrix product; the experts get the tokens as they are.
///
/// @param tokens  [T,M] in.
/// @param eps     0.01 in Switch and DeepSpeed.
/// @param ids     Ids, seed and step of the T tokens: each draw is a function of these and of m.
/// @param out     [T,M] out; may be `tokens` itself, otherwise must not overlap it.
/// @pre   Equal shapes, leading dimensions >= M, M < 2^26, 0 <= eps <= 1.
/// @throws precondition_error if @pre fails.
/// @note  Does not depend on threads or on the batch split. Allocates nothing.
/// @cost  T M random numbers.
/// Source: Fedus et al., "Switch transformers", 2021.
template <class V, class D>
void jitter(cpu const& exec, matrix_view<V> tokens, float eps, batch const& ids, matrix_view<D> out,
            call_site site = call_site::here()) {
  detail::jitter(exec, detail::jitter_forward, tokens, eps, ids, out, site);
}

/// The gradient of `jitter`: dtokens = dout times the same random numbers, drawn again.
/// @param dout     [T,M] in.
/// @param dtokens  [T,M] out; may be `dout` itself, otherwise must not overlap it.
/// @note  eps, ids: as in the forward. Everything else as there.
template <class V, class D>
void jitter_backward(cpu const& exec, matrix_view<V> dout, float eps, batch const& ids,
                     matrix_view<D> dtokens, call_site site = call_site::here()) {
  detail::jitter(exec, detail::jitter_gradient, dout, eps, ids, dtokens, site);
}

}  // namespace moe::inline MOE_ABI
