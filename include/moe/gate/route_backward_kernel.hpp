// The body of the kernel that takes gradients of weights and scores back to the logits.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/numeric.hpp>
#include <moe/core/score_row.hpp>
#include <moe/core/thread_block.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/gate/route_kernel.hpp>
#include <moe/gate/score_gradient.hpp>
#include <moe/routing/routing.hpp>

namespace moe::inline MOE_ABI {

/// What `route_backward` does, as a kernel body. Block c has tokens [c chunk, c chunk + chunk).
/// Never run on a GPU yet.
/// @tparam Home  A `row_home` with room for E.
template <class Gate, class Home>
struct route_backward_kernel {
  using home = Home;

  static constexpr int threads = home::threads;

  struct shared {
    typename home::shared exchange;
  };

  [[no_unique_address]] Gate gate{};

  /// Arguments as those of `route_backward`, and chunk >= 1.
  template <thread_block B, class L, class D>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, matrix_view<L> logits, std::int64_t chunk,
                                  basic_routing<float> chosen, matrix_view<float const> dweight,
                                  score_gradient<float> dscores, matrix_view<D> dlogits) const {
    using row_type = typename home::template row<B>;
    static_assert(token_gate<Gate, row_type>);
    auto lanes = home::lanes_of(b, s.exchange);
    int const E = chosen.E, rank = lanes.rank();
    b.wait_for_previous();
    b.let_next_start();

    std::int64_t const first = chunk * b.block();
    std::int64_t const last = first + chunk < chosen.T ? first + chunk : chosen.T;
    for (std::int64_t t = first + home::row_of(b); t < last; t += home::rows) {
      token const id = chosen.tokens.at(t);
      bool const live = chosen.tokens.is_live(t);
      std::int32_t const* const expert = chosen.expert + t * chosen.K;

      L* const from = logits.row(t) + rank;  // rank: so that addresses are a constant away
      bool broken = false;
      row_type row(lanes, E, [&](int e) {
        auto const l = static_cast<float>(from[e - rank]);
        broken |= detail::is_no_logit(l);
        return l;
      });
      broken |= expert[0] == invalid_token;
      bool const valid = lanes.highest(std::uint32_t(broken)) == 0;
      if (!valid) row.transform([](int, float) { return no_score<float>; });
      choices<Gate::max_k> made, dmade;
      made.k = dmade.k = chosen.K;
      made.each([&](int j) {
        int const e = expert[j];
        made.expert[j] = e < E ? e : -1;
        dmade.weight[j] = live && !dweight.absent() ? dweight(t, j) : 0.0f;
      });
      if constexpr (requires { gate.rescore(row, made, id); })
        gate.rescore(row, made, id);
      else
        gate(row, made, id);

      float const* const of_expert =
          live || dscores.reaches_masked ? dscores.expert.data() : nullptr;
      float const* const of_token = dscores.token.absent() ? nullptr : dscores.token.row(t);
      row_type grad(lanes, E, [=](int e) {
        float const d = of_expert == nullptr ? 0.0f : of_expert[e];
        return of_token == nullptr ? d : d + of_token[e];
      });
      gate.backward(row, made, dmade, grad, id);
      D* const to = dlogits.row(t) + rank;
      grad.transform([=](int e, float d) {
        to[e - rank] = static_cast<D>(valid ? d : 0.0f);
        return d;
      });
    }
  }
};

}  // namespace moe::inline MOE_ABI
