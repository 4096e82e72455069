// Text as bytes: read files, split them into a training and a validation part, draw windows.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace pr_moe_text {

/// A file that cannot serve: missing, unreadable, empty or too short.
struct text_error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string read_file(std::filesystem::path const& path) {
  std::error_code code;
  if (!std::filesystem::exists(path, code)) throw text_error("no such file: " + path.string());
  if (!std::filesystem::is_regular_file(path, code))
    throw text_error("not a file: " + path.string());
  std::ifstream in(path, std::ios::binary);
  if (!in) throw text_error("cannot be read: " + path.string());
  std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (in.bad()) throw text_error("cannot be read: " + path.string());
  if (bytes.empty()) throw text_error("is empty: " + path.string());
  return bytes;
}

/// All regular files of a folder, not of folders below it, in the order of their names.
inline std::vector<std::filesystem::path> files_of(std::filesystem::path const& folder) {
  std::vector<std::filesystem::path> paths;
  for (auto const& entry : std::filesystem::directory_iterator(folder))
    if (entry.is_regular_file()) paths.push_back(entry.path());
  std::sort(paths.begin(), paths.end());
  return paths;
}

/// The bytes of a text. Every tenth block of 4 KiB is for validation, so that both parts hold a bit of
/// everything.
struct corpus {
  std::vector<std::uint8_t> train;
  std::vector<std::uint8_t> validation;

  /// @throws text_error if either part is shorter than one window.
  corpus(std::vector<std::filesystem::path> const& paths, std::size_t window) {
    constexpr std::size_t block = 4096;
    std::size_t total = 0;
    for (auto const& path : paths) {
      std::string const bytes = read_file(path);
      for (char c : bytes) {
        auto& part = total / block % 10 == 9 ? validation : train;
        part.push_back(static_cast<std::uint8_t>(c));
        ++total;
      }
    }
    if (train.size() < 2 * window || validation.size() < 2 * window)
      throw text_error("too short: the text has " + std::to_string(total) + " bytes, " +
                       std::to_string(std::max(std::size_t{10 * block}, 20 * window)) +
                       " are needed");
  }
};

/// `count` windows of `length` inputs and their successors, at random places.
struct windows {
  std::vector<std::uint8_t> input;   // [count, length]
  std::vector<std::uint8_t> target;  // [count, length]

  template <class Random>
  void draw(std::vector<std::uint8_t> const& text, int count, int length, Random& random) {
    input.clear();
    target.clear();
    std::uniform_int_distribution<std::size_t> place(
        0, text.size() - static_cast<std::size_t>(length) - 1);
    for (int b = 0; b < count; ++b) {
      auto const first = text.begin() + static_cast<std::ptrdiff_t>(place(random));
      input.insert(input.end(), first, first + length);
      target.insert(target.end(), first + 1, first + 1 + length);
    }
  }
};

}  // namespace pr_moe_text
