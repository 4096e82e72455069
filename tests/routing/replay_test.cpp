// Saved routings: round trips, the format byte by byte, and damage of every kind.
// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/routing/replay.hpp>

namespace {

using bytes = std::vector<std::byte>;

template <class V>
bytes saved(moe::basic_routing<V> const& r, moe::saved_parts keep = {}) {
  bytes out(saved_routing_bytes(r, keep));
  save_routing(r, moe::vector_view<std::byte>(out), keep);
  return out;
}

template <class V>
moe::basic_routing_buffer<V> example() {
  moe::basic_routing_buffer<V> r(3, 2, 5);
  std::int32_t const chosen[] = {4, 0, -1, 3, -2, -2};
  for (int i = 0; i < 6; ++i) {
    r.expert[i] = chosen[i];
    r.weight[i] = static_cast<V>(0.1 * i);
    r.score[i] = static_cast<V>(-1.5 * i);
  }
  return r;
}

template <class V>
bool same(V const* a, V const* b, std::int64_t n) {
  return a != nullptr && b != nullptr &&
         std::memcmp(a, b, static_cast<std::size_t>(n) * sizeof(V)) == 0;
}

/// With the checksum made right again, so that other checks are reached.
void seal(bytes& b) {
  moe::detail::put(b.data() + b.size() - 8,
                   moe::detail::fnv1a(b.data(), static_cast<std::int64_t>(b.size()) - 8));
}

std::string refusal(bytes const& b) {
  try {
    moe::load_routing<float>(b);
  } catch (moe::format_error const& e) {
    return e.what();
  }
  return "accepted";
}

}  // namespace

TEST_CASE_TEMPLATE("routing/replay: what is saved is loaded, bit for bit", V, float, double) {
  auto const r = example<V>();
  auto const back = moe::load_routing<V>(saved(r));
  CHECK(back.T == 3);
  CHECK(back.K == 2);
  CHECK(back.E == 5);
  CHECK(back.token_begin == nullptr);
  CHECK(same(back.expert, r.expert, 6));
  CHECK(same(back.weight, r.weight, 6));
  CHECK(same(back.score, r.score, 6));
  auto const only_ids = moe::load_routing<V>(saved(r, {.weight = false, .score = false}));
  CHECK(same(only_ids.expert, r.expert, 6));
  CHECK(only_ids.weight == nullptr);
  CHECK(only_ids.score == nullptr);
}

TEST_CASE("routing/replay: variable K and no tokens") {
  auto r = example<float>();
  std::int32_t const begin[] = {0, 2, 2, 3};
  r.token_begin = begin;
  auto const back = moe::load_routing<float>(saved(r));
  CHECK(same(back.token_begin, begin, 4));
  CHECK(back.pairs() == 3);
  CHECK(same(back.score, r.score, 3));
  auto const none = moe::load_routing<float>(saved(moe::routing_buffer(0, 2, 5)));
  CHECK(none.T == 0);
  CHECK(none.E == 5);

  // Parts without elements were saved all the same.
  float nothing = 0;
  moe::routing empty;
  empty.K = empty.E = 1;
  empty.weight = &nothing;
  auto const parts = moe::load_routing<float>(saved(empty));
  CHECK(parts.weight != nullptr);
  CHECK(parts.score == nullptr);
}

TEST_CASE("routing/replay: the format, byte by byte") {
  moe::routing_buffer r(1, 1, 3);
  r.expert[0] = 2;
  r.weight[0] = 1.0f;
  bytes const got = saved(r, {.score = false});
  unsigned char const want[] = {
      'm', 'o', 'e', '-', 'r', 'o', 'u', 't', 1, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0,    0,
      1,   0,   0,   0,   3,   0,   0,   0,   1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0x80, 0x3f};
  REQUIRE(got.size() == sizeof(want) + 8);
  CHECK(std::memcmp(got.data(), want, sizeof(want)) == 0);
}

TEST_CASE("routing/replay: every truncation and every changed byte is refused") {
  bytes const whole = saved(example<float>());
  for (std::size_t n = 0; n < whole.size(); ++n)
    CHECK_THROWS_AS(moe::load_routing<float>(
                        bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(n))),
                    moe::format_error);
  bytes longer = whole;
  longer.push_back(std::byte{0});
  CHECK_THROWS_AS(moe::load_routing<float>(longer), moe::format_error);
  for (std::size_t i = 0; i < whole.size(); ++i) {
    bytes changed = whole;
    changed[i] ^= std::byte{0x40};
    CHECK_THROWS_AS(moe::load_routing<float>(changed), moe::format_error);
  }
}

TEST_CASE("routing/replay: each rule of the format has its message") {
  bytes const whole = saved(example<float>());
  auto const with = [&](std::size_t at, int value) {
    bytes b = whole;
    b[at] = static_cast<std::byte>(value);
    seal(b);
    return refusal(b);
  };
  CHECK(refusal(whole) == "accepted");
  CHECK(with(0, 'M') == "load_routing: not a saved routing");
  CHECK(with(8, 2) == "load_routing: another version");
  CHECK(with(12, 16) == "load_routing: unknown parts");
  CHECK(with(12, 8 + 6) == "load_routing: values of another type");
  CHECK(with(23, 1) == "load_routing: sizes out of range");  // T
  CHECK(with(24, 0) == "load_routing: sizes out of range");  // K
  CHECK(with(24, 17) == "load_routing: sizes out of range");
  CHECK(with(28, 0) == "load_routing: sizes out of range");  // E
  CHECK(with(16, 4) == "load_routing: pairs do not agree with T and K");
  CHECK(with(12, 2) == "load_routing: number of bytes does not agree with the header");
  CHECK(with(40, 5) == "load_routing: an id that is no expert");
  CHECK(with(40, 3) == "accepted");
  bytes negative = whole;
  moe::detail::put(negative.data() + 40, std::int32_t{-3});
  seal(negative);
  CHECK(refusal(negative) == "load_routing: an id that is no expert");
  bytes unsealed = whole;
  unsealed[40] = std::byte{3};
  CHECK(refusal(unsealed) == "load_routing: wrong checksum");
  CHECK(refusal({}) == "load_routing: too short for a header");
  CHECK_THROWS_AS(moe::load_routing<double>(whole), moe::format_error);

  auto r = example<float>();
  for (std::int32_t middle : {-1, 3, 4}) {
    std::int32_t const begin[] = {0, middle, 2, 3};
    r.token_begin = begin;
    CHECK(refusal(saved(r)) == "load_routing: token_begin does not rise from 0 by at most K");
  }
  std::int32_t const steep[] = {0, 3, 3, 3};  // more than K
  r.token_begin = steep;
  CHECK(refusal(saved(r)) == "load_routing: token_begin does not rise from 0 by at most K");
  std::int32_t const late[] = {1, 1, 2, 3};
  r.token_begin = late;
  CHECK(refusal(saved(r)) == "load_routing: token_begin does not rise from 0 by at most K");
}

TEST_CASE("routing/replay: save_routing refuses sizes it cannot write") {
  auto const r = example<float>();
  bytes little(10);
  CHECK_THROWS_WITH_AS(save_routing(r, moe::vector_view<std::byte>(little)),
                       doctest::Contains("size = 10"), moe::precondition_error);
  moe::routing none;
  none.T = 1;
  none.K = 1;
  none.E = 1;
  bytes out(saved_routing_bytes(none));
  CHECK_THROWS_WITH_AS(save_routing(none, moe::vector_view<std::byte>(out)),
                       doctest::Contains("expert is given"), moe::precondition_error);
}
