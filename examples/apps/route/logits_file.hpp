// Reads the logits of a router from a file: CSV, or a NumPy array.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace route_app {

/// What the user can put right: told without more ado.
class input_error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct logits_table {
  std::int64_t T = 0;
  int E = 0;
  std::vector<float> values;  // [T,E]
};

inline std::string read_bytes(std::string const& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::string bytes;
  char part[1 << 14];
  while (file) {
    file.read(part, sizeof part);
    bytes.append(part, static_cast<std::size_t>(file.gcount()));
  }
  if (!file.eof())
    throw input_error("cannot read " + path + ": " +
                      (errno != 0 ? std::strerror(errno) : "not a readable file"));
  return bytes;
}

/// One token for each line, numbers apart by commas, semicolons or blanks; "inf", "-inf" and "nan" are
/// numbers. Empty lines and lines that begin with # are no tokens.
inline logits_table parse_csv(std::string const& path, std::string const& text) {
  logits_table table;
  std::size_t begin = 0;
  std::int64_t line = 1;
  auto const refuse = [&](std::string const& why) {
    return input_error(path + ", line " + std::to_string(line) + ": " + why);
  };
  for (; begin < text.size(); ++line) {
    std::size_t const end = std::min(text.find('\n', begin), text.size());
    std::string const row = text.substr(begin, end - begin);
    begin = end + 1;
    constexpr char const* between = ",; \t\r";
    std::size_t at = row.find_first_not_of(between);
    if (at == std::string::npos || row[at] == '#') continue;
    std::int64_t count = 0;
    while (at != std::string::npos) {
      std::size_t const stop = std::min(row.find_first_of(between, at), row.size());
      std::string const field = row.substr(at, stop - at);
      char* rest = nullptr;
      float const value = std::strtof(field.c_str(), &rest);
      if (rest != field.c_str() + field.size())
        throw refuse(std::string("\"").append(field, 0, 40).append("\" is not a number"));
      table.values.push_back(value);
      ++count;
      at = row.find_first_not_of(between, stop);
    }
    if (table.T == 0) table.E = static_cast<int>(count);
    if (count != table.E)
      throw refuse(std::to_string(count).append(" numbers, where the lines before have ") +
                   std::to_string(table.E));
    ++table.T;
  }
  return table;
}

/// What stands behind a key in the header of an array file, up to the next comma that is in no brackets.
inline std::string npy_value(std::string const& path, std::string_view header,
                             std::string const& key) {
  std::size_t at = header.find("'" + key + "'");
  if (at != std::string_view::npos) at = header.find(':', at);
  if (at == std::string_view::npos)
    throw input_error(path + ": the header of the array has no " + key);
  at = header.find_first_not_of(' ', at + 1);
  std::size_t end = at;
  for (int depth = 0; end < header.size(); ++end) {
    char const c = header[end];
    depth += (c == '(') - (c == ')');
    if (depth == 0 && (c == ',' || c == '}')) break;
  }
  return at >= header.size() ? "" : std::string(header.substr(at, end - at));
}

/// A NumPy array of format version 1, 2 or 3: float32 or float64, little-endian, [T,E], in C or Fortran
/// order.
inline logits_table parse_npy(std::string const& path, std::string const& bytes) {
  auto const refuse = [&](std::string const& why) { return input_error(path + ": " + why); };
  auto const byte = [&](std::size_t i) {
    return static_cast<std::size_t>(static_cast<unsigned char>(bytes[i]));
  };
  if (bytes.size() < 12) throw refuse("the array file ends in its header");
  std::size_t const version = byte(6), length_bytes = version == 1 ? 2 : 4;
  if (version < 1 || version > 3)
    throw refuse("array format version " + std::to_string(version) + " is not known");
  std::size_t length = 0;
  for (std::size_t i = 0; i < length_bytes; ++i) length |= byte(8 + i) << (8 * i);
  std::size_t const start = 8 + length_bytes + length;
  if (start > bytes.size()) throw refuse("the array file ends in its header");
  std::string_view const header(bytes.data() + 8 + length_bytes, length);

  std::string const type = npy_value(path, header, "descr");
  if (type != "'<f4'" && type != "'<f8'")
    throw refuse("elements are " + type + ", not '<f4' or '<f8' (float32 or float64)");
  std::string const order = npy_value(path, header, "fortran_order");
  std::string const shape = npy_value(path, header, "shape");
  long long T = 0, E = 0;
  char close = 0;
  if (std::sscanf(shape.c_str(), "(%lld, %lld%c", &T, &E, &close) != 3 || close != ')' || T < 0 ||
      E < 0 || E > 1'000'000 || T > 0x7fffffff)
    throw refuse("the shape is " + shape + ", not (tokens, experts)");

  std::size_t const size = type == "'<f4'" ? 4 : 8;
  auto const count = static_cast<std::size_t>(T) * static_cast<std::size_t>(E);
  if ((bytes.size() - start) / size < count)
    throw refuse("the array file has " + std::to_string((bytes.size() - start) / size) +
                 " elements, its shape " + shape + " wants " + std::to_string(count));
  logits_table table{T, static_cast<int>(E), std::vector<float>(count)};
  auto const rows = static_cast<std::size_t>(T), cols = static_cast<std::size_t>(E);
  for (std::size_t i = 0; i < count; ++i) {
    std::size_t const from = order == "True" ? i % cols * rows + i / cols : i;
    char const* const element = bytes.data() + start + from * size;
    if (size == 4) {
      std::memcpy(&table.values[i], element, 4);
    } else {
      double wide;
      std::memcpy(&wide, element, 8);
      table.values[i] = static_cast<float>(wide);
    }
  }
  return table;
}

/// By what the file begins with, not by its name.
inline logits_table read_logits(std::string const& path) {
  std::string const bytes = read_bytes(path);
  logits_table table =
      bytes.rfind("\x93NUMPY", 0) == 0 ? parse_npy(path, bytes) : parse_csv(path, bytes);
  if (table.T == 0 || table.E == 0) throw input_error(path + " holds no logits");
  return table;
}

}  // namespace route_app
