// Heads on several ranks equal a layer for each head on one, forward and backward.
// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <numeric>
#include <support/counted.hpp>
#include <support/disturbed.hpp>
#include <support/random.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>
#include <moe/core/thread_team.hpp>
#include <moe/expert/activation.hpp>
#include <moe/layer/head_parallel.hpp>
#include <moe/layer/moe_layer.hpp>
#include <moe/layer/residual_layer.hpp>

#include "layer/case.hpp"

namespace {

using namespace std::chrono_literals;
using moe_test::experts_for;
using moe_test::same_bits;
constexpr moe::loss_weights by{.balance = 0.7, .z = 0.3};
constexpr std::int64_t width = 6;

std::size_t at(std::int64_t i) {
  return static_cast<std::size_t>(i);
}
moe::deadline late() {
  return moe::within(60s);
}
moe::layer_shape shape_of(std::int64_t T) {
  return {.T = T, .M = width, .H = 5, .E = 4, .bias = true, .z_loss = true};
}

/// Tokens of all ranks with all heads, and what a layer for each head makes of them on one rank.
template <class V, class Layer>
struct all_heads {
  Layer layer;  ///< Of one head.
  int heads;
  std::int64_t T, W;
  std::vector<V> parameters, gradients, tokens, dout, out, dtokens;
  std::vector<std::uint8_t> live;
  std::vector<moe::layer_losses> losses;

  all_heads(Layer const& made, int count, std::int64_t tokens_of_all)
      : layer(made),
        heads(count),
        T(tokens_of_all),
        W(heads * width),
        parameters(moe_test::normals<V>(heads * layer.parameter_elements(), 1, 0, 0.5)),
        gradients(parameters.size(), V(1e30)),
        tokens(moe_test::normals<V>(T * W, 2)),
        dout(moe_test::normals<V>(T * W, 3)),
        out(tokens.size()),
        dtokens(tokens.size()),
        live(at(T), 1) {
    for (std::int64_t t = 4; t < T; t += 9) live[at(t)] = 0;
    moe::cpu const exec;
    moe::buffer const saved_bytes(layer.template saved_bytes<V>());
    moe::buffer const scratch(layer.template scratch_bytes<V>(exec));
    auto saved = layer.template carve_saved<V>(saved_bytes);
    for (int h = 0; h < heads; ++h) {
      auto const head = [&](std::vector<V>& of) {
        std::vector<V> columns;  // contiguous
        for (std::int64_t t = 0; t < T; ++t)
          columns.insert(columns.end(), of.begin() + t * W + h * width,
                         of.begin() + t * W + (h + 1) * width);
        return columns;
      };
      auto x = head(tokens), d = head(dout), y = x, dx = x;
      auto const own = layer.carve(parameters.data() + h * layer.parameter_elements());
      auto const gradient = layer.carve(gradients.data() + h * layer.parameter_elements());
      moe::batch ids = batch_of(0);
      ids.seed += static_cast<std::uint64_t>(h) * 0x9e3779b97f4a7c15;
      auto const view = [&](std::vector<V>& of) { return moe::matrix_view<V>(of, T, width); };
      losses.push_back(layer.forward(exec, own, view(x), ids, view(y), saved, scratch));
      layer.backward(exec, own, view(x), view(d), by, saved, view(dx), gradient,
                     moe::update::assign, scratch);
      for (std::int64_t t = 0; t < T; ++t) {
        std::copy_n(y.begin() + t * width, width, out.begin() + t * W + h * width);
        std::copy_n(dx.begin() + t * width, width, dtokens.begin() + t * W + h * width);
      }
    }
  }
  /// Of the tokens from `first` on.
  moe::batch batch_of(std::int64_t first) const {
    return {.first_id = 11 + first,
            .seed = 5,
            .step = 3,
            .training = true,
            .live = live.data() + first};
  }
};

/// Whether rank comm.rank() of those that have counts [R] of the tokens gets what one rank does.
template <class V, class Layer, class C>
bool equals(C& comm, all_heads<V, Layer> const& whole, std::vector<std::int64_t> const& counts,
            moe::cpu const& exec, bool equal = false) {
  std::int64_t const first =
      std::accumulate(counts.begin(), counts.begin() + comm.rank(), std::int64_t{0});
  std::int64_t const T = counts[at(comm.rank())], W = whole.W;
  moe::head_parallel heads(whole.layer, whole.heads, comm);
  if (equal)
    heads.bind_equal(T);
  else if (!heads.bind(T, late()))
    return false;
  auto const n = heads.parameter_elements();
  std::vector<V> const parameters(whole.parameters.begin() + comm.rank() * n,
                                  whole.parameters.begin() + (comm.rank() + 1) * n);
  std::vector<V> gradients(parameters.size(), V(0.25)),
      x(whole.tokens.begin() + first * W, whole.tokens.begin() + (first + T) * W),
      d(whole.dout.begin() + first * W, whole.dout.begin() + (first + T) * W), out(x.size()),
      dx(x.size());
  moe::buffer const saved_bytes(heads.template saved_bytes<V>());
  moe::buffer const scratch(heads.template scratch_bytes<V>(exec, T));
  auto saved = heads.template carve_saved<V>(saved_bytes);
  moe::layer_losses const losses = heads.template forward<V>(
      exec, parameters, {x, T, W}, whole.batch_of(first), {out, T, W}, saved, scratch);
  auto const backward = [&](moe::update how) {
    heads.template backward<V>(exec, parameters, {d, T, W}, by, saved, {dx, T, W}, gradients, how,
                               scratch);
  };
  backward(moe::update::assign);
  std::vector<V> const once = gradients;
  backward(moe::update::add);
  bool accumulates = true;
  for (std::size_t i = 0; i < once.size(); ++i)
    accumulates =
        accumulates && std::abs(gradients[i] - 2 * once[i]) <= V(1e-5) * (1 + std::abs(once[i]));
  moe::layer_losses sum;
  for (int h = heads.first_head(); h < heads.first_head() + heads.own_heads(); ++h) {
    sum.balance += whole.losses[at(h)].balance;
    sum.z += whole.losses[at(h)].z;
  }
  auto const part = [](std::vector<V> const& of, std::int64_t from, std::int64_t count) {
    return std::vector<V>(of.begin() + from, of.begin() + from + count);
  };
  return same_bits(out, part(whole.out, first * W, T * W)) &&
         same_bits(dx, part(whole.dtokens, first * W, T * W)) &&
         same_bits(once, part(whole.gradients, comm.rank() * n, n)) && accumulates &&
         sum.balance == losses.balance && sum.z == losses.z;
}

/// Parts of 24 tokens.
std::vector<std::vector<std::int64_t>> const parts = {
    {24}, {12, 12}, {24, 0}, {5, 19}, {8, 8, 8}, {0, 23, 1}, {6, 6, 6, 6}, {7, 0, 16, 1}};

template <class V, class Layer>
void check_all(Layer const& layer, int heads) {
  all_heads<V, Layer> const whole(layer, heads, 24);
  for (auto const& counts : parts) {
    int const R = static_cast<int>(counts.size());
    if (heads % R != 0) continue;
    CAPTURE(R);
    bool const equal = std::count(counts.begin(), counts.end(), counts[0]) == R;
    std::vector<char> right(counts.size());
    moe::thread_world world(R);
    world.run([&](moe::thread_communicator& inner) {
      moe_test::disturbed comm(inner, static_cast<unsigned>(inner.rank()) + 1);
      right[at(comm.rank())] = equals(comm, whole, counts, {}, equal);
    });
    CHECK(right == std::vector<char>(counts.size(), true));
  }
}

}  // namespace

TEST_CASE("layer/head_parallel: ranks equal one rank to the bit, whatever the preset") {
  // With noise, overflow and masks: a head sees the tokens of all ranks in their order.
  moe_test::for_each_preset([&](char const* name, auto const& preset) {
    CAPTURE(std::string(name));
    moe::moe_layer const layer(preset, experts_for<moe::swiglu>(preset), shape_of(24));
    check_all<float>(layer, 12);
  });
}

TEST_CASE("layer/head_parallel: several heads, in double, of residual layers, and one rank") {
  auto const preset = moe::tutel_topk({.k = 2, .capacity_factor = 0});
  for (int const heads : {1, 2, 3, 4, 8})
    check_all<double>(moe::moe_layer(preset, moe::ffn<moe::gelu>{}, shape_of(30)), heads);
  moe::residual_layer const residual(preset, moe::ffn<moe::gelu>{}, shape_of(24),
                                     moe::residual_mix::learned);
  check_all<double>(residual, 6);
  all_heads<double, std::remove_cv_t<decltype(residual)>> const whole(residual, 5, 24);
  moe::self_communicator self;
  moe::thread_team team(3);
  CHECK(equals(self, whole, {24}, team));
}

TEST_CASE("layer/head_parallel: no tokens") {
  auto const preset = moe::tutel_topk({.k = 2, .capacity_factor = 0});
  moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(24));
  all_heads<double, std::remove_cv_t<decltype(layer)>> const whole(layer, 2, 0);
  moe::thread_world world(2);
  std::vector<char> right(2);
  world.run([&](moe::thread_communicator& comm) {
    right[at(comm.rank())] = equals(comm, whole, {0, 0}, {});
  });
  CHECK(right == std::vector<char>(2, true));
}

TEST_CASE(
    "layer/head_parallel: what is sent depends on the tokens alone, not on K or the routing") {
  constexpr int R = 4, heads = 8;
  constexpr std::int64_t T = 24;
  std::vector<std::int64_t> const counts{7, 0, 16, 1};
  for (int const k : {1, 2, 4}) {
    auto const preset = moe::tutel_topk({.k = k, .capacity_factor = 0});
    moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(T));
    all_heads<float, std::remove_cv_t<decltype(layer)>> const whole(layer, heads, T);
    std::vector<std::int64_t> bytes(R);
    moe::thread_world world(R);
    world.run([&](moe::thread_communicator& inner) {
      moe_test::counted comm(inner, moe::topology::even(1, R));
      if (equals(comm, whole, counts, {})) bytes[at(comm.rank())] = comm.within_nodes.bytes;
    });
    for (int r = 0; r < R; ++r) {
      std::int64_t const n = counts[at(r)];
      std::int64_t const own_width = heads / R * width * std::int64_t{sizeof(float)};
      // Its tokens' other heads, three times (tokens; dout twice); its heads of the others' as often back;
      // tags; and its number of tokens.
      std::int64_t const expected =
          3 * (R - 1) * n * own_width + 3 * (T - n) * own_width + (R - 1) * n * 16 + (R - 1) * 8;
      CHECK(bytes[at(r)] == expected);
    }
  }
}

TEST_CASE("layer/head_parallel: a rank that dies, in any exchange") {
  constexpr int R = 3;
  auto const preset = moe::tutel_topk({.k = 2, .capacity_factor = 0});
  moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(24));
  all_heads<float, std::remove_cv_t<decltype(layer)>> const whole(layer, R, 24);
  // bind, tokens, tags, what the heads made, and twice two of backward.
  for (int calls = 0; calls < 8; ++calls) {
    std::vector<int> status(R, -1);
    auto const start = std::chrono::steady_clock::now();
    moe::thread_world world(R);
    CHECK_THROWS_AS(world.run([&](moe::thread_communicator& inner) {
      moe_test::disturbed comm(inner, static_cast<unsigned>(calls + inner.rank()),
                               inner.rank() == 1 ? calls : 1 << 30);
      try {
        if (!equals(comm, whole, {8, 8, 8}, {})) status[at(comm.rank())] = -2;
      } catch (moe::exchange_error const& error) {
        status[at(comm.rank())] = error.status();
      }
    }),
                    moe_test::rank_died);
    CHECK(std::chrono::steady_clock::now() - start < 30s);
    for (int const r : {0, 2})
      CHECK(status[at(r)] ==
            (calls == 0 ? -2 : static_cast<int>(moe::exchange_status::peer_failed)));
  }
}

TEST_CASE("layer/head_parallel: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  auto const preset = moe::tutel_topk({.k = 2, .capacity_factor = 0});
  moe::moe_layer const layer(preset, moe::ffn<moe::gelu>{}, shape_of(8));
  moe::self_communicator self;
  says(refusal([&] { moe::head_parallel(layer, 0, self); }),
       "head_parallel: heads >= 1, a multiple of R; got heads = 0, R = 1");
  moe::thread_world world(2);
  auto end = world.communicator(0);
  says(refusal([&] { moe::head_parallel(layer, 3, end); }), "got heads = 3, R = 2");

  moe::head_parallel heads(layer, 2, self);
  moe::cpu const exec;
  moe::buffer const saved_bytes(heads.saved_bytes<float>());
  moe::buffer const scratch(heads.scratch_bytes<float>(exec, 8));
  auto saved = heads.carve_saved<float>(saved_bytes);
  std::vector<float> p(at(heads.parameter_elements())), g(p), x(8 * 2 * width), y(x);
  auto const forward = [&](moe::matrix_view<float const> tokens, moe::matrix_view<float> out,
                           moe::memory room, moe::vector_view<float const> parameters) {
    return refusal([&] { heads.forward<float>(exec, parameters, tokens, {}, out, saved, room); });
  };
  auto const backward = [&] {
    return refusal([&] {
      heads.backward<float>(exec, p, {x, 8, 12}, {}, saved, {y, 8, 12}, g, moe::update::assign,
                            scratch);
    });
  };
  says(forward({x, 8, 12}, {y, 8, 12}, scratch, p), "head_parallel: as many tokens as are bound");
  says(refusal([&] { heads.bind_equal(9); }),
       "the layer has room for all ranks' tokens; got tokens of all ranks = 9, most = 8");
  says(refusal([&] { static_cast<void>(heads.bind(-1, late())); }), "bind: T >= 0; got T = -1");
  heads.bind_equal(8);
  says(backward(), "saved was filled by a forward");
  says(forward({x, 7, 12}, {y, 7, 12}, scratch, p), "as many tokens as are bound; got rows = 7");
  says(forward({x, 8, 11}, {y, 8, 11}, scratch, p), "both sides are [T, heads * width]");
  says(forward({x, 8, 12}, {x, 8, 12}, scratch, p), "apart");
  says(forward({x, 8, 12}, {y, 8, 12}, scratch, {p.data(), 3}),
       "parameters are [parameter_elements()]; got size = 3");
  says(refusal([&] { heads.carve_saved<float>({saved_bytes.data(), 100}); }),
       "head_parallel::carve_saved: memory holds saved_bytes()");
  CHECK(forward({x, 8, 12}, {y, 8, 12}, scratch, p) == "nothing was thrown");
  CHECK(backward() == "nothing was thrown");
  heads.bind_equal(8);
  says(backward(), "nothing bound since");
  says(forward({x, 8, 12}, {y, 8, 12}, {scratch.data(), 100}, p),
       "head_parallel: scratch >= scratch_bytes<V>(exec, T)");
}
