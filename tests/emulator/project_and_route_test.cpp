#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/scalar.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/project_and_route.cuh>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

#include "emulator/emulated_gpu.hpp"
#include "support/random.hpp"
#include "support/refusal.hpp"
#include "support/worse.hpp"

namespace {

using moe_test::emulated_gpu;
using moe_test::on_emulator;
using moe_test::refusal;
using moe_test::says;

using qwen3 = moe::gate<moe::softmax, moe::top_k<4>, moe::renormalised>;

/// `count` rows of width M at a distance of ld, `offset` elements after a multiple of 16 bytes, the
/// array ending with the last row.
template <class T>
struct rows_of {
  std::vector<T> storage;
  moe::matrix_view<T const> view;

  rows_of(std::int64_t count, std::int64_t M, std::int64_t ld, std::int64_t offset, unsigned seed) {
    auto const numbers = moe_test::normals<float>(offset + (count - 1) * ld + M, seed, 0, 0.25);
    for (float const x : numbers) storage.push_back(static_cast<T>(x));
    view = {storage.data() + offset, count, M, ld};
  }
};

template <class T>
void check(std::int64_t tokens, int E, std::int64_t M, std::int64_t gap, std::int64_t offset) {
  CAPTURE(tokens);
  CAPTURE(E);
  CAPTURE(M);
  rows_of<T> x(tokens, M, M + gap, offset, 1), router(E, M, M + gap, offset, 2);
  if (tokens > 2)
    x.storage[static_cast<std::size_t>(offset + M + gap)] =
        static_cast<T>(std::numeric_limits<float>::quiet_NaN());  // token 1
  std::vector<std::uint8_t> live(static_cast<std::size_t>(tokens), 1);
  live.back() = tokens % 2 == 0 ? 1 : 0;
  moe::batch const ids{.live = live.data()};
  auto const size = static_cast<std::size_t>(tokens * E);
  std::int32_t ticket = 0;
  std::vector<float> logits(size, 7), before;
  on_emulator([&](emulated_gpu const& exec) {
    moe::buffer const scratch(moe::project_and_route_scratch(exec, tokens, E, M));
    moe::routing_buffer routed(tokens, 4, E), expected(tokens, 4, E);
    std::vector<float> scores(size, 7), expected_scores(size);
    moe::project_and_route(exec, qwen3{}, x.view, router.view, ids, &ticket, scratch, routed,
                           moe::matrix_view(logits, tokens, E),
                           moe::matrix_view(scores, tokens, E));
    CHECK(ticket == 0);
    if (!before.empty()) {
      bool same = true;
      for (std::size_t i = 0; i < size; ++i)
        same = same && (before[i] == logits[i] || (std::isnan(before[i]) && std::isnan(logits[i])));
      CHECK(same);
    }
    before = logits;
    double worst = 0;
    int misplaced = 0;  // NaN
    for (std::int64_t t = 0; t < tokens; ++t)
      for (std::int64_t e = 0; e < E; ++e) {
        double sum = 0;
        for (std::int64_t m = 0; m < M; ++m)
          sum += static_cast<double>(x.view(t, m)) * static_cast<double>(router.view(e, m));
        double const off =
            std::abs(sum - static_cast<double>(logits[static_cast<std::size_t>(t * E + e)]));
        bool const nan = tokens > 2 && t == 1;
        misplaced += std::isnan(off) == nan ? 0 : 1;
        if (!nan) worst = moe_test::worse(worst, off);
      }
    CHECK(misplaced == 0);
    CHECK(worst < 1e-5);  // of sums of M terms of size 1/16
    // The gate of those logits, bit by bit.
    moe::cpu const cpu;
    moe::buffer const room(moe::route_scratch<qwen3>(cpu, E));
    moe::route(cpu, qwen3{}, moe::matrix_view(logits, tokens, E), ids, room, expected,
               moe::matrix_view(expected_scores, tokens, E));
    CHECK(std::equal(routed.expert, routed.expert + tokens * 4, expected.expert));
    CHECK(std::equal(routed.weight, routed.weight + tokens * 4, expected.weight));
    CHECK(std::equal(routed.score, routed.score + tokens * 4, expected.score));
    CHECK(scores == expected_scores);
  });
}

}  // namespace

TEST_CASE("gate/project_and_route: a product in double, and route of the logits") {
  check<moe::bf16>(3, 4, 1100, 0, 0);
  if (moe_test::has_thread_sanitizer) return;  // which follows so many threads and no more
  check<moe::bf16>(16, 60, 1000, 0, 0);
  check<moe::bf16>(3, 100, 2064, 8, 0);
  check<float>(1, 64, 512, 0, 0);
  check<float>(5, 300, 64, 0, 0);
}

TEST_CASE("gate/project_and_route: rows that are not aligned, an odd width") {
  if (moe_test::has_thread_sanitizer) return;
  check<moe::bf16>(4, 33, 515, 0, 1);
  check<float>(2, 5, 1, 3, 1);
  check<moe::half>(7, 12, 600, 1, 0);
}

TEST_CASE("gate/project_and_route: more parts of the width than blocks for them") {
  if (moe_test::has_thread_sanitizer) return;
  check<float>(1, 500, 1300, 0, 0);
}

TEST_CASE("gate/project_and_route: bad input") {
  emulated_gpu const exec;
  std::vector<float> const x(17 * 8), router(600 * 8);
  std::int32_t ticket = 0;
  moe::buffer const enough(moe::project_and_route_scratch(exec, 16, 10, 8));
  auto const call = [&](std::int64_t T, std::int64_t E, std::int64_t M, std::int32_t* counter,
                        moe::memory scratch) {
    moe::routing_buffer routed(2, 4, 10);
    return refusal([&] {
      moe::project_and_route(exec, qwen3{}, moe::matrix_view(x.data(), T, std::int64_t{8}),
                             moe::matrix_view(router.data(), E, M), {}, counter, scratch, routed);
    });
  };
  says(call(17, 10, 8, &ticket, enough), "project_and_route: T <= 16, 1 <= E <= 512; got T = 17");
  says(call(2, 600, 8, &ticket, enough), "T <= 16, 1 <= E <= 512; got T = 2, E = 600");
  says(call(2, 10, 7, &ticket, enough),
       "x is [T,M], router is [E,M], ld >= M; got M = 8, router's M = 7");
  says(call(2, 10, 8, nullptr, enough), "project_and_route: ticket is given");
  says(call(2, 10, 8, &ticket, {}), "scratch has project_and_route_scratch(exec, T, E, M) bytes");
  says(call(3, 10, 8, &ticket, enough), "route: the routing has the T and E");
  CHECK(call(2, 10, 8, &ticket, enough) == "nothing was thrown");
}
