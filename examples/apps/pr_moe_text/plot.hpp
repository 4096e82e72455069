// Two small SVG pictures: curves over steps, and a heat map of expert load per layer.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace pr_moe_text {

struct curve {
  std::string name;
  std::vector<std::pair<double, double>> points;  // (step, loss)
};

struct load_rows {
  std::string name;                         // "pyramid, layer 2"
  std::vector<std::vector<double>> layers;  // share of each expert, per MoE layer
  std::vector<int> layer_ids;
};

inline char const* colour(std::size_t i) {
  static char const* const colours[] = {"#444444", "#1f77b4", "#2ca02c",
                                        "#ff7f0e", "#d62728", "#9467bd"};
  return colours[i % 6];
}

inline std::string number(double value, char const* format = "%.1f") {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

inline void write_text(std::string const& path, std::string const& text) {
  std::ofstream out(path);
  out << text;
  out.close();
  if (!out) throw std::runtime_error("cannot be written: " + path);
}

inline std::string svg_text(double x, double y, std::string const& text, char const* extra = "") {
  return "<text x='" + number(x) + "' y='" + number(y) + "' " + extra + ">" + text + "</text>\n";
}

inline void plot_curves(std::string const& path, std::string const& title,
                        std::vector<curve> const& curves) {
  double const width = 760, height = 440, left = 60, right = 150, top = 40, bottom = 50;
  double x1 = 1, y0 = std::numeric_limits<double>::max(), y1 = 0;
  for (curve const& c : curves)
    for (auto const& [x, y] : c.points) {
      x1 = std::max(x1, x);
      y0 = std::min(y0, y);
      // The first steps, where the loss falls from log 256, would flatten all the rest.
      if (x > 0.05 * x1) y1 = std::max(y1, y);
    }
  if (!(y1 > y0)) y1 = y0 + 1;
  y1 = std::min(y1, y0 + 1.6);
  auto const px = [&](double x) { return left + x / x1 * (width - left - right); };
  auto const py = [&](double y) { return top + (y1 - y) / (y1 - y0) * (height - top - bottom); };
  std::string svg = "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 " + number(width) + " " +
                    number(height) + "' font-family='sans-serif' font-size='12'>\n" +
                    "<rect width='100%' height='100%' fill='white'/>\n" +
                    svg_text(left, 22, title, "font-size='15'");
  for (int i = 0; i <= 5; ++i) {
    double const y = y0 + (y1 - y0) * i / 5;
    svg += "<line x1='" + number(left) + "' x2='" + number(width - right) + "' y1='" +
           number(py(y)) + "' y2='" + number(py(y)) + "' stroke='#dddddd'/>\n" +
           svg_text(left - 8, py(y) + 4, number(y, "%.2f"), "text-anchor='end'");
    double const x = x1 * i / 5;
    svg += svg_text(px(x), height - bottom + 18, number(x, "%.0f"), "text-anchor='middle'");
  }
  svg += svg_text((left + width - right) / 2, height - 12, "training step", "text-anchor='middle'");
  for (std::size_t i = 0; i < curves.size(); ++i) {
    svg +=
        "<polyline fill='none' stroke-width='1.6' stroke='" + std::string(colour(i)) + "' points='";
    for (auto const& [x, y] : curves[i].points)
      if (y <= y1) svg += number(px(x)) + "," + number(py(y)) + " ";
    svg += "'/>\n";
    double const y = top + 14 + 20 * static_cast<double>(i);
    svg += "<rect x='" + number(width - right + 12) + "' y='" + number(y - 8) +
           "' width='14' height='4' fill='" + colour(i) + "'/>\n" +
           svg_text(width - right + 32, y, curves[i].name);
  }
  write_text(path, svg + "</svg>\n");
}

inline void plot_load(std::string const& path, std::vector<load_rows> const& models) {
  double const left = 150, top = 44, cell_height = 18, width = 760, right = 20;
  std::string body;
  double y = top;
  for (load_rows const& model : models) {
    body += svg_text(12, y + 13, model.name, "font-weight='bold'");
    for (std::size_t l = 0; l < model.layers.size(); ++l) {
      auto const& share = model.layers[l];
      double const cell = (width - left - right) / static_cast<double>(share.size());
      body += svg_text(left - 8, y + 13, "layer " + std::to_string(model.layer_ids[l]),
                       "text-anchor='end'");
      for (std::size_t e = 0; e < share.size(); ++e) {
        // 1 is the fair share; twice that or more is the darkest.
        double const relative = std::min(2.0, share[e] * static_cast<double>(share.size()));
        int const light = static_cast<int>(245 - relative * 100);
        body += "<rect x='" + number(left + cell * static_cast<double>(e)) + "' y='" + number(y) +
                "' width='" + number(cell - 0.5, "%.2f") + "' height='" + number(cell_height - 2) +
                "' fill='rgb(" + std::to_string(light) + "," + std::to_string(light) +
                ",245)'><title>expert " + std::to_string(e) + ": " + number(100 * share[e]) +
                " %</title></rect>\n";
      }
      y += cell_height;
    }
    y += 10;
  }
  std::string const head =
      "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 " + number(width) + " " +
      number(y + 10) + "' font-family='sans-serif' font-size='12'>\n" +
      "<rect width='100%' height='100%' fill='white'/>\n" +
      svg_text(12, 24, "Share of tokens per expert (pale: none, dark: twice the fair share)",
               "font-size='15'");
  write_text(path, head + body + "</svg>\n");
}

}  // namespace pr_moe_text
