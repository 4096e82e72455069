// A user's translation unit, compiled several times with different -m flags as MOE_ABI_USE.
// SPDX-License-Identifier: MIT
#include "use.hpp"

#include <atomic>
#include <vector>

#include <moe/moe.hpp>

int MOE_ABI_USE() {
  constexpr int E = 37, members = 3;
  moe::thread_team team(members);
  std::atomic<int> wrong = 0;
  moe::cpu(team).each(members, [&](std::int64_t i, int) {
    std::vector<float> scores(E), copies(2 * E);
    for (int e = 0; e < E; ++e) scores[static_cast<std::size_t>(e)] = static_cast<float>(e % 11);
    moe::row_room<float> room{copies.data(), 2};
    moe::array_row<float> row(scores.data(), E, &room);
    moe::choices<1> chosen;
    moe::gate<moe::softmax, moe::top_k<1>, moe::as_scored> const gate{};
    gate(row, chosen, moe::token{.id = i, .row = i});
    if (chosen.expert[0] != 10) ++wrong;  // the first of the equal best scores
  });

  // One token at one row: vectors of sums, whose width depends on the instruction set.
  constexpr std::int64_t M = 100;
  std::int32_t row_of = 0, pair_of = 0;
  moe::table_counts counts;
  counts.rows = counts.kept = 1;
  moe::routing_table table;
  table.T = table.K = 1;
  table.row_of = &row_of;
  table.pair_of = &pair_of;
  table.counts = &counts;
  std::vector<moe::bf16> const ones(M, moe::bf16(1.0f));
  std::vector<moe::bf16> drows(M);
  std::vector<float> const weight{0.5f};
  std::vector<float> dweight(1);
  moe::combine_backward(team, {ones.data(), 1, M}, {ones.data(), 1, M}, table, weight,
                        moe::matrix_view(drows.data(), 1, M), dweight);
  if (dweight[0] != M || static_cast<float>(drows[M - 1]) != 0.5f) ++wrong;

  // A product by kernels that are chosen by the processor, not by the flags: in each object its own.
  std::vector<float> const a(5 * M, 0.5f), b(M * M, 2.0f);
  std::vector<float> product(5 * M);
  moe::buffer const scratch(moe::builtin_gemm::scratch_bytes<float>(team, 1));
  moe::builtin_gemm::forward<float>(team, {a, 5, M}, {b.data(), 1, M, M}, {}, moe::all_rows(5),
                                    {product, 5, M}, scratch);
  for (float const v : product)
    if (v != M) ++wrong;

  try {
    moe::thread_team const nobody(0);
    ++wrong;
  } catch (moe::precondition_error const&) {
  }
  return wrong;
}
