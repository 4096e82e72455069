// Sums and gathers over all ranks of a communicator: all-reduce, all-gather, reduce-scatter.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/part.hpp>
#include <moe/core/scalar.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// What ranks can sum.
template <class T>
concept summable = scalar<T> || (std::is_arithmetic_v<T> && !std::is_same_v<T, bool>);

namespace detail {

template <class T>
struct sum_of {
  using type = T;
};
template <scalar T>
struct sum_of<T> {
  using type = accumulate_t<T>;
};

/// out[i] = piece(0)[i] + piece(1)[i] + ..., in this order, rounded once. One of the pieces may be `out`.
template <class T, class Piece>
void sum_pieces(int count, Piece const& piece, T* out, std::int64_t n) {
  using Sum = typename sum_of<T>::type;
  constexpr std::int64_t width = 64;
  Sum sum[width];
  for (std::int64_t first = 0; first < n; first += width) {
    std::int64_t const block = std::min(width, n - first);
    for (int p = 0; p < count; ++p) {
      T const* const from = piece(p) + first;
      for (std::int64_t i = 0; i < block; ++i) {
        auto const x = static_cast<Sum>(from[i]);
        sum[i] = p == 0 ? x : static_cast<Sum>(sum[i] + x);
      }
    }
    for (std::int64_t i = 0; i < block; ++i) out[first + i] = static_cast<T>(sum[i]);
  }
}

/// Messages of a collective, in memory of the caller.
class message_list {
 public:
  static constexpr memory_size& add(memory_size& size, int R) noexcept {
    return size.add<outgoing>(R).add<incoming>(R);
  }
  message_list(int R, memory& scratch, char const* enough, call_site site)
      : sends_(scratch.take<outgoing>(R, enough, site)),
        receives_(scratch.take<incoming>(R, enough, site)) {}

  template <class T>
  void send(T const* data, std::int64_t count, int peer) noexcept {
    if (count > 0)
      sends_[sent_++] = {reinterpret_cast<std::byte const*>(data), bytes<T>(count), peer};
  }
  template <class T>
  void receive(T* data, std::int64_t count, int peer) noexcept {
    if (count > 0)
      receives_[received_++] = {reinterpret_cast<std::byte*>(data), bytes<T>(count), peer};
  }
  template <communicator C>
  outcome exchange(C& comm, deadline until) const {
    return exchange_now(comm, {sends_, sent_}, {receives_, received_}, until);
  }

 private:
  template <class T>
  static std::size_t bytes(std::int64_t count) noexcept {
    return static_cast<std::size_t>(count) * sizeof(T);
  }

  outgoing* sends_;
  incoming* receives_;
  std::int64_t sent_ = 0;
  std::int64_t received_ = 0;
};

/// What both row collectives want of the side that has the rows of all ranks, `all`, of the rows of
/// this rank, `own`, and of the counts. Gives the first of the own rows in `all`.
/// @param shapes, apart  The rules, as they are told.
template <class T>
std::int64_t first_own_row(int rank, int R, matrix_view<T> all, matrix_view<T> own,
                           vector_view<std::int64_t const> counts, char const* shapes,
                           char const* apart, call_site site) {
  expects(R >= 1 && counts.size() == R, shapes, site, {{"counts", counts.size()}, {"R", R}});
  std::int64_t total = 0, first = 0;
  for (int r = 0; r < R; ++r) {
    expects(counts[r] >= 0, shapes, site, {{"rank", r}, {"count", counts[r]}});
    if (r == rank) first = total;
    total += counts[r];
  }
  expects(all.rows() == total && own.rows() == counts[rank] && all.cols() == own.cols() &&
              all.ld() == all.cols() && own.ld() == own.cols(),
          shapes, site,
          {{"rows of all", all.rows()},
           {"sum of counts", total},
           {"own rows", own.rows()},
           {"own count", counts[rank]},
           {"cols of all", all.cols()},
           {"own cols", own.cols()}});
  expects(!overlap(all, own) || own.data() == all.row(first), apart, site);
  return first;
}

}  // namespace detail

/// Bytes of scratch for all_gather_rows.
constexpr std::size_t all_gather_scratch(int R) noexcept {
  memory_size size;
  return detail::message_list::add(size, R).bytes();
}

/// Every rank gets the rows of all, those of rank 0 first.
///
/// @param own      [counts[rank], M] rows of this rank. May be their own place in `out`.
/// @param counts   [R] rows of each rank; the same on all ranks.
/// @param out      [sum of counts, M] out. Both contiguous.
/// @param scratch  all_gather_scratch(R) bytes.
/// @throws precondition_error if shapes do not fit, own and out overlap otherwise, or scratch is short.
/// @note  Collective. If it fails, the communicator has aborted. `wrong_length` if a peer has another
///        number of rows than counts says. Allocates a ticket of the communicator, and nothing else.
/// @cost  R - 1 messages each way: own rows to each peer.
template <class T, communicator C>
outcome all_gather_rows(C& comm, matrix_view<T const> own, vector_view<std::int64_t const> counts,
                        matrix_view<T> out, memory scratch, deadline until,
                        call_site site = call_site::here()) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(std::is_same_v<typename C::memory_space, host_memory>);
  int const R = comm.size(), rank = comm.rank();
  std::int64_t const mine = detail::first_own_row<T const>(
      rank, R, out, own, counts,
      "all_gather_rows: own is [counts[rank], M], out [sum of counts, M], contiguous; counts [R], "
      ">= 0",
      "all_gather_rows: own is apart from out, or its own place there", site);
  detail::message_list messages(R, scratch, "all_gather_rows: scratch >= all_gather_scratch(R)",
                                site);
  std::int64_t const M = out.cols();
  std::int64_t first = 0;
  for (int r = 0; r < R; first += counts[r], ++r) {
    if (r == rank) continue;
    messages.send(own.data(), own.rows() * M, r);
    messages.receive(out.row(first), counts[r] * M, r);
  }
  if (own.rows() > 0 && own.data() != out.row(mine))
    std::copy_n(own.data(), own.rows() * M, out.row(mine));
  return messages.exchange(comm, until);
}

/// Bytes of scratch for reduce_scatter_rows.
/// @param elements  Of this rank's sum: counts[rank] * M.
template <class T>
constexpr std::size_t reduce_scatter_scratch(std::int64_t elements, int R) noexcept {
  memory_size size;
  size.add<T>(elements * (R - 1));
  return size.bytes() + all_gather_scratch(R);
}

/// Every rank gets the sum over all ranks of its own rows: the gradient of all_gather_rows.
///
/// @param rows     [sum of counts, M] what this rank adds to the rows of rank 0, 1, ...
/// @param counts   [R] rows of each rank; the same on all ranks.
/// @param out      [counts[rank], M] out; may be their own place in `rows`. Both contiguous.
/// @param scratch  reduce_scatter_scratch<T>(counts[rank] * M, R) bytes.
/// @post  Each element is added up in accumulate_t<T> in the order of ranks, and rounded once.
/// @throws precondition_error as all_gather_rows does.
/// @note  As all_gather_rows.
/// @cost  R - 1 messages each way; receives R - 1 times its own rows, and adds them up.
template <summable T, communicator C>
outcome reduce_scatter_rows(C& comm, matrix_view<T const> rows,
                            vector_view<std::int64_t const> counts, matrix_view<T> out,
                            memory scratch, deadline until, call_site site = call_site::here()) {
  static_assert(std::is_same_v<typename C::memory_space, host_memory>);
  int const R = comm.size(), rank = comm.rank();
  std::int64_t const mine = detail::first_own_row<T const>(
      rank, R, rows, out, counts,
      "reduce_scatter_rows: rows is [sum of counts, M], out [counts[rank], M], contiguous; counts "
      "[R], >= 0",
      "reduce_scatter_rows: out is apart from rows, or its own place there", site);
  char const* const enough =
      "reduce_scatter_rows: scratch >= reduce_scatter_scratch<T>(counts[rank] * M, R)";
  std::int64_t const M = rows.cols(), n = counts[rank] * M;
  T* const received = scratch.take<T>(n * (R - 1), enough, site);  // [R - 1, counts[rank], M]
  detail::message_list messages(R, scratch, enough, site);
  auto const from = [&](int r) { return received + (r < rank ? r : r - 1) * n; };
  std::int64_t first = 0;
  for (int r = 0; r < R; first += counts[r], ++r) {
    if (r == rank) continue;
    messages.send(rows.row(first), counts[r] * M, r);
    messages.receive(from(r), n, r);
  }
  outcome const end = messages.exchange(comm, until);
  if (end)
    detail::sum_pieces<T>(
        R, [&](int r) -> T const* { return r == rank ? rows.row(mine) : from(r); }, out.data(), n);
  return end;
}

/// Bytes of scratch for all_reduce of n values: about as many as those have.
template <class T>
constexpr std::size_t all_reduce_scratch(std::int64_t n, int R) noexcept {
  memory_size size;
  size.add<std::int64_t>(R);
  return size.bytes() + reduce_scatter_scratch<T>((n + R - 1) / R, R);
}

/// Every value becomes its sum over all ranks.
///
/// @param values   [n] in and out; the same n on all ranks.
/// @param scratch  all_reduce_scratch<T>(n, R) bytes.
/// @post  The same bits on all ranks, and in every run: see reduce_scatter_rows.
/// @throws precondition_error if scratch is short.
/// @note  As all_gather_rows. After a failure the values are anything.
/// @cost  Twice R - 1 messages each way, 2 n (R - 1) / R values in all: a reduce-scatter, then an
///        all-gather.
template <summable T, communicator C>
outcome all_reduce(C& comm, vector_view<T> values, memory scratch, deadline until,
                   call_site site = call_site::here()) {
  int const R = comm.size(), rank = comm.rank();
  char const* const enough = "all_reduce: scratch >= all_reduce_scratch<T>(n, R)";
  std::int64_t const n = values.size();
  expects(R >= 1, "all_reduce: a communicator of some ranks", site);
  expects(scratch.size() >= all_reduce_scratch<T>(n, R), enough, site,
          {{"bytes", scratch.size()}, {"n", n}, {"R", R}});
  vector_view const counts(scratch.take<std::int64_t>(R, enough, site), R);
  for (int r = 0; r < R; ++r) counts[r] = part_of(n, r, R).size();
  part_range const own = part_of(n, rank, R);
  matrix_view const all(values.data(), n, 1), sum(values.data() + own.first, own.size(), 1);
  outcome const end = reduce_scatter_rows<T>(comm, all, counts, sum, scratch, until, site);
  return end ? all_gather_rows<T>(comm, sum, counts, all, scratch, until, site) : end;
}

}  // namespace moe::inline MOE_ABI
