#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/core/memory.hpp>

using moe::memory;

namespace {

bool aligned(void const* p) {
  return reinterpret_cast<std::uintptr_t>(p) % memory::alignment == 0;
}

constexpr char const* rule = "sort: scratch >= sort_scratch(n)";

// As a library function: a size function, and the memory by value.
std::size_t sort_scratch(std::int64_t n) {
  return moe::memory_size{}.add<double>(n).add<char>(n).bytes();
}
double* sort(std::int64_t n, memory scratch, moe::call_site site = moe::call_site::here()) {
  double* const piece = scratch.take<double>(n, rule, site);
  scratch.take<char>(n, rule, site);
  return piece;
}

}  // namespace

TEST_CASE("core/memory: pieces are aligned, apart, and inside") {
  moe::buffer const owner(4096);
  memory scratch = owner;
  auto* const a = scratch.take<char>(3, "", {});
  auto* const b = scratch.take<double>(5, "", {});
  auto* const c = scratch.take<std::int32_t>(1, "", {});
  for (void const* p : {static_cast<void*>(a), static_cast<void*>(b), static_cast<void*>(c)})
    CHECK(aligned(p));
  CHECK(reinterpret_cast<std::byte*>(a) == owner.data());
  CHECK(reinterpret_cast<std::byte*>(b) == owner.data() + 64);
  CHECK(reinterpret_cast<std::byte*>(c) == owner.data() + 128);
  CHECK(scratch.size() == 4096 - 132);
  CHECK(scratch.data() == owner.data() + 132);
}

TEST_CASE("core/memory: the size function is enough from any address, and pieces stay inside") {
  std::mt19937 random(3);
  std::vector<std::byte> block(1 << 16);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::int64_t> counts(random() % 6);
    moe::memory_size size;
    for (auto& n : counts) {
      n = static_cast<std::int64_t>(random() % 100);
      size.add<double>(n).add<char>(n);
    }
    memory scratch(block.data() + random() % 200, size.bytes());
    std::byte const* const end = scratch.data() + scratch.size();
    std::byte const* before = scratch.data();
    for (auto const n : counts) {
      auto* const d = scratch.take<double>(n, rule, {});
      auto* const c = scratch.take<char>(n, rule, {});
      if (n == 0) continue;
      REQUIRE(aligned(d));
      REQUIRE(aligned(c));
      REQUIRE(reinterpret_cast<std::byte*>(d) >= before);
      REQUIRE(reinterpret_cast<std::byte*>(c) >= reinterpret_cast<std::byte*>(d + n));
      before = reinterpret_cast<std::byte*>(c + n);
      REQUIRE(before <= end);
    }
  }
}

TEST_CASE("core/memory: too little is refused with the bytes") {
  moe::buffer const owner(100);
  memory scratch = owner;
  scratch.take<char>(10, rule, {});
  std::string text;
  int const line = __LINE__ + 2;
  try {
    scratch.take<float>(10, rule, moe::call_site::here());
  } catch (moe::precondition_error const& e) {
    text = e.what();
  }
  CHECK(text == std::string(rule) + "; got bytes needed = 94, bytes left = 90 (called at " +
                    __FILE__ + ":" + std::to_string(line) + ")");
  CHECK(scratch.size() == 90);  // unchanged
  CHECK(scratch.take<float>(9, rule, {}) != nullptr);
  CHECK(scratch.size() == 0);
}

TEST_CASE("core/memory: nothing is taken from nothing, and one element is refused") {
  memory none;
  CHECK_NOTHROW(none.take<double>(0, rule, {}));
  CHECK_THROWS_AS(none.take<char>(1, rule, {}), moe::precondition_error);
  std::byte odd[3];
  memory small(odd + 1, 0);
  CHECK_NOTHROW(small.take<double>(0, rule, {}));
}

TEST_CASE("core/memory: counts below 0 or beyond all memory do not wrap around") {
  moe::buffer const owner(1024);
  memory scratch = owner;
  std::int64_t const quarter = std::int64_t{1} << 62;  // times 4 is 0 in 64 bits
  for (std::int64_t const count :
       {std::int64_t{-1}, -quarter, quarter, quarter + 1, std::numeric_limits<std::int64_t>::max(),
        std::numeric_limits<std::int64_t>::min()}) {
    CAPTURE(count);
    CHECK_THROWS_AS(scratch.take<std::int32_t>(count, rule, {}), moe::precondition_error);
    CHECK_THROWS_AS(scratch.take<double>(count, rule, {}), moe::precondition_error);
  }
  CHECK(scratch.size() == 1024);
}

TEST_CASE("core/memory: passed by value it is free again after the call") {
  moe::buffer const owner(sort_scratch(10));
  double* const first = sort(10, owner);
  CHECK(sort(10, owner) == first);
  memory const scratch = owner;
  CHECK(sort(10, scratch) == first);
  CHECK(scratch.size() == owner.size());
  CHECK_THROWS_WITH_AS(sort(100, owner), doctest::Contains("memory_test.cpp:"),
                       moe::precondition_error);
}

TEST_CASE("core/memory: a buffer moves, and the one it came from is empty") {
  static_assert(!std::is_copy_constructible_v<moe::buffer>);
  moe::buffer a(128);
  std::byte* const data = a.data();
  CHECK(aligned(data));
  moe::buffer b = std::move(a);
  CHECK(b.data() == data);
  CHECK(b.size() == 128);
  CHECK(a.size() == 0);
  CHECK(memory(a).size() == 0);
  CHECK(moe::buffer().data() == nullptr);
  moe::buffer c(1);
  c = std::move(b);
  CHECK(c.data() == data);
  CHECK(memory(c).size() == 128);
  moe::buffer const empty(0);
  CHECK(empty.size() == 0);
}

TEST_CASE("core/memory: a null pointer has no bytes") {
  memory nowhere(nullptr, 100);
  CHECK(nowhere.size() == 0);
  CHECK_THROWS_WITH_AS(nowhere.take<int>(1, "f: scratch", {}), doctest::Contains("bytes left = 0"),
                       moe::precondition_error);
}

TEST_CASE("core/memory: sizes are constants where the shape is") {
  static_assert(moe::memory_size{}.bytes() == 0);
  static_assert(moe::memory_size{}.add<float>(16).bytes() >= 64);
}
