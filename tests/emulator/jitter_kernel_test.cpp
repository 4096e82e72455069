#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/scalar.hpp>
#include <moe/gate/jitter.cuh>

#include "emulator/emulated_gpu.hpp"
#include "support/refusal.hpp"

using moe_test::emulated_gpu;

TEST_CASE_TEMPLATE("gate/jitter kernel: the elements of the CPU", V, float, moe::bf16) {
  struct shape {
    std::int64_t T, M, ld;
  };
  for (shape const& at : {shape{3, 5, 5}, {70, 8, 9}, {2, 1, 3}, {0, 4, 4}, {4, 0, 1}})
    for (bool const training : {true, false}) {
      std::int64_t const T = at.T, M = at.M, ld = at.ld;
      moe::batch const ids{.first_id = 1000, .seed = 5, .step = 2, .training = training};
      std::vector<V> tokens, expected(static_cast<std::size_t>(T * ld), V(7.0f));
      for (std::int64_t i = 0; i < T * ld; ++i)
        tokens.push_back(static_cast<V>(static_cast<float>(i % 13) - 6.5f));
      moe::matrix_view<V const> const in(tokens.data(), T, M, ld);
      moe::jitter(moe::cpu{}, in, 0.1f, ids, moe::matrix_view<V>(expected.data(), T, M, ld));
      moe_test::on_emulator([&](emulated_gpu const& exec) {
        std::vector<V> found(expected.size(), V(7.0f));
        moe::jitter(exec, in, 0.1f, ids, moe::matrix_view<V>(found.data(), T, M, ld));
        CHECK(found == expected);
        found = tokens;  // in place
        moe::matrix_view<V> const own(found.data(), T, M, ld);
        moe::jitter_backward(exec, own, 0.1f, ids, own);
        bool same = true;
        for (std::int64_t t = 0; t < T; ++t)
          for (std::int64_t m = 0; m < M; ++m)
            same = same && own(t, m) == expected[static_cast<std::size_t>(t * ld + m)];
        CHECK(same);
      });
    }
}

TEST_CASE("gate/jitter kernel: what is wrong is refused") {
  std::vector<float> x(12);
  moe::matrix_view<float> const view(x.data(), 3, 4), next(x.data() + 1, 2, 4);
  emulated_gpu const exec;
  CHECK(moe_test::refusal([&] {
          moe::jitter(exec, view, 1.5f, {}, view);
        }).starts_with("jitter: 0 <= eps <= 1; got eps = 1.5"));
  CHECK(moe_test::refusal([&] {
          moe::jitter_backward(exec, moe::matrix_view<float>(x.data(), 2, 4), 0.5f, {}, next);
        }).starts_with("jitter_backward: dtokens is dout or does not overlap it"));
}
