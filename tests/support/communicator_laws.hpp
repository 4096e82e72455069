// What every communicator does, whatever it is made of.
// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <cstddef>
#include <vector>

#include <moe/comm/communicator.hpp>

namespace moe_test {

template <class T>
moe::outgoing bytes_of(T const& value, int peer) {
  return {reinterpret_cast<std::byte const*>(&value), sizeof value, peer};
}
template <class T>
moe::incoming room_in(T& value, int peer) {
  return {reinterpret_cast<std::byte*>(&value), sizeof value, peer};
}

/// Whether what was received is there. Before that, it may be work on a stream.
template <moe::communicator C>
bool has_arrived([[maybe_unused]] C& comm, [[maybe_unused]] moe::deadline until) {
  if constexpr (moe::stream_communicator<C>)
    return static_cast<bool>(comm.wait_for_stream(until));
  else
    return true;
}

/// Run by all ranks of a communicator, which is of no use afterwards. The name of the law that does not
/// hold, or null.
template <moe::communicator C>
char const* broken_communicator_law(C& comm) {
  using moe::exchange_status;
  auto const late = moe::within(std::chrono::seconds(60));
  int const R = comm.size(), rank = comm.rank();
  if (rank < 0 || rank >= R) return "rank is in [0, size)";

  // Two messages for everybody, itself included, in each of two exchanges that are under way at once.
  std::vector<int> out[2], in[2];
  std::vector<moe::outgoing> sends[2];
  std::vector<moe::incoming> receives[2];
  for (int x = 0; x < 2; ++x) {
    for (int i = 0; i < 2 * R; ++i) out[x].push_back(10000 * x + 100 * rank + i);
    in[x].assign(out[x].size(), -1);
    for (int i = 0; i < 2 * R; ++i) {
      sends[x].push_back(bytes_of(out[x][static_cast<std::size_t>(i)], i / 2));
      receives[x].push_back(room_in(in[x][static_cast<std::size_t>(i)], i / 2));
    }
  }
  {
    typename C::ticket first, second, none;
    if (!comm.exchange(sends[0], receives[0], first)) return "exchange starts";
    if (!comm.exchange(sends[1], receives[1], second)) return "a second exchange starts";
    if (!wait(comm, second, late)) return "the second exchange ends";
    if (!wait(comm, first, late)) return "the first exchange ends";
    if (!has_arrived(comm, late)) return "what was received arrives";
    for (int x = 0; x < 2; ++x)
      for (int i = 0; i < 2 * R; ++i)
        if (in[x][static_cast<std::size_t>(i)] != 10000 * x + 100 * (i / 2) + 2 * rank + i % 2)
          return "message i meets receive i, in the order of exchanges";
    if (!comm.exchange({}, {}, none) || !wait(comm, none, late)) return "no messages are none";
    if (!comm.exchange({}, {}, first) || !wait(comm, first, late)) return "a ticket serves again";
  }
  {
    typename C::ticket t;
    moe::outgoing const stray = bytes_of(out[0][0], R);
    if (comm.exchange({&stray, 1}, {}, t) != moe::outcome{exchange_status::no_such_peer, R})
      return "a rank that does not exist is named";
    moe::incoming const missing = room_in(in[0][0], -1);
    if (comm.exchange({}, {&missing, 1}, t) != moe::outcome{exchange_status::no_such_peer, -1})
      return "a rank that does not exist is named, to receive from";
  }

  // Halves in reverse order.
  C child;
  if (!comm.split(rank % 2, -rank, late, child)) return "split";
  if (child.size() != (R + 1 - rank % 2) / 2) return "a child has the ranks of its colour";
  if (child.rank() != child.size() - 1 - rank / 2) return "a child is ordered by key";
  int const mine = 1000 + rank;
  std::vector<int> all(static_cast<std::size_t>(child.size()), -1);
  std::vector<moe::outgoing> to;
  std::vector<moe::incoming> from;
  for (int i = 0; i < child.size(); ++i) {
    to.push_back(bytes_of(mine, i));
    from.push_back(room_in(all[static_cast<std::size_t>(i)], i));
  }
  if (!exchange_now(child, to, from, late) || !has_arrived(child, late)) return "children exchange";
  for (int i = 0; i < child.size(); ++i)
    if (all[static_cast<std::size_t>(i)] != 1000 + rank % 2 + 2 * (child.size() - 1 - i))
      return "children exchange among themselves";
  child.abort();
  if (exchange_now(child, {}, {}, late).status != exchange_status::aborted)
    return "an aborted communicator fails at once";
  if (!exchange_now(comm, {}, {}, late)) return "the parent of an aborted one lives";

  comm.abort();
  comm.abort();
  typename C::ticket t;
  if (comm.exchange({}, {}, t).status != exchange_status::aborted) return "no exchange after abort";
  if (comm.poll(t).status != exchange_status::aborted) return "no poll after abort";
  if (comm.split(0, 0, late, child).status != exchange_status::aborted)
    return "no split after abort";
  return nullptr;
}

}  // namespace moe_test
