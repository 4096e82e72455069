// The score of a row of logits on the unit sphere, without its negative part.
// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/detail/expects_on_host.hpp>

namespace moe::inline MOE_ABI {

/// s[e] = scale * max(l[e], 0) / max(||l||, 1e-8), the norm being over the candidates.
///
/// An expert that is no candidate adds nothing to the norm. Scores do not tell the norm nor the negative
/// logits, so that backward reads the logits again. The gradient of `scale` is the sum of
/// dweight[i] * weight[i] / scale if weights are `as_scored`.
/// @pre  The squares of the logits can be added up: |l| < 1e18 in float. Beyond, all scores are 0.
/// Source: UniPool's NormRouter, with scale = norm_scale * scale_initial and no renormalisation.
/// @tparam L  Type of the logits.
template <class L = float>
struct relu_normalised {
  float scale = 1;
  /// [T,E]: the logits that route is given; read by backward alone, and then not to be absent.
  matrix_view<L const> logits{};

  template <score_row R>
  MOE_HOST_DEVICE constexpr void operator()(R& row, token const&) const {
    using V = typename R::value_type;
    V const factor = V(scale) / norm_of(row);
    row.transform([=](int, V l) {
      return where(is_candidate(l), where(l > 0, l * factor, V(0)), no_score<V>);
    });
  }

  /// With u = l / ||l|| and g' = scale g where s > 0, else 0: dl = (g' - u (sum of u g')) / ||l||.
  /// @throws precondition_error on the CPU unless the logits are [T,E].
  template <score_row R>
  MOE_HOST_DEVICE constexpr void backward(R const& scores, R& grad, token const& t) const {
    using V = typename R::value_type;
    detail::expects_on_host(logits.cols() == grad.size() && t.row < logits.rows(),
                            "relu_normalised::backward: logits are [T,E]", "E", grad.size());
    L const* const own = logits.row(t.row);
    auto const logit = [=](int e) { return static_cast<V>(own[e]); };
    V const square = scores.sum([=](int e, V s) {
      V const l = logit(e);
      return is_candidate(s) ? l * l : V(0);
    });
    V const length = std::sqrt(square), norm = length > V(least) ? length : V(least);
    grad.transform(
        scores, [=, factor = V(scale)](int, V g, V s) { return where(s > 0, g * factor, V(0)); });
    // Where the norm is the floor, it is a constant.
    V const along = length > V(least)
                        ? grad.sum([=](int e, V g) { return g == 0 ? V(0) : g * logit(e); })
                        : V(0);
    V const per_logit = along / (norm * norm);
    grad.transform(scores, [=](int e, V g, V s) {
      return is_candidate(s) ? (g - per_logit * logit(e)) / norm : V(0);
    });
  }

 private:
  static constexpr float least = 1e-8f;

  template <class R>
  MOE_HOST_DEVICE static constexpr typename R::value_type norm_of(R const& row) {
    using V = typename R::value_type;
    V const square = row.sum([](int, V l) { return is_candidate(l) ? l * l : V(0); });
    V const length = std::sqrt(square);
    return length > V(least) ? length : V(least);
  }
};

static_assert(score_policy<relu_normalised<>, array_row<float>>);
static_assert(score_policy<relu_normalised<double>, array_row<double>>);

}  // namespace moe::inline MOE_ABI
