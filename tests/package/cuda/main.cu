#include <cstdio>

#include <moe/moe.cuh>

static_assert(MOE_VERSION == MOE_EXPECTED_VERSION);

int main() {
  try {
    moe::gpu const exec;
    std::printf("a GPU of %d multiprocessors\n", exec.processors());
  } catch (moe::cuda_error const& e) {
    std::printf("%s\n", e.what());
  }
}
