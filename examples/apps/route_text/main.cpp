// Routes every byte of a text to two of eight experts and shows which expert got what.
// SPDX-License-Identifier: MIT
//
// There is no trained model here: a byte's embedding and the router's matrix are fixed random
// numbers. Still the experts specialise, because equal bytes have equal embeddings.
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/random.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>
#include <moe/routing/build_table.hpp>

namespace {

constexpr int M = 64, E = 8, K = 2;
constexpr std::size_t most_bytes = std::size_t{1} << 26;

constexpr char usage[] =
    "usage: route_text FILE\n"
    "\n"
    "Routes every byte of FILE to 2 of 8 experts (softmax, top 2, renormalised) and prints for\n"
    "each expert how many bytes it got, how that compares with an even share, and which\n"
    "characters it got most. Embeddings and router are fixed random numbers.\n";

std::vector<unsigned char> read(std::string const& path) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::vector<unsigned char> bytes;
  std::array<char, 1 << 16> part;
  while (file && bytes.size() <= most_bytes) {
    file.read(part.data(), static_cast<std::streamsize>(part.size()));
    bytes.insert(bytes.end(), part.data(), part.data() + file.gcount());
  }
  if (!file.eof() && bytes.size() <= most_bytes)
    throw std::runtime_error("cannot read " + path + ": " +
                             (errno != 0 ? std::strerror(errno) : "not a readable file"));
  if (bytes.empty()) throw std::runtime_error(path + " is empty: there is nothing to route");
  if (bytes.size() > most_bytes) throw std::runtime_error(path + " is longer than 64 MiB");
  return bytes;
}

/// [256,E]: what the router gives each byte, its random embedding [M] times a random matrix [M,E].
std::vector<float> router_of_bytes() {
  auto const number = [](int row, int column) {
    return moe::normal(moe::token{.id = row, .seed = 2022}, moe::stream::user,
                       static_cast<std::uint32_t>(column));
  };
  constexpr int router_rows = 1000;  // ids of the matrix's rows, behind those of bytes
  std::vector<float> logits(256 * E);
  for (int byte = 0; byte < 256; ++byte)
    for (int e = 0; e < E; ++e)
      for (int m = 0; m < M; ++m)
        logits[static_cast<std::size_t>(byte * E + e)] +=
            number(byte, m) * number(router_rows + m, e) / 8;  // 8 = sqrt(M)
  return logits;
}

/// [T,E]: a byte's own logits and half of those of the byte before it.
std::vector<float> logits_of(std::vector<unsigned char> const& text) {
  auto const of_byte = router_of_bytes();
  std::vector<float> logits(text.size() * E);
  for (std::size_t t = 0; t < text.size(); ++t)
    for (std::size_t e = 0; e < E; ++e) {
      logits[t * E + e] = of_byte[std::size_t{text[t]} * E + e];
      if (t > 0) logits[t * E + e] += 0.5f * of_byte[std::size_t{text[t - 1]} * E + e];
    }
  return logits;
}

std::string name_of(int byte) {
  if (byte == ' ') return "space";
  if (byte == '\n') return "newline";
  if (byte == '\t') return "tab";
  if (byte > ' ' && byte < 127) return {static_cast<char>(byte)};
  char hex[8];
  std::snprintf(hex, sizeof hex, "0x%02x", static_cast<unsigned>(byte));
  return hex;
}

void print(std::vector<unsigned char> const& text, moe::routing_table const& table) {
  double const even = static_cast<double>(text.size()) * K / E;
  std::printf("expert      bytes   load                  most frequent characters\n");
  for (int e = 0; e < E; ++e) {
    std::array<int, 256> count{};
    for (int row = table.begin[e]; row < table.begin[e] + table.used[e]; ++row)
      ++count[text[static_cast<std::size_t>(table.pair_of[row] / K)]];
    std::array<int, 256> bytes;
    std::iota(bytes.begin(), bytes.end(), 0);
    std::stable_sort(bytes.begin(), bytes.end(), [&](int a, int b) {
      return count[static_cast<std::size_t>(a)] > count[static_cast<std::size_t>(b)];
    });
    double const load = table.used[e] / even;  // 1 = an even share
    std::string const bar(static_cast<std::size_t>(std::min(14.0, 7 * load + 0.5)), '#');
    std::printf("%6d %10d   %4.2f %-15s ", e, table.used[e], load, bar.c_str());
    for (int i = 0; i < 9 && count[static_cast<std::size_t>(bytes[static_cast<std::size_t>(i)])];
         ++i)
      std::printf(" %s", name_of(bytes[static_cast<std::size_t>(i)]).c_str());
    std::printf("\n");
  }
}

void route_text(std::string const& path) {
  auto const text = read(path);
  auto const T = static_cast<std::int64_t>(text.size());
  auto const logits = logits_of(text);

  moe::thread_team team(std::max(1, static_cast<int>(std::thread::hardware_concurrency())));
  moe::cpu const exec(team);
  moe::gate<moe::softmax, moe::top_k<K>, moe::renormalised> const gate;
  moe::routing_buffer routing(T, K, E);
  moe::buffer scratch(moe::route_scratch<decltype(gate)>(exec, E));
  moe::route(exec, gate, moe::matrix_view(logits, T, E), {}, scratch, routing);

  moe::table_shape const shape{.T = T, .K = K, .E = E, .max_rows = T * K};
  moe::table_buffer table(shape);
  scratch = moe::buffer(moe::build_table_scratch(exec, shape));
  moe::build_table(exec, routing, moe::table_rules{}, scratch, table);
  if (table.counts->kept != T * K) throw std::logic_error("a byte was lost");

  std::printf("%s: %lld bytes, %d experts, %d choices for each byte\n\n", path.c_str(),
              static_cast<long long>(T), E, K);
  print(text, table);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && (std::strcmp(argv[1], "--help") == 0 || std::strcmp(argv[1], "-h") == 0)) {
    std::fputs(usage, stdout);
    return 0;
  }
  if (argc != 2) {
    std::fputs(usage, stderr);
    return 2;
  }
  try {
    route_text(argv[1]);
  } catch (std::exception const& failure) {
    std::fprintf(stderr, "route_text: %s\n", failure.what());
    return 1;
  }
}
