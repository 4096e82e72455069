#include <doctest/doctest.h>
#include <vector>

#include <moe/core/lane_row.hpp>

#include "emulator/on_lanes.hpp"
#include "support/laws.hpp"

namespace {

/// The sizes up to the capacity of a home; unoptimised under the sanitizers, only the smaller ones.
/// None under the thread sanitizer: the assertions of a test order the threads that make them.
std::vector<int> sizes_up_to(int capacity) {
  if (moe_test::has_thread_sanitizer) return {};
  if (moe_test::has_address_sanitizer && capacity > 160) capacity = 160;
  std::vector<int> sizes;
  for (int const E : {1, 2, 8, 31, 32, 33, 60, 64, 160, 256, 384, 1000, 1024, 4096})
    if (E <= capacity) sizes.push_back(E);
  return sizes;
}

template <class Home>
void laws(moe_test::schedule order, int capacity) {
  moe_test::score_row_laws<typename Home::row>(moe_test::on_lanes<Home>{order},
                                               sizes_up_to(capacity));
}

}  // namespace

TEST_CASE("core/lane_row: the laws of a score_row in a sub-warp") {
  for (auto const order : moe_test::schedules) laws<moe_test::in_sub_warps<8, 32, 32>>(order, 256);
}

TEST_CASE("core/lane_row: the laws of a score_row in a warp") {
  for (auto const order : moe_test::schedules)
    laws<moe_test::in_sub_warps<32, 32, 32>>(order, 1024);
}

TEST_CASE("core/lane_row: the laws of a score_row in a block") {
  using block = moe_test::in_whole_block<43, 96>;
  laws<block>(moe_test::schedule::in_order, 384);
  laws<block>(moe_test::schedule::shuffled, 384);
  laws<block>(moe_test::schedule::one_warp_ahead, 4096);  // takes seconds
}
