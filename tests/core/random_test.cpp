#include <algorithm>
#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/random.hpp>

namespace {

struct known_answer {
  moe::philox_block counter;
  std::uint32_t key0, key1;
  moe::philox_block expected;
};

// philox4x32-10 of the known-answer file of Random123, the authors' own implementation.
constexpr known_answer answers[] = {
    {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
    {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
     0xffffffff,
     0xffffffff,
     {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
    {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
     0xa4093822,
     0x299f31d0,
     {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
};

struct moments {
  double mean = 0, variance = 0, skewness = 0;
};

template <class Draw>
moments moments_of(int tokens, std::uint32_t elements, Draw const& draw) {
  double s1 = 0, s2 = 0, s3 = 0;
  for (int id = 0; id < tokens; ++id)
    for (std::uint32_t e = 0; e < elements; ++e) {
      double const x = draw(moe::token{.id = id, .seed = 5, .step = 1}, e);
      s1 += x, s2 += x * x, s3 += x * x * x;
    }
  double const n = static_cast<double>(tokens) * elements;
  double const m = s1 / n, variance = s2 / n - m * m;
  return {m, variance, (s3 / n - 3 * m * s2 / n + 2 * m * m * m) / std::pow(variance, 1.5)};
}

}  // namespace

TEST_CASE("core/random: philox gives its authors' known answers") {
  for (known_answer const& a : answers) {
    auto const got = moe::philox(a.counter, a.key0, a.key1);
    for (int i = 0; i < 4; ++i) CHECK(got.word[i] == a.expected.word[i]);
  }
  static_assert(moe::philox({{0, 0, 0, 0}}, 0, 0).word[0] == 0x6627e8d5);
}

TEST_CASE("core/random: uniform is an odd multiple of 2^-24, never 0 or 1") {
  double lowest = 1, highest = 0;
  for (int id = 0; id < 200000; ++id) {
    float const u = moe::uniform({.id = id}, moe::stream::user, 0);
    double const scaled = std::ldexp(static_cast<double>(u), 24);
    if (!(u > 0 && u < 1 && scaled == std::floor(scaled) && std::fmod(scaled, 2) == 1))
      FAIL("drew " << u);
    lowest = std::min<double>(lowest, u);
    highest = std::max<double>(highest, u);
  }
  CHECK(lowest < 1e-4);
  CHECK(highest > 1 - 1e-4);
}

TEST_CASE("core/random: moments of the distributions") {
  // Bounds: five standard errors of n = 2^20 draws.
  constexpr int tokens = 1 << 14;
  constexpr std::uint32_t elements = 64;
  auto const u = moments_of(tokens, elements, [](moe::token const& t, std::uint32_t e) {
    return moe::uniform(t, moe::stream::noise, e);
  });
  CHECK(std::abs(u.mean - 0.5) < 0.0015);
  CHECK(std::abs(u.variance - 1.0 / 12) < 0.0004);
  CHECK(std::abs(u.skewness) < 0.01);
  auto const g = moments_of(tokens, elements, [](moe::token const& t, std::uint32_t e) {
    return moe::gumbel(t, moe::stream::gumbel, e);
  });
  CHECK(std::abs(g.mean - 0.5772156649) < 0.0065);
  CHECK(std::abs(g.variance - 1.6449340668) < 0.018);
  CHECK(std::abs(g.skewness - 1.1395470994) < 0.06);
  auto const n = moments_of(tokens, elements, [](moe::token const& t, std::uint32_t e) {
    return moe::normal(t, moe::stream::noise, e);
  });
  CHECK(std::abs(n.mean) < 0.005);
  CHECK(std::abs(n.variance - 1) < 0.007);
  CHECK(std::abs(n.skewness) < 0.013);
}

TEST_CASE(
    "core/random: the two normal numbers of one pair are uncorrelated, and so are neighbours") {
  double pair = 0, next_pair = 0, next_token = 0;
  constexpr int n = 1 << 18;
  for (int id = 0; id < n; ++id) {
    moe::token const t{.id = id, .seed = 9};
    auto const draw = [&](int offset, std::uint32_t e) {
      return static_cast<double>(
          moe::normal({.id = t.id + offset, .seed = t.seed}, moe::stream::noise, e));
    };
    pair += draw(0, 0) * draw(0, 1);
    next_pair += draw(0, 1) * draw(0, 2);
    next_token += draw(0, 0) * draw(1, 0);
  }
  for (double const sum : {pair, next_pair, next_token}) CHECK(std::abs(sum / n) < 0.01);
}

TEST_CASE("core/random: a draw does not depend on the row, the batch or the order of drawing") {
  auto const all = [](std::int64_t first_id, std::int64_t rows) {
    moe::batch const tokens{.first_id = first_id, .seed = 3, .step = 8};
    std::vector<std::uint32_t> drawn;
    for (std::int64_t row = 0; row < rows; ++row)
      for (std::uint32_t e = 0; e < 7; ++e)
        drawn.push_back(moe::random_bits(tokens.at(row), moe::stream::gumbel, e));
    return drawn;
  };
  auto const whole = all(100, 20);
  auto halves = all(100, 13);
  auto const rest = all(113, 7);
  halves.insert(halves.end(), rest.begin(), rest.end());
  CHECK(whole == halves);
}

TEST_CASE("core/random: every argument counts, and streams do not collide") {
  using moe::stream;
  std::vector<std::uint64_t> seen;
  auto const draw = [&](moe::token const& t, stream s, std::uint32_t index) {
    seen.push_back(std::uint64_t{moe::random_bits(t, s, index)} << 32 |
                   moe::random_bits(t, s, index + (1u << 20)));
  };
  moe::token const t{.id = 1, .seed = 1, .step = 1};
  for (stream const s : {stream::jitter, stream::gumbel, stream::overflow, stream::noise,
                         stream::dispatch, stream::user, static_cast<stream>(255)})
    for (std::uint32_t index = 0; index < 2000; ++index) draw(t, s, index);
  for (std::int64_t id : {2, 3, -1}) draw({.id = id, .seed = 1, .step = 1}, stream::jitter, 0);
  draw({.id = std::int64_t{1} | std::int64_t{1} << 32, .seed = 1, .step = 1}, stream::jitter, 0);
  draw({.id = 1, .seed = 2, .step = 1}, stream::jitter, 0);
  draw({.id = 1, .seed = 1 | std::uint64_t{1} << 32, .step = 1}, stream::jitter, 0);
  draw({.id = 1, .seed = 1, .step = 2}, stream::jitter, 0);
  std::sort(seen.begin(), seen.end());
  CHECK(std::adjacent_find(seen.begin(), seen.end()) == seen.end());

  // The last index of one stream is not the first of the next.
  CHECK(moe::random_bits(t, stream::jitter, (1u << 26) - 4) !=
        moe::random_bits(t, stream::gumbel, 0));
  // Training or not, row or not: no part of the key.
  CHECK(moe::random_bits({.id = 1, .row = 5, .seed = 1, .step = 1, .training = true}, stream::user,
                         3) == moe::random_bits(t, stream::user, 3));
}

TEST_CASE(
    "core/random: a drawing token gives the token's numbers, in any order of elements and "
    "streams") {
  moe::token const t{.id = -5, .seed = 77, .step = 3};
  moe::drawing_token draws(t);
  for (std::uint32_t const index : {0u, 1u, 3u, 2u, 4u, 0u, 400u, 401u, 3u, (1u << 26) - 1})
    for (auto const s : {moe::stream{0}, moe::stream::gumbel, moe::stream::noise}) {
      CAPTURE(index);
      CHECK(moe::random_bits(draws, s, index) == moe::random_bits(t, s, index));
      CHECK(moe::uniform(draws, s, index) == moe::uniform(t, s, index));
      CHECK(moe::gumbel(draws, s, index) == moe::gumbel(t, s, index));
      CHECK(moe::normal(draws, s, index) == moe::normal(t, s, index));
    }
}
