// What communicators have in common: messages, outcomes, and waiting with a deadline.
// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <thread>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Where the bytes of messages lie: in memory of the host.
struct host_memory {};

/// Where the bytes of messages lie: in memory of a device. Exchanges are work on a stream of it.
struct device_memory {};

/// Until when a call may wait.
struct deadline {
  std::chrono::steady_clock::time_point at;

  bool passed() const { return std::chrono::steady_clock::now() >= at; }
};

/// The deadline that is so far from now: `moe::within(5s)`.
inline deadline within(std::chrono::nanoseconds time) {
  return {std::chrono::steady_clock::now() +
          std::chrono::duration_cast<std::chrono::steady_clock::duration>(time)};
}

enum class exchange_status : std::uint8_t {
  ok,
  pending,       ///< Only from poll: not done yet.
  timeout,       ///< The deadline has passed.
  peer_failed,   ///< The peer is dead, or has aborted.
  aborted,       ///< This rank has aborted, maybe because an earlier call failed.
  wrong_length,  ///< A message is not as long as its receive.
  no_such_peer,  ///< A message to or from a rank that the communicator lacks.
  in_use,        ///< The ticket's last exchange has not ended.
  stale,         ///< The peer's counts are of another membership epoch.
  no_room,       ///< More rows come than there is room for.
  lost,          ///< An expert that a token chose is on no rank that is alive.
  backend        ///< The library behind the communicator refused or failed: `native` says how.
};

/// How a call of a communicator ended. Nothing throws for what another rank did.
struct [[nodiscard]] outcome {
  exchange_status status = exchange_status::ok;
  int peer = -1;   ///< Whom it was about, where that is known.
  int native = 0;  ///< A code of the library behind the communicator.

  constexpr explicit operator bool() const noexcept { return status == exchange_status::ok; }
  friend constexpr bool operator==(outcome const&, outcome const&) = default;
};

/// The word for a status, as in the enumeration.
constexpr char const* name(exchange_status status) noexcept {
  constexpr char const* names[] = {"ok",      "pending",      "timeout",      "peer_failed",
                                   "aborted", "wrong_length", "no_such_peer", "in_use",
                                   "stale",   "no_room",      "lost",         "backend"};
  return names[static_cast<int>(status)];
}

/// Bytes for another rank.
struct outgoing {
  std::byte const* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
};

/// Bytes from another rank.
struct incoming {
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  int peer = 0;
};

/// Polls until the answer is not `pending`, or until the deadline: then aborts, because peers still
/// write to this rank's memory otherwise, and says whom it was waiting for.
///
/// @param poll   Gives an outcome and never blocks.
/// @param abort  Called once at most.
template <class Poll, class Abort>
outcome wait(Poll&& poll, Abort&& abort, deadline until) {
  using namespace std::chrono_literals;
  for (int look = 0;; ++look) {
    outcome const now = poll();
    if (now.status != exchange_status::pending) return now;
    if (until.passed()) {
      abort();
      return {exchange_status::timeout, now.peer};
    }
    // Peers are threads or processes of machines that may have fewer cores than ranks.
    if (look < 100)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(20us);
  }
}

/// Waits for the end of one exchange.
template <communicator C>
outcome wait(C& comm, typename C::ticket& ticket, deadline until) {
  return wait([&] { return comm.poll(ticket); }, [&] { comm.abort(); }, until);
}

/// Waits for the end of an exchange that was started, if it was. Aborts if either fails, so that peers
/// do not wait for this rank.
template <communicator C>
outcome end_now(C& comm, outcome const& started, typename C::ticket& ticket, deadline until) {
  outcome const result = started ? wait(comm, ticket, until) : started;
  if (!result) comm.abort();
  return result;
}

/// Exchanges and waits. Aborts if it fails.
template <communicator C>
outcome exchange_now(C& comm, vector_view<outgoing const> sends,
                     vector_view<incoming const> receives, typename C::ticket& ticket,
                     deadline until) {
  return end_now(comm, comm.exchange(sends, receives, ticket), ticket, until);
}

/// With a ticket of its own, which allocates.
template <communicator C>
outcome exchange_now(C& comm, vector_view<outgoing const> sends,
                     vector_view<incoming const> receives, deadline until) {
  typename C::ticket ticket;
  return exchange_now(comm, sends, receives, ticket, until);
}

}  // namespace moe::inline MOE_ABI
