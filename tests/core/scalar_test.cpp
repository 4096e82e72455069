#include <cmath>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include <moe/core/scalar.hpp>

namespace {

using moe::bf16;
using moe::half;

// What the two formats are, apart from any bit trick: sign, `exponent` bits, `mantissa` bits.
template <class T>
struct format;
template <>
struct format<bf16> {
  static constexpr int exponent = 8, mantissa = 7;
};
template <>
struct format<half> {
  static constexpr int exponent = 5, mantissa = 10;
};

template <class T>
double value_of(unsigned bits) {
  constexpr int m = format<T>::mantissa, top = (1 << format<T>::exponent) - 1, bias = top / 2;
  int const exponent = static_cast<int>(bits >> m) & top;
  double const fraction = bits & ((1u << m) - 1u);
  double const sign = (bits & 0x8000u) != 0 ? -1.0 : 1.0;
  if (exponent == top) return fraction == 0 ? sign * HUGE_VAL : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias - m);
  return sign * std::ldexp(std::ldexp(1.0, m) + fraction, exponent - bias - m);
}

// Rounds by arithmetic in double: the spacing of numbers around x, then the even multiple of it.
template <class T>
double nearest(double x) {
  constexpr int m = format<T>::mantissa, bias = (1 << (format<T>::exponent - 1)) - 1;
  if (x == 0 || !std::isfinite(x)) return x;
  int const exponent = std::max(std::ilogb(x), 1 - bias);
  double const spacing = std::ldexp(1.0, exponent - m);
  double const rounded = std::nearbyint(x / spacing) * spacing;
  double const largest = std::ldexp(2.0 - std::ldexp(1.0, -m), bias);
  return std::abs(rounded) > largest ? std::copysign(HUGE_VAL, x) : rounded;
}

template <class T>
bool rounds_right(float x) {
  T const stored(x);
  double const got = value_of<T>(stored.bits);
  double const expected = nearest<T>(static_cast<double>(x));
  if (std::isnan(x)) return std::isnan(got) && std::signbit(x) == ((stored.bits & 0x8000u) != 0);
  return got == expected && std::signbit(got) == std::signbit(x);
}

// Loops over this must become vector code; kept out of line so that they are compiled as a user's.
template <class From, class To>
[[gnu::noinline]] void convert(From const* from, To* to, int n) {
  for (int i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);
}

}  // namespace

TEST_CASE_TEMPLATE("core/scalar: every pattern has its value", T, bf16, half) {
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    auto const x = T::from_bits(static_cast<std::uint16_t>(bits));
    double const expected = value_of<T>(bits);
    float const got = static_cast<float>(x);
    bool const same = std::isnan(expected)
                          ? std::isnan(got)
                          : got == expected && std::signbit(got) == std::signbit(expected);
    wrong += !same;
    wrong += !(std::isnan(got) || static_cast<double>(x) == static_cast<double>(got));
    wrong += (x == x) == std::isnan(got);
  }
  CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("core/scalar: every pattern survives the way to float and back", T, bf16, half) {
  int changed = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    auto const x = T::from_bits(static_cast<std::uint16_t>(bits));
    T const back(static_cast<float>(x));
    bool const nan = std::isnan(value_of<T>(bits));
    changed += nan ? !std::isnan(value_of<T>(back.bits)) : back.bits != bits;
  }
  CHECK(changed == 0);
}

TEST_CASE_TEMPLATE("core/scalar: between any two neighbours, to the nearest, ties to even", T, bf16,
                   half) {
  int wrong = 0, checked = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    double const a = value_of<T>(bits);
    if (!std::isfinite(a)) continue;
    // The neighbour away from zero; beyond the largest, as if the exponent went on.
    double const b = std::isfinite(value_of<T>(bits + 1)) && (bits & 0x7fffu) != 0x7fffu
                         ? value_of<T>(bits + 1)
                         : a + (a - value_of<T>(bits - 1));
    auto const middle = static_cast<float>((a + b) / 2);
    auto const quarter = static_cast<float>(a + (b - a) / 4);
    float const infinity = std::numeric_limits<float>::infinity();
    for (float const x : {static_cast<float>(a), quarter, middle, std::nextafter(middle, infinity),
                          std::nextafter(middle, -infinity), static_cast<float>(b)}) {
      wrong += !rounds_right<T>(x);
      ++checked;
    }
  }
  CHECK(wrong == 0);
  CHECK(checked > 6 * 63000);
}

TEST_CASE_TEMPLATE("core/scalar: floats of any bits round as double arithmetic does", T, bf16,
                   half) {
  std::mt19937 random(1);
  int wrong = 0;
  for (int i = 0; i < 1000000; ++i)
    wrong += !rounds_right<T>(__builtin_bit_cast(float, static_cast<std::uint32_t>(random())));
  for (int i = 0; i < 1000000; ++i)  // around the range of half, which few patterns are in
    wrong += !rounds_right<T>(std::ldexp(static_cast<float>(static_cast<std::int32_t>(random())),
                                         static_cast<int>(random() % 46) - 60));
  CHECK(wrong == 0);
}

TEST_CASE("core/scalar: worked examples") {
  CHECK(bf16(1.0f).bits == 0x3f80);
  CHECK(bf16(-2.0f).bits == 0xc000);
  CHECK(bf16(1.00390625f).bits == 0x3f80);  // 1 + 2^-8: a tie, down to even
  CHECK(bf16(1.01171875f).bits == 0x3f82);  // 1 + 3 * 2^-8: a tie, up to even
  CHECK(bf16(std::numeric_limits<float>::max()).bits == 0x7f80);
  CHECK(half(1.0f).bits == 0x3c00);
  CHECK(half(-0.0f).bits == 0x8000);
  CHECK(half(65504.0f).bits == 0x7bff);
  CHECK(half(65519.996f).bits == 0x7bff);
  CHECK(half(65520.0f).bits == 0x7c00);
  CHECK(half(-65520.0f).bits == 0xfc00);
  CHECK(half(0x1p-24f).bits == 0x0001);
  CHECK(half(0x1p-25f).bits == 0x0000);  // a tie, down to even
  CHECK(half(0x1.000002p-25f).bits == 0x0001);
  CHECK(half(0x1.ffcp-15f).bits == 0x0400);  // the tie above the largest subnormal
  CHECK(static_cast<float>(half::from_bits(0x03ff)) == 0x1.ff8p-15f);
  CHECK(bf16(0.0f) == bf16(-0.0f));
  CHECK(half(1.0f) != half(2.0f));
  // A NaN whose payload is all in the bits that go stays NaN.
  CHECK(std::isnan(static_cast<float>(bf16(__builtin_bit_cast(float, 0x7f800001u)))));
  CHECK(std::isnan(static_cast<float>(half(__builtin_bit_cast(float, 0xff800001u)))));
}

#if defined(__FLT16_MANT_DIG__)
TEST_CASE("core/scalar: half agrees with the compiler's own") {
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    auto const own = __builtin_bit_cast(_Float16, static_cast<std::uint16_t>(bits));
    float const got = static_cast<float>(half::from_bits(static_cast<std::uint16_t>(bits)));
    auto const expected = static_cast<float>(own);
    wrong += !(got == expected || (std::isnan(got) && std::isnan(expected)));
  }
  std::mt19937 random(2);
  for (int i = 0; i < 1000000; ++i) {
    float const x = std::ldexp(static_cast<float>(static_cast<std::int32_t>(random())),
                               static_cast<int>(random() % 46) - 60);
    wrong += half(x).bits != __builtin_bit_cast(std::uint16_t, static_cast<_Float16>(x));
  }
  CHECK(wrong == 0);
}
#endif

TEST_CASE_TEMPLATE("core/scalar: loops give what single conversions give", T, bf16, half) {
  std::vector<T> all(65536);
  for (unsigned bits = 0; bits < 65536; ++bits)
    all[bits] = T::from_bits(static_cast<std::uint16_t>(bits));
  std::vector<float> wide(all.size());
  std::vector<T> back(all.size());
  convert(all.data(), wide.data(), 65536);
  convert(wide.data(), back.data(), 65536);
  int wrong = 0;
  for (unsigned bits = 0; bits < 65536; ++bits) {
    double const expected = value_of<T>(bits);
    wrong += !(wide[bits] == expected || (std::isnan(expected) && std::isnan(wide[bits])));
    wrong += !std::isnan(expected) && back[bits].bits != bits;
  }
  CHECK(wrong == 0);
}

TEST_CASE("core/scalar: conversions are spelled out, and never round twice") {
  static_assert(!std::is_convertible_v<float, bf16> && std::is_constructible_v<bf16, float>);
  static_assert(!std::is_convertible_v<bf16, float> && std::is_constructible_v<float, bf16>);
  static_assert(!std::is_constructible_v<bf16, double> && !std::is_constructible_v<half, double>);
  static_assert(!std::is_constructible_v<bf16, int> && !std::is_constructible_v<half, int>);
  static_assert(!std::is_constructible_v<bf16, half> && !std::is_constructible_v<half, bf16>);
  static_assert(std::is_constructible_v<double, bf16> && std::is_constructible_v<double, half>);
  static_assert([]<class T>(T) { return !requires(T a) { a + a; }; }(bf16{}));
  static_assert([]<class T>(T) { return !requires(T a) { a * 1.0f; }; }(half{}));

  static_assert(std::is_same_v<moe::accumulate_t<bf16>, float>);
  static_assert(std::is_same_v<moe::accumulate_t<half>, float>);
  static_assert(std::is_same_v<moe::accumulate_t<float>, float>);
  static_assert(std::is_same_v<moe::accumulate_t<double>, double>);

  static_assert(static_cast<float>(bf16(1.5f)) == 1.5f);  // in constant expressions, too
  static_assert(static_cast<float>(half(0x1p-24f)) == 0x1p-24f);
  CHECK(static_cast<double>(half(0.1f)) == 0.0999755859375);
}
