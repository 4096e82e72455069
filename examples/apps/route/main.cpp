// Routes the logits of a file by a preset, and shows what became of every token and every expert.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include <moe/gate/expert_choice.hpp>
#include <moe/layer/visit_model_preset.hpp>
#include <moe/layer/visit_preset.hpp>
#include <moe/routing/statistics.hpp>

#include "heat_map.hpp"
#include "logits_file.hpp"

namespace {

using namespace route_app;

char const* const help =
    "usage: route FILE [options]\n\n"
    "Routes logits, one row for each token and one column for each expert, and prints the choices "
    "of\n"
    "each token, the load of each expert, what was dropped, and how sure the router was. FILE is "
    "CSV\n"
    "(or apart by blanks or semicolons), or a NumPy array (.npy) of float32 or float64.\n\n"
    "  --preset NAME             of a system: deepspeed_top1, deepspeed_top2, deepspeed_topk,\n"
    "                            tutel_topk, switch_transformer, gshard; expert_choice; or of a\n"
    "                            model: mixtral (default), qwen2_moe, qwen3_moe, olmoe,\n"
    "                            deepseek_v2, deepseek_v3, kimi_k2, glm4_moe, deepseek_v4, "
    "llama4,\n"
    "                            gpt_oss, longcat, moe_plus_plus, whose experts all count as\n"
    "                            computed ones here\n"
    "  --k N                     choices of a token, where the preset leaves them open\n"
    "  --groups N, --kept-groups N   of experts, where a model has them\n"
    "  --bias FILE               a number for each expert, where a model has a bias\n"
    "  --capacity-factor X       in training, and where there is but one\n"
    "  --eval-capacity-factor X  otherwise\n"
    "  --min-capacity N\n"
    "  --no-drop                 dropless, whatever the factors are\n"
    "  --training                draw random numbers as in training\n"
    "  --seed N, --step N        of the random numbers (default 0)\n"
    "  --rows N                  tokens to print (default 20)\n"
    "  --svg FILE                where a picture of the routing goes\n"
    "  --help\n";

struct options {
  std::string file, svg, bias, preset = "mixtral";
  moe::preset_options router;
  moe::model_preset_options model;
  std::vector<float> bias_of_experts;
  moe::batch tokens;
  std::int64_t rows = 20;
};

bool is_model(std::string const& preset) {
  auto const& names = moe::model_preset_names;
  return std::find(names.begin(), names.end(), preset) != names.end();
}
bool has_model_options(options const& o) {
  return o.model.n_group || o.model.topk_group || !o.bias.empty();
}

std::int64_t whole(std::string const& name, char const* text, std::int64_t least,
                   std::int64_t most) {
  char* end = nullptr;
  long long const value = std::strtoll(text, &end, 10);
  if (*text == '\0' || *end != '\0' || value < least || value > most)
    throw input_error(name + " takes a whole number from " + std::to_string(least) + " to " +
                      std::to_string(most) + ", not \"" + text + "\"");
  return value;
}

double real(std::string const& name, char const* text) {
  char* end = nullptr;
  double const value = std::strtod(text, &end);
  if (*text == '\0' || *end != '\0' || !std::isfinite(value))
    throw input_error(name + " takes a number, not \"" + text + "\"");
  return value;
}

options read_options(int argc, char** argv) {
  options o;
  for (int i = 1; i < argc; ++i) {
    std::string const name = argv[i];
    auto const value = [&]() -> char const* {
      if (i + 1 == argc) throw input_error(name + " takes a value");
      return argv[++i];
    };
    if (name == "--preset")
      o.preset = value();
    else if (name == "--k")
      o.router.k = static_cast<int>(whole(name, value(), 1, 1 << 20));
    else if (name == "--groups")
      o.model.n_group = static_cast<int>(whole(name, value(), 1, 64));
    else if (name == "--kept-groups")
      o.model.topk_group = static_cast<int>(whole(name, value(), 1, 64));
    else if (name == "--bias")
      o.bias = value();
    else if (name == "--capacity-factor")
      o.router.capacity_factor = real(name, value());
    else if (name == "--eval-capacity-factor")
      o.router.eval_capacity_factor = real(name, value());
    else if (name == "--min-capacity")
      o.router.min_capacity = whole(name, value(), 0, 1 << 30);
    else if (name == "--no-drop")
      o.router.drop_tokens = false;
    else if (name == "--training")
      o.tokens.training = true;
    else if (name == "--seed")
      o.tokens.seed = static_cast<std::uint64_t>(whole(name, value(), 0, 0x7fffffffffffffff));
    else if (name == "--step")
      o.tokens.step = static_cast<std::uint32_t>(whole(name, value(), 0, 0xffffffff));
    else if (name == "--rows")
      o.rows = whole(name, value(), 0, 0x7fffffff);
    else if (name == "--svg")
      o.svg = value();
    else if (name.size() > 1 && name[0] == '-')
      throw input_error("unknown option " + name + " (--help lists them)");
    else if (o.file.empty())
      o.file = name;
    else
      throw input_error("one file at a time: " + o.file + " or " + name);
  }
  if (o.file.empty()) throw input_error("no file of logits (--help says how)");
  return o;
}

void print_tokens(std::int64_t rows, moe::routing const& routed, moe::routing_table const& table,
                  std::vector<float> const& weights) {
  if (rows == 0) return;
  std::printf("  token   expert (weight)\n");
  for (std::int64_t t = 0; t < std::min(rows, routed.T); ++t) {
    std::printf("%7lld  ", static_cast<long long>(t));
    for (std::int64_t i = routed.first_pair(t); i < routed.first_pair(t + 1); ++i) {
      std::int32_t const e = routed.expert[i];
      if (e == moe::invalid_token)
        std::printf("%s", i == routed.first_pair(t) ? " NaN or +inf among its logits" : "");
      else if (e < 0)
        std::printf(" none");
      else if (table.row_of[i] < 0)
        std::printf(" %d (dropped)", e);
      else
        std::printf(" %d (%.3f)", e, static_cast<double>(weights[static_cast<std::size_t>(i)]));
    }
    std::printf("\n");
  }
  if (routed.T > rows) std::printf("    ... %lld more\n", static_cast<long long>(routed.T - rows));
  std::printf("\n");
}

void print_experts(moe::routing_table const& table) {
  std::printf(" expert     wanted       kept    dropped   load\n");
  double total = 0;
  for (int e = 0; e < table.E; ++e) total += table.wanted[e];
  for (int e = 0; e < table.E; ++e) {
    double const load = total > 0 ? table.wanted[e] * table.E / total : 0;  // 1 = an even share
    std::string const bar(static_cast<std::size_t>(std::min(24.0, 8 * load + 0.5)), '#');
    std::printf("%7d %10d %10d %10d   %4.2f %s\n", e, table.wanted[e], table.used[e],
                table.wanted[e] - table.used[e], load, bar.c_str());
  }
}

/// @param scores   [T,E]
/// @param balance  The preset's loss, or NaN if it has none.
void report(options const& o, moe::routing const& routed, moe::routing_table const& table,
            std::vector<float> const& weights, std::vector<float> const& scores, double balance) {
  moe::cpu const exec;
  char title[400];
  std::snprintf(title, sizeof title, "%.200s: %lld tokens, %d experts, %s, %s", o.file.c_str(),
                static_cast<long long>(routed.T), routed.E, o.preset.c_str(),
                o.tokens.training ? "training" : "evaluation");
  std::printf("%s\n\n", title);
  print_tokens(o.rows, routed, table, weights);
  print_experts(table);

  moe::table_counts const& counts = *table.counts;
  auto const n = [](std::int64_t count) { return static_cast<long long>(count); };
  std::printf("\npairs %lld: kept %lld, dropped %lld (%.1f %%), without a candidate %lld\n",
              n(routed.pairs()), n(counts.kept), n(counts.dropped),
              100 * moe::drop_fraction(counts), n(counts.missing));
  std::int64_t without = 0;
  for (std::int64_t t = 0; t < routed.T; ++t) {
    bool has = false;
    for (std::int64_t i = routed.first_pair(t); i < routed.first_pair(t + 1); ++i)
      has = has || table.row_of[i] >= 0;
    without += !has;
  }
  std::printf("tokens that reach no expert: %lld (invalid logits: %lld); capacity %lld\n",
              n(without), n(counts.invalid_tokens), n(counts.capacity));
  auto const load = moe::measure_load(moe::vector_view<std::int32_t const>(table.wanted, table.E));
  std::printf(
      "load: greatest / mean %.3f, deviation / mean %.3f, entropy %.3f of %.3f, idle %lld\n",
      load.imbalance, load.variation, load.entropy, std::log(routed.E), n(load.idle));
  moe::buffer const scratch(moe::measure_scores_scratch(routed.T));
  auto const sure = moe::measure_scores(exec, routed, {scores, routed.T, routed.E}, scratch);
  std::printf("scores: mean entropy %.3f, mean margin of the last choice %.4f\n", sure.entropy,
              sure.margin);
  if (!std::isnan(balance)) std::printf("load-balancing loss %.4f\n", balance);
  if (!o.svg.empty()) {
    write_file(o.svg, heat_map(title, routed, table, weights));
    std::printf("wrote %s\n", o.svg.c_str());
  }
}

template <class Preset>
void route_by(options const& o, logits_table const& logits, Preset const& preset) {
  moe::cpu const exec;
  std::int64_t const T = logits.T;
  int const E = logits.E, K = preset.gate.k();
  moe::matrix_view const view(logits.values, T, E);
  moe::routing_buffer routed(T, K, E);
  moe::table_buffer table(moe::preset_table_shape(preset, T, E));
  moe::buffer const scratch(moe::preset_scratch(exec, preset, T, E));
  std::vector<float> weights(static_cast<std::size_t>(T * K)), scores(logits.values.size());
  double const balance =
      moe::apply_preset(exec, preset, view, o.tokens, {}, scratch, routed, table, weights);
  moe::route(exec, preset.gate, view, o.tokens, scratch, routed, {scores, T, E});
  report(o, routed, table, weights, scores, balance);
}

template <class F>
void route_by_model(options const& o, F const& by) {
  moe::preset_options const& given = o.router;
  if (given.capacity_factor || given.eval_capacity_factor || given.min_capacity)
    throw input_error(o.preset + " drops nothing and has no capacity");
  moe::visit_model_preset(o.preset, o.model, by);
}

void route_by_experts(options const& o, logits_table const& logits) {
  moe::preset_options const& given = o.router;
  if (given.k || given.eval_capacity_factor || given.min_capacity || !given.drop_tokens ||
      has_model_options(o))
    throw input_error(
        "expert_choice knows --capacity-factor alone: experts choose, and drop nothing");
  moe::expert_choice<> gate;
  gate.capacity_factor = given.capacity_factor.value_or(gate.capacity_factor);
  moe::cpu const exec;
  std::int64_t const T = logits.T;
  int const E = logits.E;
  moe::varying_routing_buffer<> routed(T, E, gate.pairs(T, E));
  std::vector<float> scores(logits.values.size());
  moe::buffer scratch(moe::route_scratch(exec, gate, T, E));
  moe::route(exec, gate, moe::matrix_view(logits.values, T, E), o.tokens, scratch, routed,
             {scores, T, E});
  moe::table_buffer table(gate.shape(T, E));
  scratch = moe::buffer(moe::build_table_scratch(exec, table.room));
  moe::build_table(exec, routed, {}, scratch, table);
  report(o, routed, table, {routed.weight, routed.weight + routed.pairs()}, scores, std::nan(""));
}

}  // namespace

int main(int argc, char** argv) try {
  for (int i = 1; i < argc; ++i)
    if (std::string(argv[i]) == "--help" || std::string(argv[i]) == "-h") {
      std::fputs(help, stdout);
      return 0;
    }
  options o = read_options(argc, argv);
  logits_table const logits = read_logits(o.file);
  o.router.experts = logits.E;
  o.model.num_experts = logits.E;
  o.model.num_experts_per_tok = o.router.k;
  if (!o.bias.empty()) {
    o.bias_of_experts = read_logits(o.bias).values;
    o.model.bias = o.bias_of_experts.data();
    if (o.bias_of_experts.size() != static_cast<std::size_t>(logits.E))
      throw input_error(o.bias + " has " + std::to_string(o.bias_of_experts.size()) +
                        " numbers, not one for each of " + std::to_string(logits.E) + " experts");
  }
  auto const by = [&](auto const& preset) { route_by(o, logits, preset); };
  if (o.preset == "expert_choice")
    route_by_experts(o, logits);
  else if (is_model(o.preset))
    route_by_model(o, by);
  else if (has_model_options(o))
    throw input_error(o.preset + " has neither groups nor a bias");
  else
    moe::visit_preset(o.preset, o.router, by);
  return 0;
} catch (moe::precondition_error const& refused) {
  // Without the line of this program that called.
  std::string text = refused.what();
  text = text.substr(0, text.rfind(" (called at "));
  if (text.find("known: ") != std::string::npos) {
    text += ", expert_choice";
    for (char const* name : moe::model_preset_names) text += std::string(", ") + name;
  }
  std::fprintf(stderr, "route: %s\n", text.c_str());
  return 2;
} catch (input_error const& wrong) {
  std::fprintf(stderr, "route: %s\n", wrong.what());
  return 2;
} catch (std::exception const& failure) {
  std::fprintf(stderr, "route: %s\n", failure.what());
  return 1;
}
