#include <cstdint>
#include <doctest/doctest.h>

#include <moe/core/thread_block.hpp>

namespace {

/// Nothing beyond the requirements.
struct minimal_block {
  int thread() const { return 0; }
  int threads() const { return 1; }
  int block() const { return 0; }
  int blocks() const { return 1; }
  void sync() {}
  void sync_warp(std::uint32_t) {}
  float shuffle(std::uint32_t, float value, int) { return value; }
  float shuffle_xor(std::uint32_t, float value, int) { return value; }
  std::uint64_t shuffle_xor(std::uint32_t, std::uint64_t value, int) { return value; }
  std::int32_t shuffle_up(std::uint32_t, std::int32_t value, int) { return value; }
  std::uint32_t ballot(std::uint32_t lanes, bool holds) { return holds ? lanes : 0; }
  std::uint32_t match_any(std::uint32_t lanes, std::int32_t) { return lanes; }
  std::uint32_t highest(std::uint32_t, std::uint32_t value) { return value; }
  std::int32_t atomic_add(std::int32_t*, std::int32_t) { return 0; }
  std::int64_t atomic_add(std::int64_t*, std::int64_t) { return 0; }
  std::int32_t arrive(std::int32_t*) { return 0; }
  void wait_for_previous() {}
  void let_next_start() {}
};
static_assert(moe::thread_block<minimal_block>);

// Each lacks one requirement.
struct no_thread : minimal_block {
  int thread() = delete;
};
struct wide_threads : minimal_block {
  std::int64_t threads() const { return 1; }
};
struct no_block : minimal_block {
  int block() = delete;
};
struct no_blocks : minimal_block {
  int blocks() = delete;
};
struct no_sync : minimal_block {
  void sync() = delete;
};
struct no_sync_warp : minimal_block {
  void sync_warp() = delete;
};
struct no_shuffle : minimal_block {
  void shuffle() = delete;
};
struct narrow_shuffle_xor : minimal_block {
  float shuffle_xor(std::uint32_t, float value, int) { return value; }
};
struct no_shuffle_up : minimal_block {
  void shuffle_up() = delete;
};
struct signed_ballot : minimal_block {
  int ballot(std::uint32_t, bool) { return 0; }
};
struct no_match_any : minimal_block {
  void match_any() = delete;
};
struct signed_highest : minimal_block {
  int highest(std::uint32_t, std::uint32_t) { return 0; }
};
struct no_arrive : minimal_block {
  void arrive() = delete;
};
struct no_wait : minimal_block {
  void wait_for_previous() = delete;
};
struct no_let_next_start : minimal_block {
  void let_next_start() = delete;
};
struct silent_atomic_add : minimal_block {
  void atomic_add(std::int32_t*, std::int32_t) {}
};
static_assert(!moe::thread_block<no_thread>);
static_assert(!moe::thread_block<wide_threads>);
static_assert(!moe::thread_block<no_block>);
static_assert(!moe::thread_block<no_blocks>);
static_assert(!moe::thread_block<no_sync>);
static_assert(!moe::thread_block<no_sync_warp>);
static_assert(!moe::thread_block<no_shuffle>);
static_assert(!moe::thread_block<narrow_shuffle_xor>);
static_assert(!moe::thread_block<no_shuffle_up>);
static_assert(!moe::thread_block<signed_ballot>);
static_assert(!moe::thread_block<no_match_any>);
static_assert(!moe::thread_block<silent_atomic_add>);
static_assert(!moe::thread_block<signed_highest>);
static_assert(!moe::thread_block<no_arrive>);
static_assert(!moe::thread_block<no_wait>);
static_assert(!moe::thread_block<no_let_next_start>);

}  // namespace

TEST_CASE("core/thread_block: lanes of a mask") {
  CHECK(moe::count_lanes(moe::all_lanes) == 32);
  CHECK(moe::count_lanes(0) == 0);
  CHECK(moe::count_lanes(0x80000001u) == 2);
  CHECK(moe::lanes_below(0) == 0);
  CHECK(moe::lanes_below(5) == 0x1Fu);
  CHECK(moe::lanes_below(31) == 0x7FFFFFFFu);
}
