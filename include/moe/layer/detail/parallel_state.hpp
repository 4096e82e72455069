// What experts on other ranks keep from forward to backward, carved from the caller's memory.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// What came with a chunk of tokens.
template <class V>
struct parallel_chunk {
  std::int64_t N;        // rows that came
  std::uint64_t bound;   // when they were
  V* rows;               // [N, M + K]: tokens, and the weights of their choices
  std::int32_t* expert;  // [N,K]: experts of this rank, counted from its first, or no_candidate
  V* weight;             // [N,K]
  routing_table table;
  memory experts;
  int K;

  matrix_view<V const> tokens(std::int64_t M) const { return {rows, N, M, M + K}; }
  vector_view<V const> weights() const { return {weight, N * K}; }
};

struct parallel_room {
  int chunks, K;
  std::int64_t T;     // of this rank
  table_shape table;  // of a chunk: of its rows as tokens
};

template <class V>
struct parallel_state {
  parallel_chunk<V>* chunk;  // [chunks]
  V* weight;                 // [T,K]: what choices weigh that were not lost
  std::uint8_t* lost;        // [T,K]

  static constexpr char const* rule = "parallel_experts: saved >= saved_bytes";

  /// @param experts  Bytes that the experts keep of a chunk.
  static std::size_t bytes(parallel_room const& room, std::int64_t M,
                           std::size_t experts) noexcept {
    memory_size size;
    size.add<parallel_chunk<V>>(room.chunks);
    size.add<V>(room.T * room.K);
    size.add<std::uint8_t>(room.T * room.K);
    for (int c = 0; c < room.chunks; ++c) {
      size.add<V>(room.table.T * (M + room.K));
      size.add<V>(room.table.T * room.K);
      size.add<std::int32_t>(room.table.T * room.K);
      size.add<std::byte>(static_cast<std::int64_t>(table_bytes(room.table)));
      size.add<std::byte>(static_cast<std::int64_t>(experts + 2 * memory::alignment));
    }
    return size.bytes();
  }

  /// As `carve` left it.
  static parallel_state at(memory& from, parallel_room const& room, call_site site) {
    parallel_state s;
    s.chunk = from.take<parallel_chunk<V>>(room.chunks, rule, site);
    s.weight = from.take<V>(room.T * room.K, rule, site);
    s.lost = from.take<std::uint8_t>(room.T * room.K, rule, site);
    return s;
  }
  static parallel_state carve(memory from, parallel_room const& room, std::int64_t M,
                              call_site site) {
    auto const bytes_of = [&](std::size_t n) {
      return memory(from.take<std::byte>(static_cast<std::int64_t>(n), rule, site), n);
    };
    parallel_state const s = at(from, room, site);
    for (int c = 0; c < room.chunks; ++c) {
      parallel_chunk<V>& chunk = s.chunk[c];
      chunk.K = room.K;
      chunk.rows = from.take<V>(room.table.T * (M + room.K), rule, site);
      chunk.weight = from.take<V>(room.table.T * room.K, rule, site);
      chunk.expert = from.take<std::int32_t>(room.table.T * room.K, rule, site);
      memory table = bytes_of(table_bytes(room.table));
      chunk.table = take_table(table, room.table, site);
    }
    // What is left is the experts', the same for each chunk.
    std::size_t const share = from.size() / static_cast<std::size_t>(room.chunks);
    std::size_t const each = share - std::min(share, std::size_t{memory::alignment});
    for (int c = 0; c < room.chunks; ++c) s.chunk[c].experts = bytes_of(each);
    return s;
  }
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
