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
  int steps = 1000;
  int threads = static_cast<int>(std::max(1u, std::min(2u, std::thread::hardware_concurrency())));
  std::uint64_t seed = 1;
};

char const* const help =
    "pr_moe_text: trains dense, MoE, pyramid, residual and PR-MoE language models on the bytes of "
    "a text\n"
    "and compares them at equal steps and equal active feed-forward parameters.\n\n"
    "  --text FILE...   the text (default: the C++ standard headers of the compiler)\n"
    "  --steps N        training steps of each model (default 1000)\n"
    "  --seed N         of the first values, the batches and every random choice (default 1)\n"
    "  --threads N      (default: 2, or 1 on a machine with one)\n"
    "  --out FOLDER     where loss.svg and load.svg go (default pr_moe_text_out)\n"
    "  --help\n";

/// A number in [least, most] from a command line.
long parse(char const* name, char const* text, long least, long most) {
  char* end = nullptr;
  long const value = std::strtol(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most)
    throw text_error(std::string(name) + " takes a whole number from " + std::to_string(least) +
                     " to " + std::to_string(most) + ", not \"" + text + "\"");
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
      while (i + 1 < argc && std::strncmp(argv[i + 1], "--", 2) != 0)
        o.text.emplace_back(argv[++i]);
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

constexpr int windows_per_step = 16, layers = 4;
constexpr std::int64_t S = 64, M = 64, H = 64, T = windows_per_step * S;
constexpr int most_validation_batches = 16;

/// One of the models that are compared, and what came out.
struct contestant {
  contestant(char const* called, moe::expert_schedule const& experts)
      : name(called), schedule(experts) {
    losses.name = load.name = called;
  }

  char const* name;
  moe::expert_schedule schedule;
  double validation = 0, tokens_per_second = 0, dropped_share = 0;
  std::int64_t total = 0, active = 0, active_ffn = 0;
  curve losses;
  load_rows load;
};

std::vector<contestant> contestants() {
  using schedule = moe::expert_schedule;
  schedule const every = schedule::every_nth(layers, 1, 8);
  schedule const pyramid =
      schedule::pyramid({.layers = layers, .every = 1, .base = 4, .top = 8, .last = 2});
  return {{"dense", schedule::dense(layers)},
          {"MoE top-1", every},
          {"pyramid", pyramid},
          {"residual", every.with_residual()},
          {"PR-MoE", pyramid.with_residual()}};
}

/// Active parameters of the feed-forward parts, routers and mixes not counted.
std::int64_t active_ffn_parameters(moe::expert_schedule const& s) {
  std::int64_t sum = 0;
  for (int l = 0; l < s.layers(); ++l) {
    std::int64_t const hidden = s.has_residual(l) ? H / 2 : H, parts = s.has_residual(l) ? 2 : 1;
    sum += parts * (2 * M * hidden + hidden + M);
  }
  return sum;
}

double rate_at(int step, int steps) {
  double const warm_up = std::min(1.0, (step + 1) / (0.05 * steps + 1));
  double const progress = static_cast<double>(step) / steps;
  return 6e-3 * warm_up * (0.05 + 0.95 * 0.5 * (1 + std::cos(3.14159265358979 * progress)));
}

/// Loss over the same validation windows for every model; adds up the load of each expert.
double validate(model<float>& m, corpus const& text, options const& o, load_rows& load) {
  int const batches = std::min(most_validation_batches, o.steps);
  std::mt19937_64 random(o.seed + 1);
  windows batch;
  double sum = 0;
  load.layers.clear();
  load.layer_ids.clear();
  for (int b = 0; b < batches; ++b) {
    batch.draw(text.validation, windows_per_step, static_cast<int>(S), random);
    model_report const report = m.forward(batch.input, batch.target, {.seed = o.seed});
    sum += report.loss;
    std::size_t row = 0;
    for (std::size_t l = 0; l < report.layers.size(); ++l) {
      auto const& rows = report.layers[l].load;
      if (rows.empty()) continue;
      if (b == 0) {
        load.layers.emplace_back(rows.size(), 0.0);
        load.layer_ids.push_back(static_cast<int>(l));
      }
      double total = 0;
      for (std::int64_t r : rows) total += static_cast<double>(r);
      for (std::size_t e = 0; e < rows.size(); ++e)
        load.layers[row][e] += static_cast<double>(rows[e]) / std::max(1.0, total) / batches;
      ++row;
    }
  }
  return sum / batches;
}

/// Trains one model; prints a line of progress now and then. Returns it, for sampling.
model<float> train(moe::cpu const& exec, contestant& c, corpus const& text, options const& o,
                   int which, int of, seconds& spent) {
  using clock = std::chrono::steady_clock;
  model<float> m(
      exec,
      {.windows = windows_per_step, .S = S, .M = M, .H = H, .heads = 2, .schedule = c.schedule},
      o.seed);
  c.total = m.parameters();
  std::mt19937_64 random(o.seed);  // the same batches for every model
  windows batch;
  std::int64_t pairs = 0, dropped = 0;
  double recent = 0;
  seconds trained{0};
  auto printed = clock::now();
  for (int step = 0; step < o.steps; ++step) {
    auto const begin = clock::now();
    batch.draw(text.train, windows_per_step, static_cast<int>(S), random);
    moe::batch const ids{.first_id = static_cast<std::int64_t>(step) * T,
                         .seed = o.seed,
                         .step = static_cast<std::uint32_t>(step),
                         .training = true};
    model_report const report = m.forward(batch.input, batch.target, ids);
    m.backward(batch.input, batch.target);
    m.step(rate_at(step, o.steps), step + 1);
    for (ffn_report const& layer : report.layers) {
      pairs += layer.pairs;
      dropped += layer.dropped;
    }
    recent = step == 0 ? report.loss : 0.95 * recent + 0.05 * report.loss;
    if (step % 5 == 0 || step + 1 == o.steps) c.losses.points.emplace_back(step + 1, recent);
    auto const now = clock::now();
    trained += now - begin;
    bool const last = step + 1 == o.steps;
    if (seconds(now - printed).count() > 2 || last) {
      printed = now;
      double const rate = (step + 1) * static_cast<double>(T) / trained.count();
      double const done = which + (step + 1.0) / o.steps;
      double const left = (spent + trained).count() / done * (of - done);
      std::printf("%-10s step %5d/%d  loss %.3f  %7.0f tokens/s  about %3.0f s left\n", c.name,
                  step + 1, o.steps, recent, rate, left);
      std::fflush(stdout);
    }
  }
  spent += trained;
  c.tokens_per_second = o.steps * static_cast<double>(T) / trained.count();
  c.dropped_share = pairs == 0 ? 0 : static_cast<double>(dropped) / static_cast<double>(pairs);
  c.validation = validate(m, text, o, c.load);
  return m;
}

/// Without control characters, which terminals obey.
std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 32 && c != '\n' && c != '\t') c = '?';
  return text;
}

/// Continues a text byte by byte; the window is the last S - 1 bytes.
std::string sample(model<float>& m, std::string text, int count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> input(static_cast<std::size_t>(S)), target(input.size());
  for (int i = 0; i < count; ++i) {
    std::size_t const length = std::min(text.size(), static_cast<std::size_t>(S));
    for (std::size_t t = 0; t < length; ++t)
      input[t] = static_cast<std::uint8_t>(text[text.size() - length + t]);
    m.forward(input, target, {.seed = seed});
    float const* const p = m.logits().row(static_cast<std::int64_t>(length) - 1);  // probabilities
    double left = std::uniform_real_distribution<>(0, 1)(random), total = 0;
    // A little sharper than what the model believes, so that the text reads better.
    double sharp[256];
    for (int s = 0; s < 256; ++s) total += sharp[s] = std::pow(static_cast<double>(p[s]), 1.25);
    int next = 0;
    for (left *= total; next < 255 && left > sharp[next]; ++next) left -= sharp[next];
    text.push_back(static_cast<char>(next));
  }
  return text;
}

void print_table(std::vector<contestant> const& all) {
  std::printf("\n%-10s %16s %10s %11s %11s %10s %9s\n", "model", "validation loss", "perplexity",
              "parameters", "active FFN", "tokens/s", "dropped");
  for (contestant const& c : all)
    std::printf("%-10s %16.4f %10.3f %11lld %11lld %10.0f %8.2f%%\n", c.name, c.validation,
                std::exp(c.validation), static_cast<long long>(c.total),
                static_cast<long long>(c.active_ffn), c.tokens_per_second, 100 * c.dropped_share);
}

}  // namespace

int main(int argc, char** argv) try {
  options const o = read_options(argc, argv);
  corpus const text(o.text, static_cast<std::size_t>(S));
  // Written once before the training, so that a folder that cannot be written to is known at once.
  std::error_code code;
  std::filesystem::create_directories(o.out, code);
  if (code) throw text_error("cannot make the folder " + o.out + ": " + code.message());
  for (char const* name : {"/loss.svg", "/load.svg"}) write_text(o.out + name, "");
  moe::thread_team team(o.threads);
  moe::cpu const exec(team);
  std::printf("text: %zu bytes to train on, %zu to validate; %d steps of %lld tokens, %d threads\n",
              text.train.size(), text.validation.size(), o.steps, static_cast<long long>(T),
              o.threads);

  auto all = contestants();
  seconds spent{0};
  std::string sampled;
  for (std::size_t i = 0; i < all.size(); ++i) {
    all[i].active_ffn = active_ffn_parameters(all[i].schedule);
    model<float> m =
        train(exec, all[i], text, o, static_cast<int>(i), static_cast<int>(all.size()), spent);
    if (i + 1 == all.size()) sampled = sample(m, "template <class ", 300, o.seed);
  }

  print_table(all);
  std::vector<curve> curves;
  std::vector<load_rows> loads;
  for (contestant const& c : all) {
    curves.push_back(c.losses);
    if (!c.load.layers.empty()) loads.push_back(c.load);
  }
  plot_curves(o.out + "/loss.svg", "Training loss, nats per byte (running mean)", curves);
  plot_load(o.out + "/load.svg", loads);
  std::printf(
      "\nPR-MoE continues \"template <class \":\n%s\n\n%s/loss.svg and %s/load.svg show the curves "
      "and the load of the experts; %.0f s\n",
      printable(sampled).c_str(), o.out.c_str(), o.out.c_str(), spent.count());
  return 0;
} catch (std::exception const& e) {
  std::fprintf(stderr, "pr_moe_text: %s\n", e.what());
  return 1;
}
