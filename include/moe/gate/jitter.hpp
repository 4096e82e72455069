// Jitter: multiply what the router reads by random numbers around 1, in training.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/random.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

template <class V, class D>
void jitter(char const* shape, char const* range, char const* apart, cpu const& exec,
            matrix_view<V> from, float eps, batch const& tokens, matrix_view<D> to,
            call_site site) {
  std::int64_t const T = from.rows();
  std::int64_t const M = from.cols();
  expects(to.rows() == T && to.cols() == M && from.ld() >= M && to.ld() >= M && M < (1 << 26),
          shape, site,
          {{"T", T},
           {"M", M},
           {"ld", from.ld()},
           {"out T", to.rows()},
           {"out M", to.cols()},
           {"out ld", to.ld()}});
  expects(eps >= 0 && eps <= 1, range, site, {{"eps", eps}});
  bool const in_place =
      static_cast<void const*>(from.data()) == static_cast<void const*>(to.data()) &&
      sizeof(V) == sizeof(D) && from.ld() == to.ld();
  expects(in_place || !overlap(from, to), apart, site);

  float const scale = tokens.training ? eps : 0.0f;
  exec.split(T, 1 + 4096 / (M + 1), [&](std::int64_t first, std::int64_t last, int) {
    for (std::int64_t t = first; t < last; ++t) {
      drawing_token id(tokens.at(t));
      V const* const x = from.row(t);  // [M]
      D* const y = to.row(t);          // [M]
      if (scale == 0) {
        for (std::int64_t m = 0; m < M; ++m) y[m] = static_cast<D>(x[m]);
        continue;
      }
      for (std::int64_t m = 0; m < M; ++m) {
        float const u = uniform(id, stream::jitter, static_cast<std::uint32_t>(m));
        float const factor = 1.0f + scale * (2.0f * u - 1.0f);
        y[m] = static_cast<D>(x[m] * factor);
      }
    }
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
  detail::jitter("jitter: tokens and out are [T,M], ld >= M, M < 2^26", "jitter: 0 <= eps <= 1",
                 "jitter: out is tokens or does not overlap it", exec, tokens, eps, ids, out, site);
}

/// The gradient of `jitter`: dtokens = dout times the same random numbers, drawn again.
/// @param dout     [T,M] in.
/// @param dtokens  [T,M] out; may be `dout` itself, otherwise must not overlap it.
/// @note  eps, ids: as in the forward. Everything else as there.
template <class V, class D>
void jitter_backward(cpu const& exec, matrix_view<V> dout, float eps, batch const& ids,
                     matrix_view<D> dtokens, call_site site = call_site::here()) {
  detail::jitter("jitter_backward: dout and dtokens are [T,M], ld >= M, M < 2^26",
                 "jitter_backward: 0 <= eps <= 1",
                 "jitter_backward: dtokens is dout or does not overlap it", exec, dout, eps, ids,
                 dtokens, site);
}

}  // namespace moe::inline MOE_ABI
