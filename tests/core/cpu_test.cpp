#include <algorithm>
#include <atomic>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/thread_team.hpp>

namespace {

// Runs its members one after another on the calling thread: the least that a worker_team is, and
// every order of members at will.
struct in_turn {
  int members;
  bool backwards = false;
  int size() const { return members; }
  void run(void (*task)(void*, int), void* context) {
    for (int i = 0; i < members; ++i) task(context, backwards ? members - 1 - i : i);
  }
};

}  // namespace

TEST_CASE("core/cpu: without a team it is the calling thread") {
  moe::cpu const exec;
  CHECK(exec.threads() == 1);
  int calls = 0;
  exec.run([&](int member) { calls += 1 + 100 * member; });
  CHECK(calls == 1);
  exec.split(10, 3, [&](std::int64_t first, std::int64_t last, int member) {
    CHECK(first == 0);
    CHECK(last == 10);
    CHECK(member == 0);
  });
  static_assert(std::is_trivially_copyable_v<moe::cpu>);
  static_assert(!moe::worker_team<moe::cpu>);
}

TEST_CASE("core/cpu: run calls each member once") {
  for (int const threads : {1, 2, 3, 7}) {
    moe::thread_team team(threads);
    moe::cpu const exec(team);
    CHECK(exec.threads() == threads);
    std::vector<int> calls(static_cast<std::size_t>(threads), 0);
    for (int round = 0; round < 50; ++round)
      exec.run([&](int member) { ++calls[static_cast<std::size_t>(member)]; });
    for (int const n : calls) CHECK(n == 50);
    auto const constant = [&calls](int member) { ++calls[static_cast<std::size_t>(member)]; };
    exec.run(constant);
    CHECK(calls.back() == 51);
  }
}

TEST_CASE("core/cpu: split covers each element once, in ranges that start at multiples of grain") {
  for (int const threads : {1, 2, 3, 7, 16})
    for (std::int64_t const n : {0, 1, 2, 5, 7, 8, 9, 63, 64, 65, 1000})
      for (std::int64_t const grain : {1, 2, 3, 8, 64, 5000}) {
        CAPTURE(threads);
        CAPTURE(n);
        CAPTURE(grain);
        in_turn team{threads};
        std::vector<int> seen(static_cast<std::size_t>(n), 0);
        std::vector<int> ranges(static_cast<std::size_t>(threads), 0);
        std::int64_t short_ranges = 0, expected_first = 0;
        bool in_order = true;
        moe::cpu(team).split(n, grain, [&](std::int64_t first, std::int64_t last, int member) {
          REQUIRE(first < last);
          REQUIRE(last <= n);
          CHECK(first % grain == 0);
          short_ranges += last - first < grain;
          in_order = in_order && first == expected_first;
          expected_first = last;
          ++ranges[static_cast<std::size_t>(member)];
          for (std::int64_t i = first; i < last; ++i) ++seen[static_cast<std::size_t>(i)];
        });
        CHECK(std::count(seen.begin(), seen.end(), 1) == n);
        CHECK(short_ranges <= 1);  // the last one
        CHECK(in_order);
        CHECK(*std::max_element(ranges.begin(), ranges.end()) <= 1);
      }
}

TEST_CASE("core/cpu: split is even within one grain") {
  in_turn team{7};
  std::int64_t least = 1000, most = 0;
  moe::cpu(team).split(1000, 1, [&](std::int64_t first, std::int64_t last, int) {
    least = std::min(least, last - first);
    most = std::max(most, last - first);
  });
  CHECK(least == 142);
  CHECK(most == 143);
}

TEST_CASE("core/cpu: split does not overflow, and refuses a grain below 1") {
  in_turn team{3};
  std::int64_t const huge = std::numeric_limits<std::int64_t>::max();
  std::int64_t covered = 0;
  auto const cover = [&](std::int64_t first, std::int64_t last, int) { covered += last - first; };
  moe::cpu(team).split(100, huge, cover);
  CHECK(covered == 100);
  covered = 0;
  moe::cpu(team).split(std::int64_t{1} << 60, std::int64_t{1} << 40, cover);
  CHECK(covered == std::int64_t{1} << 60);
  std::string text;
  try {
    moe::cpu(team).split(10, 0, cover);
  } catch (moe::precondition_error const& e) {
    text = e.what();
  }
  CHECK(text.find("cpu::split: grain >= 1; got grain = 0 (called at ") == 0);
  CHECK(text.find("cpu_test.cpp:") != std::string::npos);
}

TEST_CASE("core/cpu: each calls every index once, whichever member is free") {
  for (int const threads : {1, 2, 3, 7})
    for (std::int64_t const n : {0, 1, 2, 100, 1000}) {
      moe::thread_team team(threads);
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(n));
      std::atomic<int> strangers = 0;
      moe::cpu(team).each(n, [&](std::int64_t i, int member) {
        strangers += member < 0 || member >= threads;
        ++seen[static_cast<std::size_t>(i)];
      });
      CHECK(strangers == 0);
      CHECK(std::count(seen.begin(), seen.end(), 1) == n);
    }
  in_turn backwards{4, true};
  int calls = 0;
  moe::cpu(backwards).each(10, [&](std::int64_t, int) { ++calls; });
  CHECK(calls == 10);
}

TEST_CASE("core/cpu: what a function throws comes out of run, split and each") {
  for (int const threads : {1, 3}) {
    moe::thread_team team(threads);
    moe::cpu const exec(team);
    auto const refuse = [](auto...) { throw std::runtime_error("refused"); };
    CHECK_THROWS_WITH_AS(exec.run(refuse), "refused", std::runtime_error);
    CHECK_THROWS_WITH_AS(exec.split(100, 1, refuse), "refused", std::runtime_error);
    CHECK_THROWS_WITH_AS(exec.each(100, refuse), "refused", std::runtime_error);
    int calls = 0;
    exec.each(1, [&](std::int64_t, int) { ++calls; });
    CHECK(calls == 1);
  }
}
