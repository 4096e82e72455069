// All-to-all as a function, for users without plans: equal blocks, or any numbers of rows.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// Rank r sends block d of `in` to rank d, where it is block r. `bytes_to(i)` and `bytes_from(i)` are
/// the sizes of blocks.
template <communicator C, class To, class From>
outcome exchange_blocks(C& comm, std::byte const* in, To const& bytes_to, std::byte* out,
                        From const& bytes_from, deadline until) {
  static_assert(std::is_same_v<typename C::memory_space, host_memory> || stream_communicator<C>);
  int const R = comm.size(), rank = comm.rank();
  std::vector<outgoing> sends;
  std::vector<incoming> receives;
  sends.reserve(static_cast<std::size_t>(R));
  receives.reserve(static_cast<std::size_t>(R));
  std::byte const* kept = nullptr;
  for (int d = 0; d < R; in += bytes_to(d), ++d) {
    if (d == rank)
      kept = in;
    else if (bytes_to(d) > 0)
      sends.push_back({in, bytes_to(d), d});
  }
  for (int s = 0; s < R; out += bytes_from(s), ++s) {
    if (s != rank && bytes_from(s) > 0) receives.push_back({out, bytes_from(s), s});
    if (s != rank || bytes_from(s) == 0) continue;
    if constexpr (stream_communicator<C>) {
      if (outcome const copied = comm.copy(out, kept, bytes_from(s)); !copied) {
        comm.abort();
        return copied;
      }
    } else {
      std::memcpy(out, kept, bytes_from(s));
    }
  }
  return exchange_now(comm, sends, receives, until);
}

}  // namespace detail

/// Equal blocks: block d of this rank becomes block `rank` of rank d. Also tells every rank how many
/// rows it will receive, if the blocks are counts.
///
/// @param in   [R * n] block d is in[d * n .. (d + 1) * n).
/// @param out  [R * n] out, the same n on all ranks. No overlap with `in`.
/// @throws precondition_error unless both are of one size, a multiple of R.
/// @note  Collective. If it fails, the communicator has aborted. Allocates two arrays of R messages.
///        With a `stream_communicator` pointers are to memory of the device, and `ok` says that all is
///        enqueued. A communicator that has `exchange_equal` is asked for that instead of messages.
/// @cost  R - 1 messages each way, and a copy of the block that stays.
template <class T, communicator C>
outcome all_to_all(C& comm, vector_view<T const> in, vector_view<T> out, deadline until,
                   call_site site = call_site::here()) {
  static_assert(std::is_trivially_copyable_v<T>);
  expects(comm.size() >= 1 && in.size() == out.size() && in.size() % comm.size() == 0,
          "all_to_all: in and out of one size, a multiple of R", site,
          {{"in", in.size()}, {"out", out.size()}, {"R", comm.size()}});
  auto const block = static_cast<std::size_t>(in.size() / comm.size()) * sizeof(T);
  auto const* const from = reinterpret_cast<std::byte const*>(in.data());
  auto* const to = reinterpret_cast<std::byte*>(out.data());
  typename C::ticket ticket;
  if constexpr (requires { comm.exchange_equal(from, to, block, ticket); }) {
    return end_now(comm, comm.exchange_equal(from, to, block, ticket), ticket, until);
  } else {
    auto const bytes = [block](int) { return block; };
    return detail::exchange_blocks(comm, from, bytes, to, bytes, until);
  }
}

/// Any numbers of rows: `send_counts[d]` rows go to rank d; out has the rows of rank 0, 1, ... in turn.
///
/// @param rows            [sum of send_counts, M], contiguous, as is `out`.
/// @param send_counts     [R]
/// @param receive_counts  [R] what the peers' send_counts say, see `all_to_all`.
/// @param out             [sum of receive_counts, M] out. No overlap with `rows`.
/// @throws precondition_error if shapes do not fit. O(R).
/// @note  As all_to_all. `wrong_length` if a peer sends another number of rows than receive_counts says;
///        but nobody notices before the deadline if one of both numbers is 0.
template <class T, communicator C>
outcome all_to_all_v(C& comm, matrix_view<T const> rows,
                     vector_view<std::int64_t const> send_counts, matrix_view<T> out,
                     vector_view<std::int64_t const> receive_counts, deadline until,
                     call_site site = call_site::here()) {
  static_assert(std::is_trivially_copyable_v<T>);
  expects(
      comm.size() >= 1 && send_counts.size() == comm.size() && receive_counts.size() == comm.size(),
      "all_to_all_v: a count for each rank", site,
      {{"send_counts", send_counts.size()},
       {"receive_counts", receive_counts.size()},
       {"R", comm.size()}});
  auto const sum = [&](vector_view<std::int64_t const> counts) {
    std::int64_t total = 0;
    for (std::int64_t const n : counts) {
      expects(n >= 0, "all_to_all_v: counts >= 0", site, {{"count", n}});
      total += n;
    }
    return total;
  };
  std::int64_t const sent = sum(send_counts), received = sum(receive_counts);
  expects(
      rows.rows() == sent && out.rows() == received && rows.cols() == out.cols() &&
          rows.ld() == rows.cols() && out.ld() == out.cols(),
      "all_to_all_v: rows is [sum of send_counts, M], out [sum of receive_counts, M], contiguous",
      site,
      {{"rows.rows()", rows.rows()},
       {"sent", sent},
       {"out.rows()", out.rows()},
       {"received", received},
       {"rows.cols()", rows.cols()},
       {"out.cols()", out.cols()}});
  expects(send_counts[comm.rank()] == receive_counts[comm.rank()],
          "all_to_all_v: a rank receives from itself what it sends to itself", site,
          {{"sent", send_counts[comm.rank()]}, {"received", receive_counts[comm.rank()]}});
  std::size_t const row = static_cast<std::size_t>(rows.cols()) * sizeof(T);
  return detail::exchange_blocks(
      comm, reinterpret_cast<std::byte const*>(rows.data()),
      [&](int d) { return static_cast<std::size_t>(send_counts[d]) * row; },
      reinterpret_cast<std::byte*>(out.data()),
      [&](int s) { return static_cast<std::size_t>(receive_counts[s]) * row; }, until);
}

}  // namespace moe::inline MOE_ABI
