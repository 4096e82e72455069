// What a precondition_error says, for the tests of bad input.
// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>
#include <string>

#include <moe/core/error.hpp>

namespace moe_test {

/// The text of the precondition_error that f throws.
template <class F>
std::string refusal(F const& f) {
  try {
    f();
  } catch (moe::precondition_error const& error) {
    return error.what();
  }
  return "nothing was thrown";
}

inline void says(std::string const& text, std::string const& part) {
  INFO(text);
  bool const found = text.find(part) != std::string::npos;
  CHECK(found);
}

/// f throws a precondition_error that says so.
template <class F>
void refuse(F const& f, std::string const& part) {
  says(refusal(f), part);
}

}  // namespace moe_test
