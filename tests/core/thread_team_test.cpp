#include <atomic>
#include <chrono>
#include <cstdint>
#include <doctest/doctest.h>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <moe/core/execution.hpp>

#include "support/laws.hpp"

namespace {

void nothing(void*, int) {}

// The text of what `team` refuses when it is run from inside `outer`'s task, on any member.
std::string nested(moe::thread_team& outer, moe::thread_team& team) {
  struct both {
    moe::thread_team& team;
    std::atomic<int> refused{0};
  } context{team};
  std::string text;
  try {
    outer.run(
        [](void* c, int) {
          auto& b = *static_cast<both*>(c);
          try {
            b.team.run(nothing, nullptr);
          } catch (moe::precondition_error const&) {
            ++b.refused;
            throw;
          }
        },
        &context);
  } catch (moe::precondition_error const& e) {
    text = e.what();
  }
  CHECK((context.refused == 0 || context.refused == outer.size()));
  return text;
}

}  // namespace

TEST_CASE("core/thread_team: the laws of a worker_team") {
  for (int const threads : {1, 2, 3, 7}) {
    CAPTURE(threads);
    moe::thread_team team(threads);
    CHECK(team.size() == threads);
    moe_test::worker_team_laws(team);
  }
}

TEST_CASE("core/thread_team: members are different threads, the caller is member 0") {
  moe::thread_team team(4);
  std::vector<std::thread::id> ids(4);
  moe::cpu(team).run([&](int m) { ids[static_cast<std::size_t>(m)] = std::this_thread::get_id(); });
  CHECK(ids[0] == std::this_thread::get_id());
  CHECK(std::set<std::thread::id>(ids.begin(), ids.end()).size() == 4);
  auto const before = ids;
  moe::cpu(team).run([&](int m) { ids[static_cast<std::size_t>(m)] = std::this_thread::get_id(); });
  CHECK(ids == before);
}

TEST_CASE("core/thread_team: members are awake together") {
  moe::thread_team team(3);
  std::atomic<int> arrived = 0;
  moe::cpu(team).run([&](int) {  // only a test may wait for other members
    ++arrived;
    while (arrived < 3) std::this_thread::yield();
  });
  CHECK(arrived == 3);
}

TEST_CASE("core/thread_team: ten thousand runs see each other's writes") {
  moe::thread_team team(3);
  moe::cpu const exec(team);
  std::vector<std::int64_t> value(3, 0), copy(3, 0);  // plain memory: a race would be one
  std::int64_t wrong = 0;
  for (std::int64_t round = 1; round <= 5000; ++round) {
    exec.run([&](int m) { value[static_cast<std::size_t>(m)] = round * (m + 1); });
    exec.run([&](int m) {
      copy[static_cast<std::size_t>(m)] = value[static_cast<std::size_t>((m + 1) % 3)];
    });
    for (int m = 0; m < 3; ++m)
      wrong += copy[static_cast<std::size_t>(m)] != round * ((m + 1) % 3 + 1);
  }
  CHECK(wrong == 0);
}

TEST_CASE("core/thread_team: runs after a pause wake the members that went to sleep") {
  moe::thread_team team(2);
  std::atomic<int> calls = 0;
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    moe::cpu(team).run([&](int m) {
      if (m == 1) std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the caller sleeps
      ++calls;
    });
  }
  CHECK(calls == 10);
}

TEST_CASE("core/thread_team: destroyed right after it was made, or used once") {
  for (int round = 0; round < 200; ++round) {
    moe::thread_team team(4);
    if (round % 2 == 0) team.run(nothing, nullptr);
  }
}

TEST_CASE("core/thread_team: calls from two threads take turns") {
  moe::thread_team team(3);
  std::atomic<int> inside = 0, most = 0, calls = 0;
  auto const use = [&] {
    for (int round = 0; round < 300; ++round)
      moe::cpu(team).run([&](int) {
        int const now = ++inside;
        int seen = most;
        while (now > seen && !most.compare_exchange_weak(seen, now)) {
        }
        ++calls;
        --inside;
      });
  };
  std::thread other(use);
  use();
  other.join();
  CHECK(calls == 2 * 300 * 3);
  CHECK(most <= 3);
}

TEST_CASE("core/thread_team: a run inside a task of the same team is refused on every member") {
  for (int const threads : {1, 2, 4}) {
    moe::thread_team team(threads);
    std::string const text = nested(team, team);
    CHECK(text.find("thread_team::run: not from inside a task of the same team (called at ") == 0);
    CHECK(text.find("thread_team_test.cpp:") != std::string::npos);
    team.run(nothing, nullptr);  // usable afterwards
  }
}

TEST_CASE("core/thread_team: a task may run another team, but not its own through that one") {
  moe::thread_team a(3), b(2);
  CHECK(nested(a, b).empty());
  std::atomic<int> refused = 0;
  moe::cpu(a).run([&](int) {
    moe::cpu(b).run([&](int) {
      try {
        a.run(nothing, nullptr);
      } catch (moe::precondition_error const&) {
        ++refused;
      }
    });
  });
  CHECK(refused == 6);
  CHECK(nested(a, b).empty());  // the nesting was forgotten
  a.run(nothing, nullptr);
  b.run(nothing, nullptr);
}

TEST_CASE("core/thread_team: a failure on one thread is not seen by a run of another") {
  moe::thread_team team(2);
  std::atomic<int> caught = 0, calls = 0;
  std::thread other([&] {
    for (int round = 0; round < 200; ++round) try {
        moe::cpu(team).run([](int) { throw std::runtime_error("no"); });
      } catch (std::runtime_error const&) {
        ++caught;
      }
  });
  for (int round = 0; round < 200; ++round) moe::cpu(team).run([&](int) { ++calls; });
  other.join();
  CHECK(caught == 200);
  CHECK(calls == 400);
}

TEST_CASE("core/thread_team: fewer than one thread is refused") {
  for (int const threads : {0, -3}) {
    std::string text;
    try {
      moe::thread_team team(threads);
    } catch (moe::precondition_error const& e) {
      text = e.what();
    }
    CHECK(text.find("thread_team: threads >= 1; got threads = " + std::to_string(threads)) == 0);
    CHECK(text.find("thread_team_test.cpp:") != std::string::npos);
  }
}
