// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <doctest/doctest.h>
#include <random>
#include <string>
#include <support/counted.hpp>
#include <support/disturbed.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/collectives.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/scalar.hpp>

namespace {

using moe::exchange_status;
using moe::outcome;
using namespace std::chrono_literals;
using disturbed = moe_test::disturbed<moe::thread_communicator>;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
/// Far enough for a machine that is busy; nothing here waits for it.
moe::deadline late() {
  return moe::within(60s);
}

/// What a rank has; of 16 bits of precision, so that sums of floats depend on their order.
template <class T>
std::vector<T> values_of(int rank, std::int64_t n, unsigned seed) {
  std::mt19937 random(seed * 64 + static_cast<unsigned>(rank));
  std::vector<T> values(at(n));
  for (T& v : values) {
    float const scale = random() % 2 == 0 ? 1.f : 4096.f;
    float const x = (static_cast<float>(random() % 65536) - 32768.f) / 1024.f * scale;
    v = static_cast<T>(x);
  }
  return values;
}

/// The sum over all ranks, in their order, rounded once.
template <class T>
std::vector<T> sum_of(int R, std::int64_t n, unsigned seed) {
  using Sum = std::conditional_t<moe::scalar<T>, std::conditional_t<sizeof(T) == 8, double, float>,
                                 std::int64_t>;
  std::vector<Sum> sum(at(n));
  for (int r = 0; r < R; ++r) {
    auto const of_rank = values_of<T>(r, n, seed);
    for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += static_cast<Sum>(of_rank[i]);
  }
  std::vector<T> rounded;
  for (Sum const s : sum) rounded.push_back(static_cast<T>(s));
  return rounded;
}

template <class T>
bool same_bits(std::vector<T> const& a, std::vector<T> const& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// Calls f(communicator) on each rank; every other time the communicators are disturbed.
template <class F>
std::vector<char> on_ranks(int R, unsigned seed, F const& f) {
  std::vector<char> right(at(R));
  moe::thread_world world(R);
  world.run([&](moe::thread_communicator& inner) {
    if (seed % 2 == 0) {
      right[at(inner.rank())] = f(inner);
    } else {
      disturbed comm(inner, 100 * seed + static_cast<unsigned>(inner.rank()) + 1);
      right[at(comm.rank())] = f(comm);
    }
  });
  return right;
}

/// Rows of each rank: random, nothing at all, or all of them on one rank.
std::vector<std::int64_t> random_counts(int R, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int64_t> counts(at(R));
  auto const kind = seed % 5;
  for (std::int64_t& c : counts) c = kind == 0 ? 0 : static_cast<std::int64_t>(random() % 90);
  if (kind == 1)
    for (std::size_t r = 0; r < counts.size(); ++r)
      if (r != seed / 5 % counts.size()) counts[r] = 0;
  if (kind == 2) counts[random() % counts.size()] = 0;
  return counts;
}
std::int64_t sum_before(std::vector<std::int64_t> const& counts, std::int64_t r) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < r; ++i) sum += counts[at(i)];
  return sum;
}

template <class T, class C>
bool reduces(C& comm, std::int64_t n, unsigned seed) {
  auto values = values_of<T>(comm.rank(), n, seed);
  moe::buffer const scratch(moe::all_reduce_scratch<T>(n, comm.size()));
  return moe::all_reduce(comm, moe::vector_view<T>(values), scratch, late()) &&
         same_bits(values, sum_of<T>(comm.size(), n, seed));
}

}  // namespace

TEST_CASE_TEMPLATE("comm/collectives: all_reduce gives the sum in the order of ranks, to the bit",
                   T, float, double, moe::bf16, std::int64_t, std::int32_t) {
  unsigned seed = 0;
  for (int R = 1; R <= 8; ++R)
    for (std::int64_t const n : {0, 1, R - 1, R, R + 1, 63, 64 * R, 64 * R + 1, 1000}) {
      CAPTURE(R);
      CAPTURE(n);
      auto const right = on_ranks(R, ++seed, [&](auto& comm) { return reduces<T>(comm, n, seed); });
      CHECK(right == std::vector<char>(at(R), true));
    }
}

TEST_CASE("comm/collectives: the order of ranks makes a difference to the test's values") {
  int different = 0;
  for (unsigned seed = 0; seed < 20; ++seed) {
    auto const a = values_of<float>(0, 1, seed), b = values_of<float>(1, 1, seed),
               c = values_of<float>(2, 1, seed);
    different += (a[0] + b[0]) + c[0] != a[0] + (b[0] + c[0]) ? 1 : 0;
  }
  CHECK(different > 0);
}

TEST_CASE("comm/collectives: rows of all ranks on all ranks, any numbers of them") {
  constexpr int M = 3;
  for (unsigned seed = 0; seed < 60; ++seed) {
    int const R = 1 + static_cast<int>(seed / 2) % 8;
    bool const in_place = seed % 4 < 2;
    auto const counts = random_counts(R, seed);
    std::int64_t const N = sum_before(counts, R);
    std::vector<float> expected;
    for (int r = 0; r < R; ++r)
      for (float const v : values_of<float>(r, counts[at(r)] * M, seed)) expected.push_back(v);
    CAPTURE(seed);
    auto const right = on_ranks(R, seed, [&](auto& comm) {
      std::int64_t const n = counts[at(comm.rank())];
      auto own = values_of<float>(comm.rank(), n * M, seed);
      std::vector<float> out(at(N * M), -1.f);
      moe::matrix_view<float> rows(own.data(), n, M);
      if (in_place) {
        rows = {out.data() + sum_before(counts, comm.rank()) * M, n, M};
        std::copy(own.begin(), own.end(), rows.data());
      }
      moe::buffer const scratch(moe::all_gather_scratch(R));
      return moe::all_gather_rows<float>(comm, rows, counts, {out.data(), N, M}, scratch, late()) &&
             out == expected;
    });
    CHECK(right == std::vector<char>(at(R), true));
  }
}

TEST_CASE("comm/collectives: each rank gets the sum of its rows, any numbers of them") {
  constexpr int M = 3;
  for (unsigned seed = 0; seed < 60; ++seed) {
    int const R = 1 + static_cast<int>(seed / 2) % 8;
    bool const in_place = seed % 4 < 2;
    auto const counts = random_counts(R, seed);
    std::int64_t const N = sum_before(counts, R);
    auto const sum = sum_of<float>(R, N * M, seed);
    CAPTURE(seed);
    auto const right = on_ranks(R, seed, [&](auto& comm) {
      std::int64_t const n = counts[at(comm.rank())], first = sum_before(counts, comm.rank());
      auto rows = values_of<float>(comm.rank(), N * M, seed);
      std::vector<float> apart(at(n * M), -1.f);
      moe::matrix_view<float> const own(in_place ? rows.data() + first * M : apart.data(), n, M);
      moe::buffer const scratch(moe::reduce_scatter_scratch<float>(n * M, R));
      if (!moe::reduce_scatter_rows<float>(comm, {rows.data(), N, M}, counts, own, scratch, late()))
        return false;
      return std::equal(own.data(), own.data() + n * M, sum.begin() + first * M);
    });
    CHECK(right == std::vector<char>(at(R), true));
  }
}

TEST_CASE("comm/collectives: one rank by itself") {
  moe::self_communicator comm;
  CHECK(reduces<float>(comm, 17, 3));
}

TEST_CASE("comm/collectives: an all_reduce sends each value twice, whatever the number of ranks") {
  for (int const R : {2, 4, 8}) {
    std::int64_t const n = 8 * 300;
    auto const right = on_ranks(R, 0, [&](auto& inner) {
      moe_test::counted comm(inner, moe::topology::even(1, R));
      moe_test::link_counts const expected{2 * (R - 1), 2 * n / R * (R - 1) * 4};
      return reduces<float>(comm, n, 1) && comm.within_nodes == expected;
    });
    CHECK(right == std::vector<char>(at(R), true));
  }
}

TEST_CASE("comm/collectives: a rank that dies ends the others in time, with its name") {
  for (unsigned seed = 0; seed < 24; ++seed) {
    int const R = 2 + static_cast<int>(seed) % 5, victim = static_cast<int>(seed / 2) % R;
    int const calls = static_cast<int>(seed) % 2;  // in the reduce-scatter, or in the all-gather
    CAPTURE(seed);
    std::vector<outcome> ends(at(R));
    moe::thread_world world(R);
    auto const start = std::chrono::steady_clock::now();
    CHECK_THROWS_AS(world.run([&](moe::thread_communicator& inner) {
      bool const dies = inner.rank() == victim;
      disturbed comm(inner, seed + 1, dies ? calls : 1 << 30, seed % 3 == 0);
      auto values = values_of<float>(comm.rank(), 100, seed);
      moe::buffer const scratch(moe::all_reduce_scratch<float>(100, R));
      ends[at(comm.rank())] =
          moe::all_reduce(comm, moe::vector_view<float>(values), scratch, moe::within(10s));
    }),
                    moe_test::rank_died);
    CHECK(std::chrono::steady_clock::now() - start < 10s);
    int named = 0;
    for (int r = 0; r < R; ++r) {
      if (r == victim) continue;
      // One that failed first may have ended another before that one saw the victim. If the victim
      // sent all it had before it died, a rank may have got everything.
      bool const told = ends[at(r)].status == exchange_status::peer_failed && ends[at(r)].peer >= 0;
      bool const done = static_cast<bool>(ends[at(r)]) && seed % 3 == 0 && calls == 1;
      CHECK((told || done));
      named += told && ends[at(r)].peer == victim ? 1 : 0;
      named += done ? 1 : 0;
    }
    CHECK(named > 0);
  }
}

TEST_CASE("comm/collectives: a peer with other counts") {
  std::vector<outcome> ends(2);
  moe::thread_world world(2);
  world.run([&](moe::thread_communicator& comm) {
    std::vector<float> own(4, 1.f), out(8);
    std::int64_t const n = comm.rank() == 0 ? 3 : 4;
    std::vector<std::int64_t> const counts = {n, 4};  // rank 1 thinks that rank 0 has 4
    moe::buffer const scratch(moe::all_gather_scratch(2));
    ends[at(comm.rank())] =
        moe::all_gather_rows<float>(comm, {own.data(), comm.rank() == 0 ? n : 4, 1}, counts,
                                    {out.data(), n + 4, 1}, scratch, late());
  });
  CHECK(ends[1] == outcome{exchange_status::wrong_length, 0});
  CHECK(!ends[0]);
}

TEST_CASE("comm/collectives: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  moe::self_communicator comm;
  std::vector<float> a(6), b(6);
  moe::buffer const scratch(1 << 12);
  std::vector<std::int64_t> const three{3}, none, negative{-1}, two{2};
  auto const gather = [&](std::vector<std::int64_t> const& counts, moe::matrix_view<float> own,
                          moe::matrix_view<float> out, moe::memory from) {
    return refusal([&] {
      static_cast<void>(moe::all_gather_rows<float>(comm, own, counts, out, from, late()));
    });
  };
  moe::matrix_view<float> const own(a.data(), 3, 2), out(b.data(), 3, 2);
  CHECK(gather(three, own, out, scratch) == "nothing was thrown");
  says(gather(none, own, out, scratch), "counts [R]");
  says(gather(negative, own, out, scratch), "got rank = 0, count = -1");
  says(gather(two, own, out, scratch), "rows of all = 3, sum of counts = 2, own rows = 3");
  says(gather(three, {a.data(), 3, 1}, out, scratch), "cols of all = 2, own cols = 1");
  says(gather(three, {a.data(), 3, 1, 2}, {b.data(), 3, 1}, scratch), "contiguous");
  says(gather(two, {a.data() + 1, 2, 1}, {a.data(), 2, 1}, scratch), "its own place there");
  says(gather(three, own, out, {}), "scratch >= all_gather_scratch(R)");

  says(refusal([&] {
         static_cast<void>(moe::reduce_scatter_rows<float>(comm, own, two, out, scratch, late()));
       }),
       "reduce_scatter_rows: rows is [sum of counts, M]");
  says(refusal([&] {
         static_cast<void>(moe::reduce_scatter_rows<float>(comm, {a.data(), 2, 1}, two,
                                                           {a.data() + 1, 2, 1}, scratch, late()));
       }),
       "reduce_scatter_rows: out is apart from rows");
  says(refusal([&] {
         static_cast<void>(
             moe::all_reduce(comm, moe::vector_view<float>(a), {scratch.data(), 40}, late()));
       }),
       "all_reduce: scratch >= all_reduce_scratch<T>(n, R); got bytes = 40, n = 6, R = 1");
}
