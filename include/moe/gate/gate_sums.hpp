// What a gate on a GPU sums on its way through the tokens: for routing tables and losses.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>

namespace moe::inline MOE_ABI {

/// Sums over chunks of neighbouring tokens, which `route` writes on a GPU and later kernels add up.
/// Arrays are the caller's memory of the device; those that are null are not made.
///
/// The sums are those that `load_balance` and `z_loss` are made of; see there which tokens count.
struct gate_sums {
  std::int64_t chunk = 0;  ///< Tokens of a chunk, at most `most_tokens`; the last has what is left.
  std::int64_t chunks = 0;        ///< T / chunk, rounded up.
  std::int32_t* pairs = nullptr;  ///< [chunks, E + 4]: see `pair_counts`.
  std::int32_t* first = nullptr;  ///< [chunks, E]: first choices of an expert.
  float* score = nullptr;         ///< [chunks, E]: scores of an expert, over the tokens that count.
  double* z =
      nullptr;  ///< [chunks, 2]: the squares of log sum exp(logits), and of how many tokens.
  /// Whether `score` has those of masked tokens, too; as load_balance_rule::masked_tokens::scored.
  bool scores_masked = false;

  static constexpr std::int64_t most_tokens = 0x7fff;
};

namespace detail {

/// Tokens of a chunk: as many as a block of `route` has at once, or, so that few chunks have to be added
/// up, a multiple of it. A function of the problem alone, as the order of the sums is. 256 chunks
/// are two blocks for each multiprocessor; a guess.
constexpr std::int64_t tokens_per_chunk(std::int64_t T, std::int64_t E) noexcept {
  std::int64_t const least = E <= 8 ? 64 : 16;
  std::int64_t const rounds = (T + 256 * least - 1) / (256 * least);
  std::int64_t const chunk = least * (rounds > 0 ? rounds : 1);
  return chunk < gate_sums::most_tokens ? chunk : gate_sums::most_tokens / least * least;
}

constexpr std::int64_t chunks_of(std::int64_t T, std::int64_t chunk) noexcept {
  return (T + chunk - 1) / chunk;
}

}  // namespace detail

/// Bytes that `carve_gate_sums` takes.
constexpr std::size_t gate_sums_bytes(std::int64_t T, std::int64_t E) noexcept {
  std::int64_t const chunks = detail::chunks_of(T, detail::tokens_per_chunk(T, E));
  memory_size size;
  size.add<std::int32_t>(chunks * (E + 4)).add<std::int32_t>(chunks * E);
  return size.add<float>(chunks * E).add<double>(chunks * 2).bytes();
}

/// All sums of T tokens and E experts; set those to null that are not wanted.
///
/// @param from  gate_sums_bytes(T, E) bytes of the device; not read or written here.
/// @throws precondition_error unless T >= 0, E >= 1 and from is large enough.
inline gate_sums carve_gate_sums(memory& from, std::int64_t T, std::int64_t E,
                                 call_site site = call_site::here()) {
  expects(T >= 0 && E >= 1, "carve_gate_sums: T >= 0, E >= 1", site, {{"T", T}, {"E", E}});
  char const* const enough = "carve_gate_sums: memory holds gate_sums_bytes(T, E)";
  gate_sums sums;
  sums.chunk = detail::tokens_per_chunk(T, E);
  sums.chunks = detail::chunks_of(T, sums.chunk);
  sums.pairs = from.take<std::int32_t>(sums.chunks * (E + 4), enough, site);
  sums.first = from.take<std::int32_t>(sums.chunks * E, enough, site);
  sums.score = from.take<float>(sums.chunks * E, enough, site);
  sums.z = from.take<double>(sums.chunks * 2, enough, site);
  return sums;
}

}  // namespace moe::inline MOE_ABI
