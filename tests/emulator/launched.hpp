// Which kernels a test program ran on the emulator, and how, for the test that no kernel is left out.
// SPDX-License-Identifier: MIT
#pragma once

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
    std::string const name = __PRETTY_FUNCTION__;
    all().lines_.insert(name.substr(0, name.find('<', name.find("Kernel = "))) + " " + how);
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
