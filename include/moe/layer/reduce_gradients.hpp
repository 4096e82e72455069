// Sums gradients over ranks: of what all ranks have over all, of experts over those who hold the same.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/comm/collectives.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/layer/layer_types.hpp>
#include <moe/layer/residual_layer.hpp>

namespace moe::inline MOE_ABI {

/// Bytes of scratch for reduce_gradients of n values over R ranks.
template <class V>
constexpr std::size_t reduce_gradients_scratch(std::int64_t n, int R) noexcept {
  return all_reduce_scratch<V>(n, R);
}
/// For the gradients of a layer over R ranks at most: about as much as its largest parameter.
template <class V, class... Parameters, template <class, class...> class Weights>
std::size_t reduce_gradients_scratch(Weights<V, Parameters...> const& gradients, int R,
                                     call_site site = call_site::here()) {
  std::int64_t most = 0;
  for_each_parameter(
      gradients, gradients,
      [&](char const*, vector_view<V>, vector_view<V> g) { most = std::max(most, g.size()); },
      site);
  return reduce_gradients_scratch<V>(most, R);
}

/// gradients = scale * their sum over all ranks of `comm`.
///
/// @param gradients  [n] in and out, the same n on all ranks.
/// @param scratch    reduce_gradients_scratch<V>(n, R) bytes.
/// @note  As all_reduce: collective; the same bits on all ranks; if it fails, `comm` has aborted.
/// @cost  That of all_reduce.
template <scalar V, communicator C>
outcome reduce_gradients(C& comm, vector_view<V> gradients, double scale, memory scratch,
                         deadline until, call_site site = call_site::here()) {
  outcome const end = all_reduce(comm, gradients, scratch, until, site);
  if (!end || scale == 1) return end;
  auto const factor = static_cast<accumulate_t<V>>(scale);
  for (V& g : gradients) g = static_cast<V>(factor * static_cast<accumulate_t<V>>(g));
  return end;
}

namespace detail {

/// Reduces parts one after another until one fails; then neither communicator is of use any more.
template <class V, communicator C>
class gradient_parts {
 public:
  gradient_parts(C& all, C& replicas, double scale, memory scratch, deadline until, call_site site)
      : all_(&all),
        replicas_(&replicas),
        scale_(scale),
        scratch_(scratch),
        until_(until),
        site_(site) {}

  auto over_all() { return over(*all_); }
  auto over_replicas() { return over(*replicas_); }

  outcome end() const noexcept {
    if (!end_) {
      all_->abort();
      replicas_->abort();
    }
    return end_;
  }

 private:
  auto over(C& comm) {
    return [this, &comm](char const*, vector_view<V>, vector_view<V> gradients) {
      if (end_) end_ = reduce_gradients(comm, gradients, scale_, scratch_, until_, site_);
    };
  }

  C *all_, *replicas_;
  double scale_;
  memory scratch_;
  deadline until_;
  call_site site_;
  outcome end_;
};

template <class V, class Parameters, communicator C>
void reduce_parts(gradient_parts<V, C>& parts, layer_weights<V, Parameters> const& gradients,
                  call_site site) {
  stacked_view<V> const router(gradients.router);
  visit_part("router", router, router, parts.over_all());
  for_each_parameter(gradients.experts, gradients.experts, parts.over_replicas(), site);
}

}  // namespace detail

/// Sums the gradients of a layer: those of the router over all ranks, those of the experts over the
/// replicas of this rank's alone.
///
/// Both are multiplied by the same `scale`, so that they do not depend on how many ranks share the
/// experts. An expert's gradient is a sum over the tokens of all ranks, whether they came to it in an
/// exchange or stayed on their ranks with copies of it: it would be too large by a factor of
/// expert_parallel if a mean were made by dividing through the number of its copies (what DeepSpeed did,
/// issue 5259).
///
/// @param all        Of all ranks.
/// @param replicas   Of those who hold the same experts, or slices: `expert_groups::replicas`.
/// @param gradients  In and out: what backward gave on this rank.
/// @param scale      1 / R if each rank's loss is a mean over tokens of its own; 1 if it has been divided
///                   by the number of all ranks' tokens already.
/// @param scratch    reduce_gradients_scratch(gradients, R) bytes.
/// @throws precondition_error if scratch is short.
/// @note  Collective; the same bits on all ranks that hold a parameter. If it fails, both communicators
///        have aborted, and the gradients are anything.
/// @cost  An all_reduce for each parameter whose elements are contiguous, for each row of the others.
template <class V, class Parameters, communicator C>
outcome reduce_gradients(C& all, C& replicas, layer_weights<V, Parameters> const& gradients,
                         double scale, memory scratch, deadline until,
                         call_site site = call_site::here()) {
  detail::gradient_parts<V, C> parts(all, replicas, scale, scratch, until, site);
  detail::reduce_parts(parts, gradients, site);
  return parts.end();
}

/// The same; the fixed expert and the mix are as dense as the router.
template <class V, class Parameters, class FixedParameters, communicator C>
outcome reduce_gradients(C& all, C& replicas,
                         residual_weights<V, Parameters, FixedParameters> const& gradients,
                         double scale, memory scratch, deadline until,
                         call_site site = call_site::here()) {
  detail::gradient_parts<V, C> parts(all, replicas, scale, scratch, until, site);
  detail::reduce_parts(parts, gradients.moe, site);
  for_each_parameter(gradients.fixed, gradients.fixed, parts.over_all(), site);
  if (!gradients.mix.absent()) {
    stacked_view<V> const mix(gradients.mix);
    detail::visit_part("mix", mix, mix, parts.over_all());
    if (!gradients.mix_bias.empty())
      parts.over_all()("mix_bias", gradients.mix_bias, gradients.mix_bias);
  }
  return parts.end();
}

}  // namespace moe::inline MOE_ABI
