#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <doctest/doctest.h>
#include <string>
#include <vector>

#include <moe/core/gpu.cuh>

#include "support/device.cuh"

namespace {

/// out[i] += in[i]: each block has `threads` elements.
struct add_kernel {
  static constexpr int threads = 64;
  struct shared {
    int value[threads];
  };

  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, int const* in, int* out, int n) const {
    int const i = b.block() * threads + b.thread();
    b.wait_for_previous();
    b.let_next_start();
    s.value[threads - 1 - b.thread()] = i < n ? in[i] : 0;
    b.sync();
    if (i < n) out[i] += s.value[threads - 1 - b.thread()];
  }
};

/// What each call of thread_block gives to the thread that makes it, as the emulator's test has it.
struct calls_kernel {
  static constexpr int threads = 64;
  struct shared {};
  static constexpr int results = 9;

  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, std::int32_t* counter, double* out) const {
    b.wait_for_previous();
    int const t = b.thread();
    int const lane = t % 32;
    double* const r = out + results * (b.block() * threads + t);
    std::uint32_t const eighth = 0xffu << lane / 8 * 8;
    r[0] = b.shuffle(moe::all_lanes, t, (lane + 5) % 32);
    r[1] = b.shuffle_xor(moe::all_lanes, t, 8);
    r[2] = b.shuffle_up(moe::all_lanes, t, 3);
    r[3] = b.shuffle(moe::all_lanes, 0.5 * t, 31);
    r[4] = b.ballot(moe::all_lanes, t % 2 == 1);
    r[5] = b.match_any(moe::all_lanes, lane % 3 - 1);
    r[6] = b.highest(eighth, 0x80000000u + static_cast<unsigned>(lane * 5 % 8));
    r[7] = b.blocks();
    b.sync();
    r[8] = t == 0 ? b.arrive(counter) : 0;
  }
};

}  // namespace

TEST_CASE("core/gpu: no device is an exception that says so") {
  if (moe_test::why_no_gpu() == nullptr) return;
  std::string text;
  try {
    moe::gpu const exec;
  } catch (moe::cuda_error const& e) {
    text = e.what();
    CHECK(e.code() != cudaSuccess);
  }
  CHECK(text.find("gpu: cudaError") == 0);
  CHECK(text.find("gpu_test.cu:") != std::string::npos);
  CHECK_THROWS_AS(moe::gpu_buffer(64), moe::cuda_error);
  CHECK_NOTHROW(moe::gpu_buffer(0));
}

TEST_CASE("core/gpu: launches follow one another, in a stream and in a graph") {
  MOE_NEEDS_GPU();
  int const n = 10000;
  std::vector<int> values(n);
  for (int i = 0; i < n; ++i) values[static_cast<std::size_t>(i)] = 3 * i + 1;
  moe_test::on_device<int> const in(values);
  auto const enqueue = [&](moe::gpu const& exec, int* first, int* second) {
    exec.fill(first, 0, n * sizeof(int));
    exec.launch("test", add_kernel{}, (n + 63) / 64, moe::call_site::here(), in.data(), first, n);
    for (int i = 0; i < 5; ++i)  // each reads what the one before wrote
      exec.launch("test", add_kernel{}, (n + 63) / 64, moe::call_site::here(),
                  static_cast<int const*>(first), second, n);
    exec.launch("test", add_kernel{}, 0, moe::call_site::here(), in.data(), second, n);
  };
  moe_test::on_device<int> const a(values.size()), b(values.size());
  enqueue(moe::gpu(), a.data(), b.data());
  auto const once = b.get();
  moe_test::replay_as_graph([&](moe::gpu const& exec) { enqueue(exec, a.data(), b.data()); }, 2);
  auto const thrice = b.get();
  for (std::size_t i = 0; i < once.size(); ++i) {
    CHECK(once[i] == 5 * values[i]);
    CHECK(thrice[i] == 15 * values[i]);
  }
}

TEST_CASE("core/gpu: the hardware's calls give what the concept says") {
  MOE_NEEDS_GPU();
  constexpr int n = calls_kernel::results;
  moe_test::on_device<std::int32_t> const counter(1);
  moe_test::on_device<double> const out(2 * 64 * n);
  moe::gpu().launch("test", calls_kernel{}, 2, moe::call_site::here(), counter.data(), out.data());
  auto const found = out.get();
  CHECK(counter.get()[0] == 2);
  CHECK(found[8] + found[64 * n + 8] == 1);  // one block arrived before the other
  for (int i = 0; i < 2 * 64; ++i) {
    CAPTURE(i);
    int const t = i % 64, lane = t % 32, warp = t - lane;
    double const* const r = found.data() + n * i;
    CHECK(r[0] == warp + (lane + 5) % 32);
    CHECK(r[1] == warp + (lane ^ 8));
    CHECK(r[2] == (lane < 3 ? t : t - 3));
    CHECK(r[3] == 0.5 * (warp + 31));
    CHECK(r[4] == 0xAAAAAAAAu);
    CHECK(r[5] == (0x49249249u << lane % 3));
    CHECK(r[6] == 0x80000007u);
    CHECK(r[7] == 2);
  }
}

TEST_CASE("core/gpu: too many blocks are refused") {
  MOE_NEEDS_GPU();
  CHECK_THROWS_AS(
      moe::gpu().launch("test", add_kernel{}, std::int64_t{1} << 40, moe::call_site::here(),
                        static_cast<int const*>(nullptr), static_cast<int*>(nullptr), 0),
      moe::precondition_error);
}
