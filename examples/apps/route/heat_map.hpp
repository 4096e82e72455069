// A picture of a routing: which tokens went to which expert, what was dropped, and what experts hold.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>

#include "logits_file.hpp"

namespace route_app {

/// What happened between some tokens that lie side by side and one expert.
struct cell {
  int kept = 0, dropped = 0;
  double weight = 0;  ///< Of the kept pairs.
};

inline std::string number(double value, char const* format = "%.1f") {
  char text[48];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

/// As the text of an SVG element.
inline std::string escaped(std::string const& text) {
  std::string out;
  for (char const c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (static_cast<unsigned char>(c) >= ' ')
      out += c;
  }
  return out;
}

/// Rows are tokens, or as many side by side as leave 64 rows; columns are experts. The darker a cell, the
/// more of its tokens went there; the red part is the share that was dropped. Below, the load of each expert.
inline std::string heat_map(std::string const& title, moe::routing const& routed,
                            moe::routing_table const& table, std::vector<float> const& weights) {
  std::int64_t const T = routed.T, group = (T + 63) / 64, rows = (T + group - 1) / group;
  int const E = routed.E;
  std::vector<cell> cells(static_cast<std::size_t>(rows * E));
  std::vector<int> kept(static_cast<std::size_t>(E));
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t i = routed.first_pair(t); i < routed.first_pair(t + 1); ++i) {
      std::int32_t const e = routed.expert[i];
      if (e < 0 || e >= E) continue;
      cell& c = cells[static_cast<std::size_t>(t / group * E + e)];
      bool const has_row = table.row_of[i] >= 0;
      (has_row ? c.kept : c.dropped) += 1;
      if (has_row) c.weight += static_cast<double>(weights[static_cast<std::size_t>(i)]);
      kept[static_cast<std::size_t>(e)] += has_row;
    }

  double const left = 90, top = 68,
               height = std::clamp(720.0 / static_cast<double>(rows), 8.0, 24.0);
  double const width = std::clamp(960.0 / E, 3.0, 48.0), bars = 120;
  double const bottom = top + height * static_cast<double>(rows);
  auto const x = [&](int e) { return number(left + width * e, "%.2f"); };
  auto const rect = [](std::string const& at_x, double y, double w, double h,
                       std::string const& fill, std::string const& tip) {
    return "<rect x='" + at_x + "' y='" + number(y, "%.2f") + "' width='" + number(w, "%.2f") +
           "' height='" + number(h, "%.2f") + "' fill='" + fill + "'><title>" + tip +
           "</title></rect>\n";
  };
  auto const text = [](double at_x, double y, std::string const& words, char const* extra) {
    return "<text x='" + number(at_x) + "' y='" + number(y) + "' " + extra + ">" + escaped(words) +
           "</text>\n";
  };
  std::string svg;
  for (std::int64_t r = 0; r < rows; ++r) {
    std::int64_t const first = r * group, last = std::min(T, first + group) - 1;
    double const y = top + height * static_cast<double>(r),
                 tokens = static_cast<double>(last - first + 1);
    std::string const name = first == last
                                 ? "token " + std::to_string(first)
                                 : "tokens " + std::to_string(first) + "-" + std::to_string(last);
    if (r % ((rows + 31) / 32) == 0)
      svg += text(left - 6, y + height * 0.5 + 4, std::to_string(first), "text-anchor='end'");
    for (int e = 0; e < E; ++e) {
      cell const& c = cells[static_cast<std::size_t>(r * E + e)];
      double const share = (c.kept + c.dropped) / tokens;
      int const light = static_cast<int>(244 - 170 * std::min(1.0, share));
      std::string const fill =
          "rgb(" + std::to_string(light) + "," + std::to_string(light + 4) + ",246)";
      std::string tip = name + ", expert " + std::to_string(e) + ": " + std::to_string(c.kept) +
                        " kept, " + std::to_string(c.dropped) + " dropped";
      if (c.kept > 0) tip += ", mean weight " + number(c.weight / c.kept, "%.3f");
      svg += rect(x(e), y, width - 0.5, height - 0.5, fill, tip);
      if (c.dropped > 0)
        svg += rect(x(e), y, (width - 0.5) * c.dropped / (c.kept + c.dropped), (height - 0.5) / 3,
                    "#d62728", tip);
    }
  }

  double most = 1;
  for (int e = 0; e < E; ++e) most = std::max<double>(most, table.wanted[e]);
  double const base = bottom + 24 + bars, scale = bars / most;
  for (int e = 0; e < E; ++e) {
    int const has = kept[static_cast<std::size_t>(e)], lost = table.wanted[e] - has;
    std::string const tip = "expert " + std::to_string(e) + ": " + std::to_string(table.wanted[e]) +
                            " wanted, " + std::to_string(has) + " kept";
    svg += rect(x(e), base - has * scale, width - 0.5, has * scale, "#4a6fb5", tip);
    if (lost > 0)
      svg += rect(x(e), base - table.wanted[e] * scale, width - 0.5, lost * scale, "#d62728", tip);
    if (e % ((E + 31) / 32) == 0)
      svg += text(left + width * (e + 0.5), base + 16, std::to_string(e), "text-anchor='middle'");
  }
  double total = 0;
  for (int e = 0; e < E; ++e) total += table.wanted[e];
  double const even = base - total / E * scale, right = left + width * E;
  svg += "<line x1='" + number(left) + "' x2='" + number(right) + "' y1='" + number(even) +
         "' y2='" + number(even) + "' stroke='#444444' stroke-dasharray='4 3'/>\n";
  svg += text(left - 6, even + 4, "even " + number(total / E), "text-anchor='end'");
  svg += text(left - 6, top - 8, "token", "text-anchor='end'");
  svg += text(left, base + 34, "expert", "");

  return "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 " +
         number(std::max(right + 30, 640.0)) + " " + number(base + 50) +
         "' font-family='sans-serif' font-size='11'>\n" +
         "<rect width='100%' height='100%' fill='white'/>\n" +
         text(12, 22, title, "font-size='14'") +
         text(
             12, 40,
             "dark: all of the tokens chose the expert; red: dropped; below: pairs of each expert, "
             "dashed: an even load",
             "fill='#555555'") +
         svg + "</svg>\n";
}

inline void write_file(std::string const& path, std::string const& text) {
  std::ofstream out(path, std::ios::binary);
  out << text;
  out.close();
  if (!out) throw input_error("cannot write " + path);
}

}  // namespace route_app
