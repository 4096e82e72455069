// Compiles the rows of kernels as CUDA, with the built-in policies: they have to stay in registers.
// Never run: there was no GPU to run it on.
#include <cstdint>

#include <moe/core/lane_row.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/weigh.hpp>

namespace {

using mixtral = moe::gate<moe::softmax, moe::top_k<2>, moe::renormalised>;

/// A gate and the gradient of its scores for one token per sub-warp.
template <int Width, int Slots>
struct route_in_sub_warps {
  static constexpr int threads = 128;
  struct shared {};

  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared&, mixtral gate, float const* logits, int E,
                                  float* dlogits) const {
    moe::sub_warp<B, Width> lanes(b);
    std::int64_t const t = b.block() * std::int64_t(threads / Width) + b.thread() / Width;
    using row_type = moe::lane_row<moe::sub_warp<B, Width>, Slots>;
    row_type row(lanes, E, [=](int e) { return logits[t * E + e]; });
    moe::choices<2> chosen;
    gate(row, chosen, moe::token{});
    row_type grad(lanes, E, [](int) { return 0.0f; });
    chosen.each([&](int j) { grad.add(chosen.expert[j], chosen.weight[j]); });
    gate.score.backward(row, grad, moe::token{});
    grad.transform([=](int e, float d) { return dlogits[t * E + e] = d; });
  }
};

struct route_in_blocks {
  static constexpr int threads = 256;
  static constexpr int max_E = 4096;
  using shared = moe::row_exchange<max_E>;

  template <moe::thread_block B>
  MOE_HOST_DEVICE void operator()(B& b, shared& s, mixtral gate, float const* logits, int E,
                                  std::int32_t* expert) const {
    using lanes_type = moe::whole_block<B, max_E>;
    lanes_type lanes(b, s);
    std::int64_t const t = b.block();
    moe::lane_row<lanes_type, max_E / threads> row(lanes, E,
                                                   [=](int e) { return logits[t * E + e]; });
    moe::choices<2> chosen;
    gate(row, chosen, moe::token{});
    chosen.each([&](int j) {
      if (b.thread() == j) expert[2 * t + j] = chosen.expert[j];
    });
  }
};

}  // namespace

template __global__ void moe::run_kernel(route_in_sub_warps<8, 1>, mixtral, float const*, int,
                                         float*);
template __global__ void moe::run_kernel(route_in_sub_warps<32, 8>, mixtral, float const*, int,
                                         float*);
template __global__ void moe::run_kernel(route_in_sub_warps<32, 32>, mixtral, float const*, int,
                                         float*);
template __global__ void moe::run_kernel(route_in_blocks, mixtral, float const*, int,
                                         std::int32_t*);
