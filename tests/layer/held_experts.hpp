// What a rank of an expert-parallel layer holds of the experts of the whole one.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <doctest/doctest.h>

#include <moe/comm/expert_hosts.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/slice.hpp>

namespace moe_test {

/// Calls f(element of the whole, element of the part) for every parameter that a rank holds: all have a
/// counterpart.
template <class F>
void for_each_held(moe::ffn_weights<double> const& whole, moe::ffn_weights<double> const& part,
                   moe::expert_hosts const& hosts, F const& f) {
  auto const slice = moe::slice(whole, hosts.slice(), hosts.slices(), moe::slice_width::uneven);
  auto const matrices = [&](moe::stacked_view<double> const& a,
                            moe::stacked_view<double> const& b) {
    for (std::int64_t j = 0; j < b.count(); ++j)
      for (std::int64_t r = 0; r < b.rows(); ++r)
        for (std::int64_t c = 0; c < b.cols(); ++c)
          f(a[hosts.first() % hosts.experts() + j](r, c), b[j](r, c));
  };
  auto const biases = [&](moe::matrix_view<double> const& a, moe::matrix_view<double> const& b) {
    REQUIRE(a.absent() == b.absent());
    for (std::int64_t j = 0; j < b.rows(); ++j)
      for (std::int64_t c = 0; c < b.cols(); ++c)
        f(a(hosts.first() % hosts.experts() + j, c), b(j, c));
  };
  matrices(slice.up, part.up);
  matrices(slice.gate, part.gate);
  matrices(slice.down, part.down);
  biases(slice.up_bias, part.up_bias);
  biases(slice.gate_bias, part.gate_bias);
  biases(slice.down_bias, part.down_bias);
}

}  // namespace moe_test
