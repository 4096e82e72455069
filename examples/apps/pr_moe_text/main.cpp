// Train five small language models on real text and compare them: dense, MoE, pyramid, residual, PR-MoE.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include <moe/moe.hpp>

#include "model.hpp"
#include "plot.hpp"
#include "text.hpp"

namespace {

using namespace pr_moe_text;
using seconds = std::chrono::duration<double>;

struct options {
  std::vector<std::filesystem::path> text;
  std::string out = "pr_moe_text_out";
  int steps = 300;
  int threads = static_cast<int>(std::max(1u, std::min(2u, std::thread::hardware_concurrency())));
  std::uint64_t seed = 1;
};

char const* const help =
    "pr_moe_text: trains dense, MoE, pyramid, residual and PR-MoE language models on the bytes of a text\n"
    "and compares them at equal steps and equal active feed-forward parameters.\n\n"
    "  --text FILE...   the text (default: the C++ standard headers of the compiler)\n"
    "  --steps N        training steps of each model (default 300)\n"
    "  --seed N         of the first values, the batches and every random choice (default 1)\n"
    "  --threads N      (default: 2, or 1 on a machine with one)\n"
    "  --out FOLDER     where loss.svg and load.svg go (default pr_moe_text_out)\n"
    "  --help\n";

/// A number in [least, most] from a command line.
long parse(char const* name, char const* text, long least, long most) {
  char* end = nullptr;
  long const value = std::strtol(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most)
    throw text_error(std::string(name) + " takes a whole number from " + std::to_string(least) + " to " +
                     std::to_string(most) + ", not \"" + text + "\"");
  return value;
}

options read_options(int argc, char** argv) {
  options o;
  for (int i = 1; i < argc; ++i) {
    std::string const name = argv[i];
    auto const value = [&]() -> char const* {
      if (i + 1 >= argc) throw text_error(name + " takes a value");
      return argv[++i];
    };
    if (name == "--help") {
      std::fputs(help, stdout);
      std::exit(0);
    } else if (name == "--text") {
      while (i + 1 < argc && std::strncmp(argv[i + 1], "--", 2) != 0) o.text.emplace_back(argv[++i]);
      if (o.text.empty()) throw text_error("--text takes at least one file");
    } else if (name == "--steps") {
      o.steps = static_cast<int>(parse("--steps", value(), 1, 1000000));
    } else if (name == "--threads") {
      o.threads = static_cast<int>(parse("--threads", value(), 1, 1024));
    } else if (name == "--seed") {
      o.seed = static_cast<std::uint64_t>(parse("--seed", value(), 0, 2147483647));
    } else if (name == "--out") {
      o.out = value();
    } else {
      throw text_error("unknown option " + name + " (--help lists them)");
    }
  }
  if (o.text.empty()) o.text = files_of(PR_MOE_TEXT_DEFAULT);
  return o;
}

/// One of the models that are compared, and what came out.
struct contestant {
  char const* name;
  moe::expert_schedule schedule;
  double validation = 0, tokens_per_second = 0, dropped = 0;
  std::int64_t total = 0, active = 0, active_ffn = 0;
  curve losses{};
  load_rows load{};
};

constexpr int windows = 16, layers = 4;
constexpr std::int64_t S = 64, M = 64, H = 128;

double rate_at(int step, int steps) {
  double const peak = 4e-3, warm_up = std::min(1.0, (step + 1) / (0.05 * steps + 1));
  double const progress = static_cast<double>(step) / steps;
  return peak * warm_up * (0.1 + 0.9 * 0.5 * (1 + std::cos(3.14159265358979 * progress)));
}

/// Validation loss over fixed windows, the same for every model.
double validate(model<float>& m, corpus const& text, std::uint64_t seed, std::vector<ffn_report>* load) {
  std::mt19937_64 random(seed ^ 0x5eed);
  windows_of_text: (void)0;
  pr_moe_text::windows batch;
  double sum = 0;
  constexpr int batches = 16;
  for (int b = 0; b < batches; ++b) {
    batch.draw(text.validation, windows, static_cast<int>(S), random);
    auto const report = m.forward(batch.input, batch.target, {.seed = seed, .training = false});
    sum += report.loss;
    if (load == nullptr) continue;
    load->resize(report.layers.size());
    for (std::size_t l = 0; l < report.layers.size(); ++l) {
      (*load)[l].load.resize(report.layers[l].load.size());
      for (std::size_t e = 0; e < report.layers[l].load.size(); ++e)
        (*load)[l].load[e] += report.layers[l].load[e];
    }
  }
  return sum / batches;
}

}  // namespace

int main(int argc, char** argv) try {
  options const o = read_options(argc, argv);
  corpus const text(o.text, static_cast<std::size_t>(S));
  (void)text;
  return 0;
} catch (std::exception const& e) {
  std::fprintf(stderr, "pr_moe_text: %s\n", e.what());
  return 1;
}
