// Activation policies: what stands between the two projections of an expert.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <concepts>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>

namespace moe::inline MOE_ABI {

/// An activation's partial derivatives.
template <class V>
struct gate_and_up {
  V gate, up;
};

/// Whether an activation multiplies two projections: f(gate, up) instead of f(up).
template <class A>
inline constexpr bool is_gated = A::gated;

namespace detail {

// All without branches, so that compilers turn loops over them into vector code; what clang would not
// inline by itself is told to be.

/// sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), without cancellation and from one exponential, which a
/// loop that also needs sigmoid_of(x) computes but once.
template <std::floating_point V>
struct both_sigmoids {
  V of_x, of_minus_x;

  MOE_HOST_DEVICE explicit both_sigmoids(V x) noexcept {
    bool const negative = x < V(0);
    V const e = moe::exp(where(negative, x, -x)), larger = V(1) / (V(1) + e), smaller = e * larger;
    of_x = where(negative, smaller, larger);
    of_minus_x = where(negative, larger, smaller);
  }
};

template <std::floating_point V>
MOE_HOST_DEVICE inline V sigmoid_of(V x) noexcept {
  return both_sigmoids<V>(x).of_x;
}

/// The standard normal distribution function. double: by erfc. float: within 4e-8 absolutely, and
/// x times it within 5e-8; below -8 the value at -8.
MOE_HOST_DEVICE inline double normal_cdf(double x) noexcept {
  return 0.5 * std::erfc(x * -0.70710678118654752440);
}
MOE_HOST_DEVICE inline float normal_cdf(float x) noexcept {
  // log(2 cdf(-t)) = t p(t), p fitted by weighted least squares on [0, 8].
  float const magnitude = where(x < 0.0f, -x, x);
  float const t = where(magnitude < 8.0f, magnitude, 8.0f);
  float p = 9.138304558e-10f;
  p = p * t - 3.921645158e-08f;
  p = p * t + 7.340734187e-07f;
  p = p * t - 7.804463562e-06f;
  p = p * t + 5.034674368e-05f;
  p = p * t - 1.766138980e-04f;
  p = p * t - 4.719488703e-05f;
  p = p * t + 4.882885749e-03f;
  p = p * t - 3.639994161e-02f;
  p = p * t - 3.182903050e-01f;
  p = p * t - 7.978865749e-01f;
  float const tail = 0.5f * moe::exp(p * t);
  return where(x == x, where(x < 0.0f, tail, 1.0f - tail), x);
}

template <std::floating_point V>
MOE_HOST_DEVICE inline V normal_density(V x) noexcept {
  return V(0.39894228040143267794) * moe::exp(V(-0.5) * x * x);
}

}  // namespace detail

/// max(x, 0). The derivative at 0 is 0.
struct relu {
  static constexpr bool gated = false;
  template <std::floating_point V>
  MOE_HOST_DEVICE V operator()(V x) const noexcept {
    return x < V(0) ? V(0) : x;  // NaN stays NaN
  }
  template <std::floating_point V>
  MOE_HOST_DEVICE V derivative(V x) const noexcept {
    return x > V(0) ? V(1) : V(0);
  }
};

/// x sigmoid(x).
struct silu {
  static constexpr bool gated = false;
  template <std::floating_point V>
  MOE_HOST_DEVICE V operator()(V x) const noexcept {
    return x * detail::sigmoid_of(x);
  }
  template <std::floating_point V>
  MOE_HOST_DEVICE V derivative(V x) const noexcept {
    detail::both_sigmoids<V> const s(x);
    return s.of_x + x * s.of_x * s.of_minus_x;
  }
};

/// x times the normal distribution function of x (by erf).
struct gelu {
  static constexpr bool gated = false;
  template <std::floating_point V>
  MOE_HOST_DEVICE V operator()(V x) const noexcept {
    return x * detail::normal_cdf(x);
  }
  template <std::floating_point V>
  MOE_HOST_DEVICE MOE_ALWAYS_INLINE V derivative(V x) const noexcept {
    return detail::normal_cdf(x) + x * detail::normal_density(x);
  }
};

/// 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))): GPT-2's.
struct gelu_tanh {
  static constexpr bool gated = false;
  template <std::floating_point V>
  MOE_HOST_DEVICE V operator()(V x) const noexcept {
    return x * detail::sigmoid_of(twice_inner(x));  // (1 + tanh z) / 2 = sigmoid(2 z)
  }
  template <std::floating_point V>
  MOE_HOST_DEVICE V derivative(V x) const noexcept {
    detail::both_sigmoids<V> const s(twice_inner(x));
    return s.of_x + x * s.of_x * s.of_minus_x * (scale<V> * (V(1) + V(3 * 0.044715) * x * x));
  }

 private:
  template <class V>
  static constexpr V scale = V(1.59576912160573071176);  // 2 sqrt(2 / pi)
  template <class V>
  MOE_HOST_DEVICE static V twice_inner(V x) noexcept {
    return scale<V> * (x + V(0.044715) * x * x * x);
  }
};

/// f(gate) up: the gated linear unit of an activation of one argument.
/// Source: Shazeer, "GLU variants improve transformer", 2020.
template <class F>
struct gated_linear {
  static constexpr bool gated = true;
  [[no_unique_address]] F f{};

  template <std::floating_point V>
  MOE_HOST_DEVICE V operator()(V gate, V up) const noexcept {
    return f(gate) * up;
  }
  template <std::floating_point V>
  MOE_HOST_DEVICE MOE_ALWAYS_INLINE gate_and_up<V> derivative(V gate, V up) const noexcept {
    return {f.derivative(gate) * up, f(gate)};
  }
};

using swiglu = gated_linear<silu>;
using geglu = gated_linear<gelu>;
using geglu_tanh = gated_linear<gelu_tanh>;

/// (u + 1) g sigmoid(alpha g) with g = min(gate, limit), u = clamp(up, -limit, limit): gpt-oss.
struct clamped_swiglu {
  static constexpr bool gated = true;
  float limit = 7.0f;
  float alpha = 1.702f;

  template <std::floating_point V>
  MOE_HOST_DEVICE V operator()(V gate, V up) const noexcept {
    V const g = clamp_above(gate), u = clamp(up);
    return (u + V(1)) * g * detail::sigmoid_of(V(alpha) * g);
  }
  /// 0 where an argument is clamped.
  template <std::floating_point V>
  MOE_HOST_DEVICE gate_and_up<V> derivative(V gate, V up) const noexcept {
    V const g = clamp_above(gate), u = clamp(up);
    detail::both_sigmoids<V> const s(V(alpha) * g);
    V const dg = (u + V(1)) * (s.of_x + V(alpha) * g * s.of_x * s.of_minus_x), du = g * s.of_x;
    return {where(gate > V(limit), V(0), dg),
            where(up > V(limit), V(0), where(up < -V(limit), V(0), du))};
  }

 private:
  template <class V>
  MOE_HOST_DEVICE V clamp_above(V x) const noexcept {
    return where(x > V(limit), V(limit), x);
  }
  template <class V>
  MOE_HOST_DEVICE V clamp(V x) const noexcept {
    return where(x > V(limit), V(limit), where(x < -V(limit), -V(limit), x));
  }
};

static_assert(activation<relu> && activation<silu> && activation<gelu> && activation<gelu_tanh>);
static_assert(activation<swiglu> && activation<geglu> && activation<geglu_tanh>);
static_assert(activation<clamped_swiglu>);

}  // namespace moe::inline MOE_ABI
