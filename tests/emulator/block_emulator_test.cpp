#include "emulator/block_emulator.hpp"

#include <cstdint>
#include <doctest/doctest.h>
#include <string>
#include <vector>

using moe_test::divergence;
using moe_test::emulated_block;
using moe_test::launch_body;
using moe_test::schedule;
using moe_test::schedules;

namespace {

struct nothing {};

/// What a launch of body(b, memory) threw, or "" if nothing; `Threads` ints of shared memory.
template <int Threads, class Body>
std::string failure(schedule order, Body const& body) {
  struct ints {
    int memory[Threads];
  };
  try {
    launch_body<Threads, ints>(order, 1, 2, [&](emulated_block& b, ints& s) { body(b, s.memory); });
  } catch (divergence const& e) {
    return e.what();
  }
  return "";
}

bool contains(std::string const& text, std::string const& part) {
  return text.find(part) != std::string::npos;
}

/// "at <call> (<this file>:<line>)"
std::string place(char const* call, int line) {
  return std::string("at ") + call + " (" + __FILE__ + ":" + std::to_string(line) + ")";
}

}  // namespace

TEST_CASE("emulator: a thread knows where it is") {
  for (schedule const order : schedules) {
    std::vector<int> seen(3 * 48, 0);
    int blocks = 0;
    launch_body<48, nothing>(order, 7, 3, [&](emulated_block& b, nothing&) {
      ++seen[static_cast<std::size_t>(b.block() * b.threads() + b.thread())];
      if (b.thread() == 0) b.atomic_add(&blocks, b.blocks());
    });
    CHECK(seen == std::vector<int>(3 * 48, 1));
    CHECK(blocks == 9);
  }
}

TEST_CASE("emulator: the calls of a warp give what the hardware gives") {
  struct result {
    int from, crossed, up;
    double wide;
    std::uint32_t odd, equal, highest;
  };
  for (schedule const order : schedules) {
    std::vector<result> out(64);
    launch_body<64, nothing>(order, 3, 1, [&](emulated_block& b, nothing&) {
      int const t = b.thread();
      int const lane = t % 32;
      result& r = out[static_cast<std::size_t>(t)];
      r.from = b.shuffle(moe::all_lanes, t, (lane + 5) % 32);
      r.crossed = b.shuffle_xor(moe::all_lanes, t, 8);
      r.up = b.shuffle_up(moe::all_lanes, t, 3);
      r.wide = b.shuffle(moe::all_lanes, 0.5 * t, 31);
      r.odd = b.ballot(moe::all_lanes, t % 2 == 1);
      r.equal = b.match_any(moe::all_lanes, lane % 3 - 1);
      r.highest =
          b.highest(0xffu << lane / 8 * 8, 0x80000000u + static_cast<unsigned>(lane * 5 % 8));
    });
    for (int t = 0; t < 64; ++t) {
      CAPTURE(t);
      int const lane = t % 32;
      int const warp = t - lane;
      auto const& r = out[static_cast<std::size_t>(t)];
      CHECK(r.from == warp + (lane + 5) % 32);
      CHECK(r.crossed == warp + (lane ^ 8));
      CHECK(r.up == (lane < 3 ? t : t - 3));
      CHECK(r.wide == 0.5 * (warp + 31));
      CHECK(r.odd == 0xAAAAAAAAu);
      std::uint32_t const third = 0x49249249u;  // lanes 0, 3, ...
      CHECK(r.equal == third << lane % 3);
      CHECK(r.highest == 0x80000007u);
    }
  }
}

TEST_CASE("emulator: who arrives last sees what all blocks wrote") {
  for (schedule const order : schedules) {
    std::int32_t arrived = 0;
    std::vector<int> written(3, 0);
    int sum = 0, last = 0;
    launch_body<32, nothing>(order, 7, 3, [&](emulated_block& b, nothing&) {
      if (b.thread() != 0) return;
      written[static_cast<std::size_t>(b.block())] = b.block() + 1;
      if (b.arrive(&arrived) != b.blocks() - 1) return;
      ++last;
      for (int const w : written) sum += w;
    });
    CHECK(last == 1);
    CHECK(sum == 6);
  }
}

TEST_CASE("emulator: parts of a warp go different ways and meet again") {
  for (schedule const order : schedules)
    CHECK(failure<32>(order, [](emulated_block& b, int* memory) {
            int const lane = b.thread();
            std::uint32_t const quarter = 0xFFu << lane / 8 * 8;
            int sum = lane;
            for (int round = 0; round < lane / 8; ++round)  // 0 to 3 times, by quarter
              for (int bits = 4; bits > 0; bits /= 2) sum += b.shuffle_xor(quarter, sum, bits);
            b.sync_warp(quarter);
            memory[lane] = sum;
            b.sync_warp(moe::all_lanes);
            sum = 0;
            for (int l = 0; l < 32; ++l) sum += memory[l];
            int const sums[] = {28, 92, 156, 220};  // of the lanes of a quarter
            int const expected = sums[0] + 8 * sums[1] + 8 * 8 * sums[2] + 8 * 8 * 8 * sums[3];
            if (sum != expected) throw divergence("a wrong sum");
          }) == "");
}

TEST_CASE("emulator: one warp runs ahead where it is told to") {
  auto const turns = [](schedule order) {
    std::vector<int> warps;
    launch_body<128, nothing>(order, 1, 1, [&](emulated_block& b, nothing&) {
      for (int i = 0; i < 3; ++i) {
        moe_test::unobserved const notes_are_no_race;
        if (b.thread() % 32 == 0) warps.push_back(b.thread() / 32);
        (void)b.ballot(moe::all_lanes, true);
      }
    });
    return warps;
  };
  auto const ahead = turns(schedule::one_warp_ahead);
  REQUIRE(ahead.size() == 12);
  for (std::size_t i = 0; i < 12; i += 3) {
    CHECK(ahead[i] == ahead[i + 1]);
    CHECK(ahead[i] == ahead[i + 2]);
  }
  CHECK(turns(schedule::in_order) == std::vector{0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3});
  CHECK(turns(schedule::shuffled) != turns(schedule::in_order));
}

TEST_CASE("emulator: shared memory is no use before it is written, and no block sees another's") {
  struct word {
    std::uint32_t value;
  };
  std::vector<std::uint32_t> found;
  launch_body<1, word>(schedule::in_order, 1, 3, [&](emulated_block&, word& s) {
    moe_test::unobserved const notes_are_no_race;
    found.push_back(s.value);
    s.value = 1;
  });
  std::uint32_t const filled = moe_test::has_thread_sanitizer ? 0u : 0xCDCDCDCDu;
  CHECK(found == std::vector{filled, filled, filled});
}

TEST_CASE("emulator: the exception of a thread comes out of the launch") {
  auto const body = [](emulated_block& b, nothing&) {
    b.sync();
    if (b.thread() == 40) throw 40;
    b.sync();
  };
  for (schedule const order : schedules)
    CHECK_THROWS_AS((launch_body<64, nothing>(order, 1, 2, body)), int);
}

TEST_CASE("emulator: a barrier that one warp leaves out is a divergence") {
  for (schedule const order : schedules) {
    int const line = __LINE__ + 2;
    auto const text = failure<96>(order, [](emulated_block& b, int*) {
      if (b.thread() / 32 != 1) b.sync();
    });
    CHECK(contains(text, "block 0: some threads wait for others that never come"));
    CHECK(contains(text, "threads 0-31 " + place("sync", line) + ", 32-63 at the end, 64-95 "));
  }
}

TEST_CASE("emulator: threads at two different barriers diverge") {
  for (schedule const order : schedules) {
    int const line = __LINE__ + 3;
    auto const text = failure<64>(order, [](emulated_block& b, int*) {
      bool const low = b.thread() < 32;
      if (low) b.sync();
      if (!low) b.sync();
    });
    CHECK(contains(text, "threads of a block are at different calls of sync"));
    CHECK(contains(text, place("sync", line)));
    CHECK(contains(text, place("sync", line + 1)));
  }
}

TEST_CASE("emulator: lanes that miss a call of their warp are a divergence") {
  for (schedule const order : schedules) {
    int const line = __LINE__ + 3;
    // A loop of a length that differs by lane, with a full mask inside.
    auto const text = failure<32>(order, [](emulated_block& b, int*) {
      for (int i = b.thread() < 8 ? 1 : 0; i < 2; ++i) (void)b.ballot(moe::all_lanes, true);
    });
    CHECK(contains(text, "threads 0-7 at the end, 8-31 " + place("ballot", line)));
    // Two calls of one kind, at two places.
    auto const two_places = [](emulated_block& b, int*) {
      bool const low = b.thread() < 8;
      if (low) b.sync_warp(moe::all_lanes);
      if (!low) b.sync_warp(moe::all_lanes);
    };
    CHECK(failure<32>(order, two_places) != "");
    // Lanes that do not agree on the mask.
    CHECK(failure<32>(order, [](emulated_block& b, int*) {
            b.sync_warp(b.thread() < 8 ? 0xFFFFu : moe::all_lanes);
          }) != "");
  }
}

TEST_CASE("emulator: lanes that cannot take part are refused") {
  auto const in_order = schedule::in_order;
  CHECK(contains(failure<32>(in_order, [](emulated_block& b, int*) { b.sync_warp(0xFFu); }),
                 "a thread is not among the lanes that it names"));
  CHECK(
      contains(failure<48>(in_order, [](emulated_block& b, int*) { b.sync_warp(moe::all_lanes); }),
               "a thread names lanes that the block does not have"));
  CHECK(contains(failure<32>(in_order,
                             [](emulated_block& b, int*) {
                               std::uint32_t const half = b.thread() < 16 ? 0xFFFFu : 0xFFFF0000u;
                               (void)b.shuffle_xor(half, 1, 16);
                             }),
                 "a shuffle reads a lane that takes no part in it"));
}

namespace {

__attribute__((noinline)) void fill_a_whole_stack() {
  char volatile bytes[(256 << 10) + 512];
  for (char volatile& byte : bytes) byte = 1;
}

}  // namespace

TEST_CASE("emulator: a stack that overflows is noticed") {
  if (moe_test::has_address_sanitizer || moe_test::has_thread_sanitizer) return;  // they notice
  // Thread 0 has ended when thread 1 writes over its stack.
  auto const text = failure<2>(schedule::in_order, [](emulated_block& b, int*) {
    if (b.thread() == 1) fill_a_whole_stack();
  });
  CHECK(contains(text, "stack overflow"));
}
