// Errors: exceptions that name the function, the rule and the values, with the caller's file and line.
// SPDX-License-Identifier: MIT
#pragma once

#include <concepts>
#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include <moe/core/config.hpp>

// The exceptions are not in the ABI-tagged namespace: one must be catchable from any translation
// unit. Everything that computes is in it.
namespace moe {

/// Where a public function was called: the file and line that an error message ends with.
struct call_site {
  char const* file = "unknown";
  int line = 0;

  /// As a default argument this names the caller (std::source_location is missing in clang 14).
  static constexpr call_site here(char const* file = __builtin_FILE(),
                                  int line = __builtin_LINE()) noexcept {
    return {file, line};
  }
};

/// Base of every exception that the library throws.
class error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller broke a precondition of a public function.
class precondition_error : public error {
 public:
  // Inlined into tagged functions: a copy of its own would be shared by all instruction sets.
  [[gnu::always_inline]] precondition_error(std::string const& message, call_site site)
      : error(message + " (called at " + site.file + ":" + std::to_string(site.line) + ")"),
        site_(site) {}

  /// Where the function that refused was called.
  call_site site() const noexcept { return site_; }

 private:
  call_site site_;
};

/// Bytes that were saved, or come from elsewhere, do not hold what they should.
class format_error : public error {
 public:
  using error::error;
};

}  // namespace moe

namespace moe::inline MOE_ABI {

/// A number by name, for the end of an error message. Costs nothing until it is printed.
class named_value {
 public:
  constexpr named_value(char const* name, std::integral auto value) noexcept
      : name_(name),
        integer_(static_cast<unsigned long long>(value)),
        is_negative_(std::signed_integral<decltype(value)> && static_cast<long long>(value) < 0) {}
  constexpr named_value(char const* name, std::floating_point auto value) noexcept
      : name_(name), real_(static_cast<double>(value)), is_real_(true) {}

  std::string text() const {
    std::string number;
    if (is_real_) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%.9g", real_);
      number = digits;
    } else {
      number = is_negative_ ? std::to_string(static_cast<long long>(integer_))
                            : std::to_string(integer_);
    }
    return std::string(name_) + " = " + number;
  }

 private:
  char const* name_;
  unsigned long long integer_ = 0;
  double real_ = 0;
  bool is_negative_ = false;
  bool is_real_ = false;
};

namespace detail {

[[noreturn]] inline void refuse(char const* rule, call_site site,
                                std::initializer_list<named_value> values) {
  std::string message = rule;
  char const* separator = "; got ";
  for (named_value const& value : values) {
    message += separator + value.text();
    separator = ", ";
  }
  throw precondition_error(message, site);
}

}  // namespace detail

/// Throws precondition_error unless `condition` holds. Checked in every build; O(1) conditions only.
///
/// @param rule  Function and rule: "route: K <= E".
/// @param site  The caller's, as the public function took it by `call_site::here()`.
/// Example: expects(K <= E, "route: K <= E", site, {{"K", K}, {"E", E}});
constexpr void expects(bool condition, char const* rule, call_site site,
                       std::initializer_list<named_value> values = {}) {
  if (!condition) [[unlikely]]
    detail::refuse(rule, site, values);
}

}  // namespace moe::inline MOE_ABI
