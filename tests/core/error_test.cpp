#include <cstdint>
#include <doctest/doctest.h>
#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <moe/core/error.hpp>

namespace {

// As a public function of the library is written.
int halve(int n, moe::call_site site = moe::call_site::here()) {
  moe::expects(n >= 0 && n % 2 == 0, "halve: n is even and not negative", site, {{"n", n}});
  return n / 2;
}

std::string text_of(moe::named_value const& value) {
  return value.text();
}

}  // namespace

TEST_CASE("core/error: the message holds function, rule, values, and the caller's file and line") {
  std::string text;
  int line = 0;
  moe::call_site site;
  try {
    line = __LINE__ + 1;
    halve(-3);
  } catch (moe::precondition_error const& e) {
    text = e.what();
    site = e.site();
  }
  CHECK(text == std::string("halve: n is even and not negative; got n = -3 (called at ") +
                    __FILE__ + ":" + std::to_string(line) + ")");
  CHECK(std::string(site.file) == __FILE__);
  CHECK(site.line == line);
}

TEST_CASE("core/error: several values, and none") {
  moe::call_site const site{"file.cpp", 7};
  CHECK_THROWS_WITH(moe::expects(false, "f: a < b", site, {{"a", 2}, {"b", 1.5}, {"c", 3u}}),
                    "f: a < b; got a = 2, b = 1.5, c = 3 (called at file.cpp:7)");
  CHECK_THROWS_WITH(moe::expects(false, "f: rule", site), "f: rule (called at file.cpp:7)");
  CHECK_THROWS_WITH(moe::expects(false, "f: rule", {}), "f: rule (called at unknown:0)");
  CHECK_NOTHROW(moe::expects(true, "f: rule", site, {{"a", 1}}));
}

TEST_CASE("core/error: numbers of any type and size are printed as they are") {
  CHECK(text_of({"n", std::numeric_limits<std::int64_t>::min()}) == "n = -9223372036854775808");
  CHECK(text_of({"n", std::numeric_limits<std::uint64_t>::max()}) == "n = 18446744073709551615");
  CHECK(text_of({"n", static_cast<signed char>(-1)}) == "n = -1");
  CHECK(text_of({"n", static_cast<unsigned char>(200)}) == "n = 200");
  CHECK(text_of({"n", true}) == "n = 1");
  CHECK(text_of({"x", 1e-9}) == "x = 1e-09");
  CHECK(text_of({"x", 0.1f}) == "x = 0.100000001");
  CHECK(text_of({"x", 1e300}) == "x = 1e+300");
  CHECK(text_of({"x", -std::numeric_limits<double>::infinity()}) == "x = -inf");
}

TEST_CASE("core/error: every exception is a moe::error, which is a std::runtime_error") {
  static_assert(std::is_base_of_v<std::runtime_error, moe::error>);
  static_assert(std::is_base_of_v<moe::error, moe::precondition_error>);
  static_assert(std::is_base_of_v<moe::error, moe::format_error>);
  CHECK_THROWS_AS(halve(1), moe::error);
  CHECK_THROWS_AS(halve(1), std::exception);
  CHECK_THROWS_WITH_AS(throw moe::format_error("load: magic"), "load: magic", moe::error);
}

TEST_CASE("core/error: a condition that holds costs nothing in constant expressions") {
  static_assert([] {
    moe::expects(true, "f: rule", moe::call_site::here(), {{"a", 1}});
    return true;
  }());
}
