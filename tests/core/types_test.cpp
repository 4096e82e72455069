#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <type_traits>

#include <moe/core/types.hpp>

TEST_CASE("core/types: a batch gives each row its token") {
  moe::batch const tokens{.first_id = 100, .seed = 7, .step = 3, .training = true};
  moe::token const t = tokens.at(5);
  CHECK(t.id == 105);
  CHECK(t.row == 5);
  CHECK(t.seed == 7);
  CHECK(t.step == 3);
  CHECK(t.training);
  CHECK(tokens.is_live(5));
}

TEST_CASE("core/types: ids and the mask of a batch are the caller's arrays") {
  std::int64_t const ids[] = {40, -2, 40};
  std::uint8_t const live[] = {1, 0, 255};
  moe::batch const tokens{.first_id = 9, .ids = ids, .live = live};
  CHECK(tokens.at(1).id == -2);
  CHECK(tokens.at(2).id == 40);
  CHECK(tokens.at(2).row == 2);
  CHECK(tokens.is_live(0));
  CHECK_FALSE(tokens.is_live(1));
  CHECK(tokens.is_live(2));
}

TEST_CASE("core/types: values that can be arguments of a kernel") {
  static_assert(std::is_trivially_copyable_v<moe::token>);
  static_assert(std::is_trivially_copyable_v<moe::batch>);
  static_assert(std::is_trivially_copyable_v<moe::choice<float>>);
  static_assert(std::is_trivially_copyable_v<moe::choices<moe::max_choices, double>>);
  static_assert(moe::choices<3>::max_k == 3);
  CHECK(moe::choice<float>{}.expert == -1);
  CHECK(moe::choices<2>{}.k == 0);
}

TEST_CASE("core/choices: each visits the first k, in order") {
  moe::choices<4> chosen;
  std::string visited;
  for (int k = 0; k <= 4; ++k) {
    chosen.k = k;
    chosen.each([&](int j) { visited += static_cast<char>('0' + j); });
    visited += ' ';
  }
  CHECK(visited == " 0 01 012 0123 ");
}
