#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <vector>

#include <moe/gate/biased.hpp>
#include <moe/gate/candidates.hpp>
#include <moe/gate/fixed_experts.hpp>
#include <moe/gate/gate.hpp>
#include <moe/gate/group_limited.hpp>
#include <moe/gate/learned_noise.hpp>
#include <moe/gate/relu_normalised.hpp>
#include <moe/gate/route.cuh>
#include <moe/gate/route.hpp>
#include <moe/gate/score.hpp>
#include <moe/gate/select.hpp>
#include <moe/gate/top_p.hpp>
#include <moe/gate/weigh.hpp>

#include "emulator/emulated_gpu.hpp"
#include "emulator/gate_bits.hpp"
#include "support/random.hpp"

namespace {

using moe_test::check_bits;
using moe_test::in_sub_warps;
using moe_test::in_whole_block;

/// A row in a thread, in parts of a warp, and in a block.
template <class Gate>
void check_homes(Gate const& gate, int least = 1) {
  auto const from = [least](std::vector<int> const& sizes) {
    std::vector<int> kept;
    for (int const E : sizes)
      if (E >= least) kept.push_back(E);
    return kept;
  };
  check_bits<in_sub_warps<1, 8, 32>>(gate, from({1, 2, 8}));
  check_bits<in_sub_warps<8, 8>>(gate, from({1, 8, 31, 33, 60, 64}));
  check_bits<in_sub_warps<32, 8>>(gate, from({1, 31, 33, 160, 256}));
  check_bits<in_whole_block<6, 96>>(gate, from({1, 33, 60, 576}));
}

template <class Select>
using grouped = moe::biased<moe::group_limited<Select>>;

/// `route` on the emulator against `route` on the CPU, forward and backward.
template <class Gate>
void check_route(Gate const& gate, std::int64_t T, int E, moe::batch const& tokens) {
  CAPTURE(E);
  auto const logits = moe_test::normals<float>(T * E, 7);
  moe::matrix_view const in(logits, T, E);
  int const K = gate.k();
  auto const dweight = moe_test::normals<float>(T * K, 8);
  moe::cpu const cpu;
  moe::buffer const scratch(moe::route_scratch<Gate>(cpu, E));
  moe::routing_buffer expected(T, K, E), found(T, K, E);
  std::vector<float> dexpected(logits.size()), dfound(logits.size());
  moe::route(cpu, gate, in, tokens, scratch, expected);
  moe::route_backward(cpu, gate, in, expected, moe::matrix_view(dweight, T, K), {}, scratch,
                      moe::matrix_view(dexpected, T, E));
  moe_test::on_emulator([&](moe_test::emulated_gpu const& exec) {
    moe::route(exec, gate, in, tokens, {}, found);
    moe::route_backward(exec, gate, in, found, moe::matrix_view<float const>(dweight, T, K), {}, {},
                        moe::matrix_view(dfound, T, E));
    int different = 0;
    for (std::int64_t i = 0; i < T * K; ++i)
      different +=
          found.expert[i] == expected.expert[i] && found.weight[i] == expected.weight[i] ? 0 : 1;
    CHECK(different == 0);
    CHECK(dfound == dexpected);
  });
}

}  // namespace

TEST_CASE("gate/policies on lanes: selection by bias and groups gives the bits of an array") {
  auto const bias = moe_test::normals<float>(576, 4, 0, 0.5);
  check_homes(moe::gate<moe::sigmoid, grouped<moe::top_k<8>>, moe::scaled<moe::renormalised>>{
      .select = {{8, 4, 2}, bias.data()}, .weigh = {2.5f, {.floor = 0, .added = 1e-20f}}});
  check_homes(moe::gate<moe::softmax, moe::group_limited<moe::top_k<6>>, moe::as_scored>{
      .select = {8, 3, 1}});
  check_homes(moe::gate<moe::identity, moe::group_limited<moe::top_k<4>>, moe::as_scored>{
      .select = {5, 2, 3}});
}

TEST_CASE("gate/policies on lanes: sqrt_softplus, a bias of the logits, zero experts") {
  auto const bias = moe_test::normals<float>(576, 5);
  check_homes(
      moe::gate<moe::sqrt_softplus, moe::biased<moe::top_k<6>>, moe::scaled<moe::renormalised>>{
          .select = {{}, bias.data()}});
  check_homes(moe::gate<moe::logit_bias<moe::identity>, moe::top_k<4>, moe::softmax_of_selected>{
      .score = {{}, bias.data()}});
  check_homes(
      moe::gate<moe::softmax, moe::top_k<2>, moe::without<moe::renormalised>>{.weigh = {3, 9, {}}});
}

TEST_CASE("gate/policies on lanes: shares, tables, hashes") {
  check_homes(
      moe::gate<moe::softmax, moe::top_p<4>, moe::renormalised>{.select = moe::top_p<4>(0.5f)});
  std::vector<std::int32_t> const table{5, 1, 0, 2, 7, 3}, word{0, 2};
  check_homes(moe::gate<moe::sqrt_softplus, moe::by_table<4>, moe::renormalised>{
      .select = moe::by_table<4>({table.data(), 3, 2}, word.data())});
  check_homes(moe::gate<moe::identity, moe::by_hash<2>, moe::constant_weight>{}, 2);
}

TEST_CASE("gate/policies on lanes: lists and masks of the token") {
  std::vector<std::int64_t> const begin{0, 2, 9};  // the token has row 1
  std::vector<std::int32_t> const expert{0, 1, 30, 7, 2, 2, -1, 999, 0};
  check_homes(moe::gate<moe::softmax, moe::listed<moe::top_k<2>>, moe::renormalised>{
      .select = {{}, begin.data(), expert.data()}});
  std::vector<std::uint8_t> const mask{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1};
  check_bits<in_sub_warps<8, 1>>(
      moe::gate<moe::softmax, moe::visible_to<moe::top_k<2>>, moe::renormalised>{
          .select = {{}, {mask.data(), 2, 8}, nullptr}},
      {8});
}

TEST_CASE("gate/policies on lanes: learned noise, and logits on the unit sphere") {
  for (int const E : {8, 31, 60}) {
    auto const width = moe_test::normals<float>(2 * E, 6);
    check_bits<in_sub_warps<8, 8>>(
        moe::gate<moe::learned_noise<moe::identity>, moe::top_k<4>, moe::softmax_of_selected>{
            .score = {.width = {width.data(), 2, E}}},
        {E});
    auto logits = moe_test::tied_logits(E, 3);
    logits.insert(logits.begin(), static_cast<std::size_t>(E), 0.0f);
    check_bits<in_sub_warps<32, 8>>(
        moe::gate<moe::relu_normalised<>, moe::top_k<4>, moe::as_scored>{
            .score = {2, {logits.data(), 2, E}}},
        {E});
  }
}

TEST_CASE("gate/policies on kernels: route and its gradient are those of the CPU") {
  auto const bias = moe_test::normals<float>(513, 4, 0, 0.5);
  moe::gate<moe::sigmoid, grouped<moe::top_k<8>>, moe::scaled<moe::renormalised>> const v3{
      .select = {{8, 4, 2}, bias.data()}};
  for (int const E : {8, 60, 256, 513}) check_route(v3, 9, E, {});

  constexpr std::int64_t T = 12;
  constexpr int E = 40;
  std::vector<std::int64_t> begin{0};
  std::vector<std::int32_t> expert;  // lists of different lengths beside each other in a warp
  for (int t = 0; t < T; ++t) {
    for (int i = 0; i < t * 3; ++i) expert.push_back(i * 7 % E);
    begin.push_back(static_cast<std::int64_t>(expert.size()));
  }
  check_route(
      moe::gate<moe::softmax, moe::listed<moe::top_k<2>>, moe::renormalised>{
          .select = {{}, begin.data(), expert.data()}},
      T, E, {});
  begin.clear();
  for (int t = 0; t <= T; ++t) begin.push_back(t * 2);
  check_route(
      moe::gate<moe::softmax, moe::listed<moe::top_k<2>>, moe::renormalised>{
          .select = {{}, begin.data(), expert.data()}},
      T, 6, {});
  auto const width = moe_test::normals<float>(T * E, 6);
  check_route(
      moe::gate<moe::learned_noise<moe::identity>, moe::top_k<4>, moe::softmax_of_selected>{
          .score = {.width = {width.data(), T, E}}},
      T, E, {.seed = 4, .training = true});
  auto const logits = moe_test::normals<float>(T * E, 7);  // those of check_route
  check_route(
      moe::gate<moe::relu_normalised<>, moe::top_k<4>, moe::as_scored>{
          .score = {2, {logits.data(), T, E}}},
      T, E, {});
}
