// Tests of dispatch and combine on a GPU, against the CPU.
// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <doctest/doctest.h>
#include <functional>
#include <memory>
#include <vector>

#include <moe/core/gpu.cuh>
#include <moe/dispatch/combine.cuh>
#include <moe/dispatch/dispatch.cuh>

#include "dispatch/movement_forms.hpp"
#include "support/device.cuh"

using namespace moe_test;

namespace {

/// Copies on the device, for as long as it lives; outputs come back by fetch().
class device_home {
 public:
  template <class S>
  moe::matrix_view<S const> in(matrix<S> const& m) {
    return m.view_at(copy(m.storage()).data());
  }
  moe::vector_view<float const> in(std::vector<float> const& v) {
    return {copy(v).data(), static_cast<std::int64_t>(v.size())};
  }
  template <class S>
  moe::matrix_view<S> out(matrix<S>& m) {
    return m.view_at(copy_back(m.storage()).data());
  }
  moe::vector_view<float> out(std::vector<float>& v) {
    return {copy_back(v).data(), static_cast<std::int64_t>(v.size())};
  }
  moe::routing_table table(slow_table const& s) {
    moe::routing_table table = s.table;
    table.row_of = copy(s.row_of).data();
    table.pair_of = copy(s.pair_of).data();
    table.counts = copy(std::vector{s.counts}).data();
    if (table.token_begin != nullptr) table.token_begin = copy(s.token_begin).data();
    return table;
  }
  void fetch() {
    for (auto const& f : fetch_) f();
    fetch_.clear();
  }

 private:
  template <class T>
  on_device<T>& copy(std::vector<T> const& values) {
    auto const array = std::make_shared<on_device<T>>(values);
    arrays_.push_back(array);
    return *array;
  }
  template <class T>
  on_device<T>& copy_back(std::vector<T>& values) {
    on_device<T>& array = copy(values);
    fetch_.push_back([&array, &values] { values = array.get(); });
    return array;
  }

  std::vector<std::shared_ptr<void>> arrays_;
  std::vector<std::function<void()>> fetch_;
};

template <class S>
void check_all(movement<S> const& m) {
  moe::gpu const exec;
  check_equal(all_dispatches(exec, m, device_home()), all_dispatches(cpu{}, m));
  check_equal(all_combines(exec, m, device_home()), all_combines(cpu{}, m));
}

}  // namespace

TEST_CASE_TEMPLATE("dispatch/gpu: every form, bitwise as on the CPU where dot products are exact",
                   S, float, bf16, half) {
  MOE_NEEDS_GPU();
  table_case const cases[] = {
      {.T = 0, .K = 2, .E = 4},
      {.T = 1, .K = 8, .E = 256},
      {.T = 60, .K = 2, .E = 8, .align = 128},
      {.T = 37, .K = 16, .E = 60, .dropped = 0.3},
      {.T = 50, .K = 7, .E = 33, .align = 16, .dropped = 0.1, .kinds = true, .variable = true},
      {.T = 50, .K = 4, .E = 4, .dropped = 1},
  };
  for (table_case const& c : cases)
    for (std::int64_t const M : {0, 1, 7, 8, 264, 2100})
      for (placing const at : {placing{}, placing{8, 16}, placing{1, 3}}) {
        CAPTURE(c.T);
        CAPTURE(c.K);
        CAPTURE(M);
        CAPTURE(at.gap);
        check_all(movement<S>(c, M, at, numbers::exact));
      }
}

TEST_CASE("dispatch/gpu: every form of a large problem") {
  MOE_NEEDS_GPU();
  check_all(movement<half>({.T = 1000, .K = 4, .E = 60, .align = 64}, 1000, {}, numbers::exact));
  check_all(movement<bf16>({.T = 1000, .K = 2, .E = 8}, 4096, {}, numbers::exact));
}

TEST_CASE("dispatch/gpu: rows are summed in the order of the pairs") {
  MOE_NEEDS_GPU();
  movement<float> const m({.T = 500, .K = 12, .E = 40, .dropped = 0.1}, 1024, {});
  moe::gpu const exec;
  // Products are exact; the dot products have another order than on the CPU.
  CHECK(all_dispatches(exec, m, device_home())
            .matrices[2]
            .same_bits(all_dispatches(cpu{}, m).matrices[2]));
  CHECK(all_combines(exec, m, device_home())
            .matrices[0]
            .same_bits(all_combines(cpu{}, m).matrices[0]));
}

TEST_CASE("dispatch/gpu: a large layer of 256 experts, past the caches, in a graph") {
  MOE_NEEDS_GPU();
  movement<bf16> const m({.T = 4096, .K = 8, .E = 256, .align = 16}, 7168, {}, numbers::exact);
  device_home home;
  auto const table = home.table(m.s);
  auto const tokens = home.in(m.tokens);
  auto const weight = home.in(m.weight);
  auto rows = m.new_rows(), out = m.new_tokens(), drows = m.new_rows();
  auto expected_rows = rows, expected_out = out, expected_drows = drows;
  std::vector<float> dweight(m.weight.size()), expected_dweight = dweight;
  auto const r = home.out(rows), dr = home.out(drows);
  auto const o = home.out(out);
  auto const dw = home.out(dweight);
  replay_as_graph(
      [&](moe::gpu const& exec) {
        moe::dispatch(exec, tokens, table, r);
        moe::combine(exec, r, table, weight, o);
        moe::combine_backward(exec, tokens, r, table, weight, dr, dw);
      },
      3);
  home.fetch();
  moe::dispatch(cpu{}, m.tokens, m.s.table, expected_rows.view());
  CHECK(rows.same_bits(expected_rows));
  moe::combine(cpu{}, rows, m.s.table, m.weight, expected_out.view());
  CHECK(out.same_bits(expected_out));
  moe::combine_backward(cpu{}, m.tokens, rows, m.s.table, m.weight, expected_drows.view(),
                        expected_dweight);
  CHECK(drows.same_bits(expected_drows));
  CHECK(dweight == expected_dweight);
}

TEST_CASE("dispatch/gpu: offsets beyond 2^31 elements (large)") {
  MOE_NEEDS_GPU();
  // Rows 2^31 + 8 elements apart: 12 GiB.
  std::int64_t const M = 512, ld = (std::int64_t(1) << 31) + 8;
  moe::gpu_buffer memory;
  try {
    memory = moe::gpu_buffer(static_cast<std::size_t>(2 * ld + M) * sizeof(bf16));
  } catch (moe::cuda_error const&) {
    MESSAGE("SKIPPED: the device has less than 12 GiB to give");
    return;
  }
  slow_table const s({.T = 3, .K = 1, .E = 1});
  auto const tokens = matrix<bf16>(3, M).fill(1);
  matrix<bf16> out(3, M);
  device_home home;
  auto const table = home.table(s);
  moe::matrix_view<bf16> const rows(static_cast<bf16*>(memory.data()), 3, M, ld);
  moe::gpu const exec;
  moe::dispatch(exec, home.in(tokens), table, rows);
  moe::combine(exec, rows, table, home.out(out));
  home.fetch();
  CHECK(out.same_bits(tokens));
}
