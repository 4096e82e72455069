#include <cstdio>

#include <moe/comm/nccl.cuh>
#include <moe/moe.hpp>

static_assert(MOE_VERSION == MOE_EXPECTED_VERSION);

int main() {
  // Without a GPU NCCL makes no communicator, and moe none of it.
  try {
    moe::nccl_communicator const comm(nullptr, nullptr);
    std::puts("a communicator of nothing");
    return 1;
  } catch (moe::precondition_error const& e) {
    std::puts(e.what());
  }
}
