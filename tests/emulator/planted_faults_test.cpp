// One kernel with one fault at a time: which faults the emulator finds, in which schedule, and under
// which sanitizer.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <doctest/doctest.h>
#include <fstream>
#include <numeric>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

#include <moe/core/thread_block.hpp>

#include "emulator/block_emulator.hpp"
#include "support/random.hpp"

using moe_test::has_address_sanitizer;
using moe_test::has_thread_sanitizer;
using moe_test::schedule;
using moe_test::schedules;

namespace {

enum class fault {
  none,
  no_warp_barrier,
  ballot_as_barrier,
  no_first_barrier,
  no_second_barrier,
  barrier_of_some_warps,
  word_of_two_blocks,
  index_past_shared,
  read_past_the_end
};

/// Sorts each tile of keys, stably: `sorted` gets the positions of a tile's keys by rising key.
template <fault Planted>
struct sort_tiles {
  static constexpr int threads = 96;
  static constexpr int items = 2;  // keys of a thread
  static constexpr int tile = threads * items;
  static constexpr int bins = 16;
  static constexpr int warps = threads / moe::warp_size;

  struct shared {
    int before[warps][bins];  // first: keys in a warp; then: keys in the warps before it
    int size[bins];
  };

  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, int const* keys, int n, int* sorted,
                                  int* last_block) const {
    int const t = b.thread();
    int const lane = t % moe::warp_size;
    int const warp = t / moe::warp_size;
    int const first = b.block() * tile + warp * items * moe::warp_size + lane;
    for (int bin = lane; bin < bins; bin += moe::warp_size) s.before[warp][bin] = 0;  // clears
    b.sync_warp(moe::all_lanes);

    int key[items];
    int rank[items];  // among the equal keys of this warp
    for (int i = 0; i < items; ++i) {
      int const at = first + i * moe::warp_size;
      bool const read = at < n || (Planted == fault::read_past_the_end && at == n);
      key[i] = read ? keys[at] : bins;  // reads a key
      std::uint32_t const same = b.match_any(moe::all_lanes, key[i]);
      rank[i] = moe::count_lanes(same & moe::lanes_below(lane));
      bool const leads = rank[i] == 0;
      if (key[i] < bins) rank[i] += s.before[warp][key[i]];  // reads a count
      if (Planted == fault::ballot_as_barrier)
        (void)b.ballot(moe::all_lanes, true);
      else if (Planted != fault::no_warp_barrier)
        b.sync_warp(moe::all_lanes);
      if (key[i] < bins && leads) s.before[warp][key[i]] += moe::count_lanes(same);  // adds up
      b.sync_warp(moe::all_lanes);
    }

    if (Planted != fault::no_first_barrier) b.sync();
    if (t < bins) {
      int sum = 0;
      for (int w = 0; w < warps; ++w) {
        int const here = s.before[w][t];  // takes a count
        s.before[w][t] = sum;             // leaves a sum
        sum += here;
      }
      s.size[t + (Planted == fault::index_past_shared ? n : 0)] = sum;  // stores a size
    }
    if (Planted != fault::no_second_barrier) b.sync();

    if (Planted == fault::word_of_two_blocks && t == 0) *last_block = b.block();  // marks a block
    for (int i = 0; i < items; ++i) {
      if (key[i] >= bins) continue;
      int to = b.block() * tile + s.before[warp][key[i]] + rank[i];
      for (int k = 0; k < key[i]; ++k) to += s.size[k];  // takes a size
      sorted[to] = first + i * moe::warp_size;
    }
    if (Planted == fault::barrier_of_some_warps && warp != 1) b.sync();
  }
};

/// "right", "wrong", or what the launch threw.
template <fault Planted>
std::string run(schedule order, unsigned seed) {
  using kernel = sort_tiles<Planted>;
  int const blocks = 2;
  int const n = blocks * kernel::tile - 37;
  std::vector<int> keys;
  keys.reserve(static_cast<std::size_t>(n));  // no more, for the address sanitizer
  for (double const u : moe_test::uniforms(n, seed, 0, kernel::bins))
    keys.push_back(static_cast<int>(u));
  std::vector<int> sorted(static_cast<std::size_t>(n), -1);
  int last_block = -1;
  try {
    launch(order, seed, blocks, kernel{}, keys.data(), n, sorted.data(), &last_block);
  } catch (moe_test::divergence const& e) {
    return e.what();
  }
  std::vector<int> expected(static_cast<std::size_t>(n));
  std::iota(expected.begin(), expected.end(), 0);
  for (int b = 0; b < blocks; ++b)
    std::stable_sort(expected.begin() + b * kernel::tile,
                     expected.begin() + std::min(n, (b + 1) * kernel::tile), [&](int i, int j) {
                       return keys[static_cast<std::size_t>(i)] < keys[static_cast<std::size_t>(j)];
                     });
  return sorted == expected ? "right" : "wrong";
}

struct outcome {
  bool died;         ///< By a signal or a sanitizer.
  std::string text;  ///< All that was said.
};

/// Runs it in a process of its own, which a crash or a report may end.
template <fault Planted>
outcome run_apart(schedule order) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  std::fflush(nullptr);
#if MOE_TEST_TSAN
  moe_test::sanitizer_fibers::forget();
#endif
  pid_t const child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    for (int const crash : {SIGSEGV, SIGABRT}) std::signal(crash, SIG_DFL);  // not doctest's
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    std::puts(run<Planted>(order, 1).c_str());
    std::exit(0);
  }
  close(ends[1]);
  outcome found{false, ""};
  char part[4096];
  for (ssize_t size = 0; (size = read(ends[0], part, sizeof part)) > 0;)
    found.text.append(part, static_cast<std::size_t>(size));
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  found.died = !WIFEXITED(status) || WEXITSTATUS(status) != 0;
  return found;
}

bool contains(std::string const& text, std::string const& part) {
  return text.find(part) != std::string::npos;
}

/// "<this file>:<line>" of the line of the kernel that ends in this comment.
std::string line_of(std::string const& comment) {
  std::ifstream source(__FILE__);
  std::string line;
  for (int number = 1; std::getline(source, line); ++number)
    if (line.ends_with("// " + comment)) return "planted_faults_test.cpp:" + std::to_string(number);
  FAIL("no line ends in // " << comment);
  return "";
}

/// A race: the thread sanitizer names a line on either side of it in every schedule, and a plain run
/// gives these results ("" = any; wrong may be a crash).
template <fault Planted>
void check_race(std::vector<std::string> const& one, std::vector<std::string> const& other,
                char const* in_order, char const* shuffled, char const* one_warp_ahead) {
  char const* const plain[] = {in_order, shuffled, one_warp_ahead};
  for (schedule const order : schedules) {
    CAPTURE(static_cast<int>(order));
    auto const found = run_apart<Planted>(order);
    CAPTURE(found.text);
    if (has_thread_sanitizer) {
      CHECK(found.died);
      CHECK(contains(found.text, "data race"));
      for (auto const& side : {one, other})
        CHECK(std::any_of(side.begin(), side.end(), [&](std::string const& comment) {
          return contains(found.text, line_of(comment));
        }));
    } else if (*plain[static_cast<int>(order)] != '\0') {
      CHECK((found.died ? "wrong\n" : found.text) ==
            plain[static_cast<int>(order)] + std::string("\n"));
    }
  }
}

}  // namespace

TEST_CASE("emulator: a kernel without a fault is right in every schedule, and has no race") {
  for (schedule const order : schedules)
    for (unsigned seed = 1; seed <= (has_thread_sanitizer ? 1 : 5); ++seed)
      CHECK(run<fault::none>(order, seed) == "right");
}

TEST_CASE("emulator: a missing warp barrier") {
  check_race<fault::no_warp_barrier>({"reads a count"}, {"adds up"}, "wrong", "wrong", "wrong");
}

TEST_CASE("emulator: a ballot orders no memory; only the thread sanitizer knows") {
  check_race<fault::ballot_as_barrier>({"reads a count"}, {"adds up"}, "right", "right", "right");
}

TEST_CASE("emulator: a missing barrier shows when one warp runs ahead") {
  check_race<fault::no_first_barrier>({"clears", "adds up"}, {"takes a count", "leaves a sum"},
                                      "right", "", "wrong");
}

TEST_CASE("emulator: one word written by two blocks; only the thread sanitizer knows") {
  check_race<fault::word_of_two_blocks>({"marks a block"}, {"marks a block"}, "right", "right",
                                        "right");
}

TEST_CASE("emulator: a reader that no barrier holds back meets the fill, not old values") {
  for (schedule const order : schedules) {
    auto const found = run_apart<fault::no_second_barrier>(order);
    CAPTURE(found.text);
    CHECK((found.died || contains(found.text, "wrong")));
    if (!has_thread_sanitizer) continue;
    CHECK(contains(found.text, line_of("stores a size")));
    CHECK(contains(found.text, line_of("takes a size")));
  }
}

TEST_CASE("emulator: a barrier that one warp leaves out") {
  for (schedule const order : schedules) {
    auto const text = run<fault::barrier_of_some_warps>(order, 1);
    CHECK(contains(text, "some threads wait for others that never come"));
    CHECK(contains(text, "threads 0-31 at sync ("));
    CHECK(contains(text, "planted_faults_test.cpp"));
    CHECK(contains(text, "32-63 at the end"));
  }
}

TEST_CASE("emulator: the address sanitizer sees shared and global memory as objects of their own") {
  auto const shared_memory = run_apart<fault::index_past_shared>(schedule::in_order);
  auto const global_memory = run_apart<fault::read_past_the_end>(schedule::in_order);
  if (!has_address_sanitizer) return;  // else anything may happen
  CHECK(shared_memory.died);
  CHECK(contains(shared_memory.text, line_of("stores a size")));
  CHECK(global_memory.died);
  CHECK(contains(global_memory.text, "heap-buffer-overflow"));
  CHECK(contains(global_memory.text, line_of("reads a key")));
}
