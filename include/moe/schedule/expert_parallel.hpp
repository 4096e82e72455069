// How many ranks hold different experts of a layer, and what the ranks left over do.
// SPDX-License-Identifier: MIT
#pragma once

#include <numeric>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>

namespace moe::inline MOE_ABI {

/// What ranks do when there are more of them than a layer can spread its experts over.
enum class spare_ranks {
  replicate,  ///< Groups of ranks hold the same experts and share the tokens (training).
  slice       ///< They hold parts of the hidden dimension of the same experts (latency).
};

/// One layer's degrees: expert_parallel * data_parallel * slices == ranks. Consecutive ranks hold
/// different experts.
struct expert_parallelism {
  int expert_parallel = 1;   ///< Ranks of different experts (EP).
  int data_parallel = 1;     ///< Copies of each expert (expert DP).
  int slices = 1;            ///< Ranks that hold one expert together.
  int experts_per_rank = 0;  ///< Experts, whole or sliced, of which a rank holds something.

  /// The first of the `experts_per_rank` experts of a rank.
  constexpr int first_expert(int rank) const noexcept {
    return rank % expert_parallel * experts_per_rank;
  }
  /// Which copy (replicate) or slice (slice) of its experts a rank holds.
  constexpr int copy(int rank) const noexcept { return rank / expert_parallel; }

  friend constexpr bool operator==(expert_parallelism const&, expert_parallelism const&) = default;
};

/// Spreads E experts over as many of R ranks as divide both: EP = gcd(E, R), so every rank has the
/// same number of experts and each expert the same number of ranks.
///
/// @param E  0 for a dense layer: every rank has all of it.
/// @pre   E >= 0 and R >= 1.
/// @throws precondition_error if @pre fails.
/// Source. Rajbhandari et al., "DeepSpeed-MoE", 2022 (arXiv 2201.05596).
/// Example: on 128 ranks, layers of 32, 64 and 128 experts get EP 32, 64 and 128 with 4, 2 and 1
///          copies: one expert per rank in each.
constexpr expert_parallelism spread_experts(int E, int R,
                                            spare_ranks spare = spare_ranks::replicate,
                                            call_site site = call_site::here()) {
  expects(E >= 0 && R >= 1, "spread_experts: E >= 0 and R >= 1", site, {{"E", E}, {"R", R}});
  if (E == 0) return {.data_parallel = R};
  int const expert_parallel = std::gcd(E, R);
  int const rest = R / expert_parallel;
  bool const sliced = spare == spare_ranks::slice;
  return {.expert_parallel = expert_parallel,
          .data_parallel = sliced ? 1 : rest,
          .slices = sliced ? rest : 1,
          .experts_per_rank = E / expert_parallel};
}

}  // namespace moe::inline MOE_ABI
