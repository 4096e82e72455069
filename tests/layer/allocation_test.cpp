// Layers allocate nothing once they are made: counted in operator new of the whole program.
// SPDX-License-Identifier: MIT
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <doctest/doctest.h>
#include <new>
#include <vector>

#include <moe/core/thread_team.hpp>
#include <moe/expert/packed_ffn.hpp>
#include <moe/gate/presets.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/residual_layer.hpp>

#include "case.hpp"

namespace {

std::atomic<long> allocations{0};

// Not inlined, below: where new is but delete is not, compilers warn of a mismatch.
void* allocate(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  std::size_t const whole = (bytes + alignment) / alignment * alignment;
  void* const data = std::aligned_alloc(alignment, whole);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

[[gnu::noinline]] void* operator new(std::size_t bytes) {
  return allocate(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes) {
  return allocate(bytes, alignof(std::max_align_t));
}
[[gnu::noinline]] void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<std::size_t>(alignment));
}
[[gnu::noinline]] void operator delete(void* data) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete[](void* data) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete(void* data, std::size_t) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete[](void* data, std::size_t) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete(void* data, std::align_val_t) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete[](void* data, std::align_val_t) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete(void* data, std::size_t, std::align_val_t) noexcept {
  std::free(data);
}
[[gnu::noinline]] void operator delete[](void* data, std::size_t, std::align_val_t) noexcept {
  std::free(data);
}

namespace {

struct looking {
  double sum = 0;
  void loss_sums(moe::vector_view<double> sums) { sum += sums[0]; }
  void rows_out(moe::matrix_view<float const> rows) { sum += rows.rows() > 0 ? rows(0, 0) : 0; }
};

/// Allocations of a step: forward, with hooks too, and backward.
template <class Case>
long allocations_of_step(Case& c) {
  long const before = allocations;
  looking hooks;
  c.forward(hooks);
  c.forward();
  c.backward({.balance = 0.1, .z = 0.1}, moe::update::assign);
  c.backward({.balance = 0.1, .z = 0.1}, moe::update::add);
  return allocations - before;
}

}  // namespace

TEST_CASE("layer: a step allocates nothing, with any number of threads") {
  moe::layer_shape const shape{.T = 90, .M = 24, .H = 40, .E = 5, .bias = true, .z_loss = true};
  for (int threads : {1, 3}) {
    moe::thread_team team(threads);
    moe_test::for_each_preset([&](char const*, auto const& preset) {
      auto const experts = moe_test::experts_for<moe::swiglu>(preset, {}, threads == 3);
      for (auto const mix : {moe::residual_mix::add, moe::residual_mix::learned}) {
        moe::residual_layer const layer(preset, experts, shape, mix);
        moe_test::owned_layer<float, std::remove_cv_t<decltype(layer)>> c(layer, 90, 3, team);
        CHECK(allocations_of_step(c) == 0);  // the first step, too
      }
    });
  }
  long const before = allocations;
  ::operator delete(::operator new(8));
  long const counted = allocations - before;
  CHECK(counted == 1);  // the counter counts
}

TEST_CASE("layer: inference over packed experts allocates nothing") {
  moe::layer_shape const shape{.T = 50, .M = 24, .H = 40, .E = 5};
  moe::moe_layer const layer(moe::tutel_topk({.k = 2}), moe::packed_ffn<moe::swiglu, moe::bf16>{},
                             shape);
  std::vector<float> values(static_cast<std::size_t>(layer.parameter_elements()), 0.0f);
  std::vector<float> const x(50 * 24, 1.0f);
  std::vector<float> out(x.size());
  auto const parameters = layer.carve(values.data());
  for (int threads : {1, 3}) {
    moe::thread_team team(threads);
    moe::buffer const saved_bytes(layer.saved_bytes<float>());
    moe::buffer const scratch(layer.scratch_bytes<float>(team));
    auto saved = layer.carve_saved<float>(saved_bytes);
    long const before = allocations;
    layer.forward<float>(team, parameters, {x.data(), 50, 24}, {}, {out.data(), 50, 24}, saved,
                         scratch);
    CHECK(allocations - before == 0);
  }
}
