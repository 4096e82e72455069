// Which kernels a test program ran on the emulator, and how, for the test that no kernel is left out.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdlib>
#include <fstream>
#include <set>
#include <string>

namespace moe_test {

/// Writes a line for each to the file that MOE_TEST_KERNELS names, when the program ends.
class launched {
 public:
  /// @param how  The schedule, or "races".
  template <class Kernel>
  static void add(char const* how) {
    std::string const text = __PRETTY_FUNCTION__;  // "... Kernel = moe::...::name_kernel<...>..."
    std::size_t const begin = text.find("Kernel = ") + 9;
    std::string const type = text.substr(begin, text.find_first_of("<;]", begin) - begin);
    all().lines_.insert(type.substr(type.rfind(':') + 1) + " " + how);
  }

 private:
  static launched& all() {
    static launched one;
    return one;
  }
  ~launched() {
    if (char const* const file = std::getenv("MOE_TEST_KERNELS")) {
      std::ofstream out(file);
      for (std::string const& line : lines_) out << line << '\n';
    }
  }

  std::set<std::string> lines_;
};

}  // namespace moe_test
