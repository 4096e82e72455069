// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <support/random.hpp>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/gate/jitter.hpp>

namespace {

constexpr float eps = 0.01f;

template <class V>
std::vector<V> jittered(std::vector<V> const& x, std::int64_t T, moe::batch const& ids,
                        moe::cpu const& exec = {}) {
  std::int64_t const M = T == 0 ? 5 : static_cast<std::int64_t>(x.size()) / T;
  std::vector<V> out(x.size(), V(99));
  moe::jitter(exec, moe::matrix_view(x, T, M), eps, ids, moe::matrix_view(out, T, M));
  return out;
}

}  // namespace

TEST_CASE("gate/jitter: factors are uniform around 1, and 1 outside training") {
  std::vector<double> const ones(50 * 400, 1.0);
  auto const y = jittered(ones, 50, {.seed = 1, .training = true});
  double mean = 0, lowest = 2, highest = 0;
  for (double v : y) {
    mean += v / static_cast<double>(y.size());
    lowest = std::min(lowest, v);
    highest = std::max(highest, v);
  }
  CHECK(lowest >= 1 - eps);
  CHECK(lowest < 1 - 0.99 * eps);
  CHECK(highest <= 1 + double(eps));
  CHECK(highest > 1 + 0.99 * eps);
  CHECK(std::abs(mean - 1) < 5 * eps / std::sqrt(3.0 * 20000));
  CHECK(jittered(ones, 50, {.seed = 1}) == ones);
}

TEST_CASE("gate/jitter: draws depend on seed, step and token id, not on place or threads") {
  auto const x = moe_test::normals<float>(300 * 7, 1);
  auto const y = jittered(x, 300, {.first_id = 10, .seed = 2, .step = 3, .training = true});
  for (int threads : {2, 3, 7}) {
    moe::thread_team team(threads);
    CHECK(jittered(x, 300, {.first_id = 10, .seed = 2, .step = 3, .training = true},
                   moe::cpu(team)) == y);
  }
  std::vector<float> const tail(x.end() - 100 * 7, x.end());
  auto const part = jittered(tail, 100, {.first_id = 210, .seed = 2, .step = 3, .training = true});
  CHECK(part == std::vector<float>(y.end() - 100 * 7, y.end()));
  std::vector<std::int64_t> ids(300);
  for (std::size_t t = 0; t < 300; ++t) ids[t] = static_cast<std::int64_t>(t) + 10;
  CHECK(jittered(x, 300, {.ids = ids.data(), .seed = 2, .step = 3, .training = true}) == y);
  CHECK(jittered(x, 300, {.first_id = 11, .seed = 2, .step = 3, .training = true}) != y);
  CHECK(jittered(x, 300, {.first_id = 10, .seed = 3, .step = 3, .training = true}) != y);
  CHECK(jittered(x, 300, {.first_id = 10, .seed = 2, .step = 4, .training = true}) != y);
}

TEST_CASE("gate/jitter: backward multiplies by the same numbers") {
  auto const x = moe_test::normals<double>(4 * 9, 1);
  auto const dout = moe_test::normals<double>(4 * 9, 2);
  moe::batch const ids{.seed = 5, .training = true};
  auto const y = jittered(x, 4, ids);
  std::vector<double> dx(x.size());
  moe::jitter_backward(moe::cpu{}, moe::matrix_view(dout, 4, 9), eps, ids,
                       moe::matrix_view(dx, 4, 9));
  for (std::size_t i = 0; i < x.size(); ++i)
    CHECK(dx[i] == doctest::Approx(dout[i] * y[i] / x[i]).epsilon(1e-12));
}

TEST_CASE("gate/jitter: in place, with leading dimensions, into another type, and on no tokens") {
  auto x = moe_test::normals<float>(3 * 4, 1);
  moe::batch const ids{.training = true};
  auto const y = jittered(x, 3, ids);
  std::vector<float> wide(3 * 6, 7.0f);
  moe::jitter(moe::cpu{}, moe::matrix_view(x, 3, 4), eps, ids,
              moe::matrix_view(wide.data(), 3, 4, 6));
  std::vector<double> other(12);
  moe::jitter(moe::cpu{}, moe::matrix_view(x, 3, 4), eps, ids, moe::matrix_view(other, 3, 4));
  moe::jitter(moe::cpu{}, moe::matrix_view(x, 3, 4), eps, ids, moe::matrix_view(x, 3, 4));
  CHECK(x == y);
  for (std::size_t t = 0; t < 3; ++t)
    for (std::size_t m = 0; m < 6; ++m) CHECK(wide[t * 6 + m] == (m < 4 ? y[t * 4 + m] : 7.0f));
  for (std::size_t i = 0; i < 12; ++i) CHECK(static_cast<float>(other[i]) == y[i]);
  CHECK(jittered(std::vector<float>{}, 0, ids).empty());
}

TEST_CASE("gate/jitter: bad input is refused") {
  std::vector<float> x(20), y(20);
  auto const refusal = [&](moe::matrix_view<float> from, moe::matrix_view<float> to,
                           float by = eps) {
    try {
      moe::jitter(moe::cpu{}, from, by, {}, to);
    } catch (moe::precondition_error const& e) {
      return std::string(e.what());
    }
    return std::string("nothing was thrown");
  };
  CHECK(refusal({x.data(), 4, 5}, {y.data(), 4, 4})
            .find("jitter: tokens and out are [T,M], ld >= M, M < 2^26; got T = 4, M = 5") == 0);
  CHECK(refusal({x.data(), 4, 5, 4}, {y.data(), 4, 5}).find("ld = 4") != std::string::npos);
  CHECK(refusal({x.data(), 3, 5}, {x.data() + 5, 3, 5})
            .find("jitter: out is tokens or does not overlap it") == 0);
  for (float const by : {-0.01f, 1.01f, std::nanf("")})
    CHECK(refusal({x.data(), 4, 5}, {y.data(), 4, 5}, by).find("0 <= eps <= 1") !=
          std::string::npos);
}
