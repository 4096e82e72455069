#if defined(_OPENMP)
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/core/cpu.hpp>
#include <moe/core/openmp_team.hpp>

#include "support/laws.hpp"

TEST_CASE("core/openmp_team: the laws of a worker_team") {
  for (int const threads : {1, 2, 3, 7}) {
    CAPTURE(threads);
    moe::openmp_team team(threads);
    CHECK(team.size() == threads);
    moe_test::worker_team_laws(team);
  }
}

TEST_CASE("core/openmp_team: inside a parallel region, where fewer threads come, all members run") {
  std::atomic<int> calls = 0;
#pragma omp parallel num_threads(2) default(none) shared(calls)
  {
    moe::openmp_team team(5);
    moe::cpu(team).run([&](int) { ++calls; });
  }
  CHECK(calls >= 5);
  CHECK(calls % 5 == 0);
}

TEST_CASE("core/openmp_team: a task may run its own team") {
  moe::openmp_team team(3);
  std::atomic<int> calls = 0;
  moe::cpu(team).run([&](int) { moe::cpu(team).run([&](int) { ++calls; }); });
  CHECK(calls == 9);
}

TEST_CASE("core/openmp_team: split through the executor covers all") {
  moe::openmp_team team(3);
  std::vector<int> seen(1000, 0);
  moe::cpu(team).split(1000, 8, [&](std::int64_t first, std::int64_t last, int) {
    for (auto i = first; i < last; ++i) ++seen[static_cast<std::size_t>(i)];
  });
  CHECK(std::count(seen.begin(), seen.end(), 1) == 1000);
}

TEST_CASE("core/openmp_team: fewer than one thread is refused") {
  CHECK_THROWS_WITH_AS(moe::openmp_team(0),
                       doctest::Contains("openmp_team: threads >= 1; got threads = 0"),
                       moe::precondition_error);
}
#endif
