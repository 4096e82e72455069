// SPDX-License-Identifier: MIT
#include <cstdint>
#include <doctest/doctest.h>
#include <gate/selected.hpp>
#include <limits>
#include <string>
#include <support/laws.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/gate/select.hpp>

namespace {

using moe_test::ids;
using moe_test::refusal;
using moe_test::selected;
constexpr float none = moe::no_score<float>;

}  // namespace

TEST_CASE("gate/top_k: keeps the laws of select policies") {
  moe_test::select_policy_laws(moe::top_k<1>{});
  moe_test::select_policy_laws(moe::top_k<4>{});
  moe_test::select_policy_laws(moe::top_k<16>(3));
  moe_test::select_policy_laws(moe::top_k<16>{});
}

TEST_CASE("gate/top_k: equal keys go to the lower expert id") {
  CHECK(selected(moe::top_k<3>{}, std::vector<float>{1, 2, 2, 2, 1}) == ids{1, 2, 3});
  CHECK(selected(moe::top_k<2>{}, std::vector<float>{0, -0.0f, 0}) == ids{0, 1});
  CHECK(selected(moe::top_k<2>{}, std::vector<double>(100, 7.0)) == ids{0, 1});
}

TEST_CASE("gate/top_k: -1 where no candidate is left") {
  CHECK(selected(moe::top_k<3>{}, std::vector<float>{none, 5, none}) == ids{1, -1, -1});
  CHECK(selected(moe::top_k<2>{}, std::vector<float>(40, none)) == ids{-1, -1});
}

TEST_CASE("gate/top_k: one expert, and all experts") {
  CHECK(selected(moe::top_k<1>{}, std::vector<float>{-3}) == ids{0});
  CHECK(selected(moe::top_k<4>{}, std::vector<float>{1, 4, 3, 2}) == ids{1, 2, 3, 0});
}

TEST_CASE("gate/top_k: finds the best anywhere in rows of any length") {
  for (int E : {1, 31, 32, 33, 63, 64, 65, 100})
    for (int best = 0; best < E; ++best) {
      std::vector<float> keys(static_cast<std::size_t>(E), -1.0f);
      keys[static_cast<std::size_t>(best)] = 1;
      CAPTURE(E);
      REQUIRE(selected(moe::top_k<1>{}, keys) == ids{best});
    }
}

TEST_CASE("gate/top_k: k out of range is refused with the values") {
  CHECK(refusal([] { moe::top_k<4>(5); }).find("top_k: 1 <= k <= MaxK; got k = 5, MaxK = 4") == 0);
  CHECK(refusal([] { moe::top_k<4>(0); }).find("top_k: 1 <= k <= MaxK; got k = 0, MaxK = 4") == 0);
}

TEST_CASE("gate/visible: hidden experts are not chosen") {
  moe_test::select_policy_laws(moe::visible<moe::top_k<2>>{});
  std::vector<std::uint8_t> const mask{1, 0, 1, 0, 2};
  moe::visible<moe::top_k<2>> const p{{}, mask.data()};
  CHECK(selected(p, std::vector<float>{1, 9, 2, 8, 3}) == ids{4, 2});
  CHECK(selected(p, std::vector<float>{none, 9, none, 8, 3}) == ids{4, -1});
  CHECK(selected(moe::visible<moe::top_k<2>>{}, std::vector<float>{1, 9, 2, 8, 3}) == ids{1, 3});
  CHECK(moe::visible<moe::top_k<4>>{moe::top_k<4>(3)}.k() == 3);
}

TEST_CASE("gate/replayed: gives the ids of the token's row, whatever the keys") {
  std::vector<std::int32_t> const given{2, 0, 99, 1, 3, 99};  // [2,2], ld 3
  moe::replayed<4> const p(given.data(), 2, 3);
  std::vector<float> const keys{9, 1, 2, 3};
  CHECK(selected(p, keys, {.row = 0}) == ids{2, 0});
  CHECK(selected(p, keys, {.id = 7, .row = 1}) == ids{1, 3});
}

TEST_CASE("gate/replayed: what cannot be followed gives no expert in its place") {
  std::vector<std::int32_t> const given{4, 1, -1, 1, 2, 0, -2};
  moe::replayed<7> const p(given.data(), 7, 7);
  CHECK(selected(p, std::vector<float>{none, 1, 2, 3}) == ids{-1, 1, -1, -1, 2, -1, -1});
}

TEST_CASE("gate/replayed: bad input is refused") {
  std::vector<std::int32_t> const given(4);
  char const* const rule = "replayed: ids are given, 1 <= k <= MaxK, ld >= k; got k = ";
  CHECK(refusal([&] { moe::replayed<2>(given.data(), 3, 3); }).find(rule) == 0);
  CHECK(refusal([&] { moe::replayed<2>(given.data(), 2, 1); }).find(rule) == 0);
  CHECK(refusal([&] { moe::replayed<2>(nullptr, 2, 2); }).find(rule) == 0);
}
