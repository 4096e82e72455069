// SPDX-License-Identifier: MIT
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <doctest/doctest.h>
#include <string>
#include <support/communicator_laws.hpp>
#include <support/disturbed.hpp>
#include <support/refusal.hpp>
#include <utility>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/comm/mpi.hpp>

#include "ranks.hpp"

namespace {

using moe::exchange_status;
using moe::incoming;
using moe::outcome;
using moe::outgoing;
using moe_test::all_ranks;
using moe_test::at;
using moe_test::bytes_of;
using moe_test::late;
using moe_test::on_all;
using moe_test::room_in;
using namespace std::chrono_literals;

/// Polls until the outcome is not `pending`, for a bounded time.
outcome end_of(moe::mpi_communicator& comm, moe::mpi_communicator::ticket& t) {
  auto const until = late();
  outcome now;
  do now = comm.poll(t);
  while (now.status == exchange_status::pending && !until.passed());
  return now;
}

/// Bytes that say where they are.
std::vector<std::byte> pattern(std::size_t n, int seed) {
  std::vector<std::byte> bytes(n);
  for (std::size_t i = 0; i < n; ++i)
    bytes[i] = static_cast<std::byte>((i * 7 + i / 251 + static_cast<std::size_t>(seed)) & 255);
  return bytes;
}

}  // namespace

TEST_CASE("comm/mpi: the laws, in whole messages and in tiny pieces, undisturbed and disturbed") {
  for (std::size_t const most : {std::size_t{INT_MAX}, std::size_t{3}, std::size_t{1}})
    for (bool const disturb : {false, true}) {
      CAPTURE(most);
      CAPTURE(disturb);
      moe::mpi_communicator comm = all_ranks(most);
      char const* broken = nullptr;
      if (disturb) {
        moe_test::disturbed other(comm, static_cast<unsigned>(comm.rank()) + 3);
        broken = moe_test::broken_communicator_law(other);
      } else {
        broken = moe_test::broken_communicator_law(comm);
      }
      CAPTURE(std::string(broken == nullptr ? "" : broken));
      CHECK(broken == nullptr);
      CHECK(on_all(broken == nullptr));
    }
}

TEST_CASE("comm/mpi: messages of any length, in pieces of any length, also to oneself") {
  std::vector<std::size_t> const lengths{0, 1, 2, 3, 4, 5, 12, 13, 100'003};
  for (std::size_t const most : {std::size_t{1} << 20, std::size_t{4096}, std::size_t{997}}) {
    CAPTURE(most);
    moe::mpi_communicator comm = all_ranks(most);
    int const R = comm.size(), rank = comm.rank();
    std::vector<std::vector<std::byte>> out, in;
    std::vector<outgoing> sends;
    std::vector<incoming> receives;
    for (int peer = 0; peer < R; ++peer)
      for (std::size_t const n : lengths) {
        out.push_back(pattern(n, 10 * rank + peer));
        in.emplace_back(n);
        sends.push_back({out.back().data(), n, peer});
        receives.push_back({in.back().data(), n, peer});
      }
    bool right = static_cast<bool>(exchange_now(comm, sends, receives, late()));
    std::size_t i = 0;
    for (int peer = 0; peer < R; ++peer)
      for (std::size_t const n : lengths) right = in[i++] == pattern(n, 10 * peer + rank) && right;
    CHECK(on_all(right));
    CHECK(comm.has_let_go());
  }
}

TEST_CASE("comm/mpi: a message of another length names the sender") {
  // Sent, expected, most bytes of a piece. The last ones differ in the number of pieces, too, some of
  // them with a last piece that is as long as the one which is expected.
  std::size_t const cases[][3] = {{4, 8, 100}, {8, 4, 100}, {0, 8, 100}, {8, 0, 100}, {5, 6, 4},
                                  {4, 5, 4},   {5, 4, 4},   {8, 4, 4},   {6, 2, 4},   {2, 6, 4}};
  for (auto const& [sent, expected, most] : cases) {
    CAPTURE(sent);
    CAPTURE(expected);
    CAPTURE(most);
    moe::mpi_communicator comm = all_ranks(most);
    int const last = comm.size() - 1;
    std::vector<std::byte> const out(sent);
    std::vector<std::byte> in(expected + 64, std::byte{7});
    moe::mpi_communicator::ticket t;
    bool right = true;
    if (comm.rank() == 0) {
      outgoing const send{out.data(), sent, last};
      right = comm.exchange({&send, 1}, {}, t) && end_of(comm, t);
    } else if (comm.rank() == last) {
      incoming const receive{in.data(), expected, 0};
      right = static_cast<bool>(comm.exchange({}, {&receive, 1}, t));
      outcome const end = end_of(comm, t);
      CHECK(end.status == exchange_status::wrong_length);
      CHECK(end.peer == 0);
      CHECK((end.native != 0) == (std::min(sent, most) > std::min(expected, most)));
      CHECK(comm.poll(t) == end);  // it stays so
      CHECK(comm.exchange({}, {}, t).status == exchange_status::in_use);
      for (std::size_t i = expected; i < in.size(); ++i) right = right && in[i] == std::byte{7};
    }
    CHECK(on_all(right));
    comm.abort();
  }
}

TEST_CASE("comm/mpi: a message to oneself of another length") {
  for (bool const receives_first : {false, true})
    for (std::size_t const expected : {8, 7, 4, 12, 0}) {
      moe::mpi_communicator comm = all_ranks(6);
      std::vector<std::byte> const out(8);
      std::vector<std::byte> in(expected + 16, std::byte{7});
      moe::mpi_communicator::ticket sending, receiving;
      outgoing const send{out.data(), 8, comm.rank()};
      incoming const receive{in.data(), expected, comm.rank()};
      if (receives_first) CHECK(static_cast<bool>(comm.exchange({}, {&receive, 1}, receiving)));
      CHECK(static_cast<bool>(comm.exchange({&send, 1}, {}, sending)));
      if (!receives_first) CHECK(static_cast<bool>(comm.exchange({}, {&receive, 1}, receiving)));
      CHECK(end_of(comm, receiving).status ==
            (expected == 8 ? exchange_status::ok : exchange_status::wrong_length));
      CHECK(in[expected] == std::byte{7});

      CHECK(static_cast<bool>(end_of(comm, sending)));
      comm.abort();
    }
}

TEST_CASE("comm/mpi: a rank that aborts ends those that wait for it, and no others") {
  constexpr std::size_t large = 1 << 20;  // too long to leave before someone receives it
  for (bool const in_vain_to_send : {false, true}) {
    moe::mpi_communicator comm = all_ranks();
    int const R = comm.size(), rank = comm.rank(), last = R - 1;
    std::vector<std::byte> rows(large);
    int const mine = rank;
    int theirs = -1;
    moe::mpi_communicator::ticket t, unrelated;
    bool right = true;
    if (rank == last) {
      comm.abort();
      comm.abort();
    } else {
      outgoing const send{rows.data(), large, last};
      incoming const receive{rows.data(), large, last};
      right = static_cast<bool>(in_vain_to_send ? comm.exchange({&send, 1}, {}, t)
                                                : comm.exchange({}, {&receive, 1}, t));
      CHECK(end_of(comm, t) == outcome{exchange_status::peer_failed, last});
      CHECK(comm.poll(t) == outcome{exchange_status::peer_failed, last});
      // The others still have each other.
      outgoing const to = bytes_of(mine, (rank + 1) % last);
      incoming const from = room_in(theirs, (rank + last - 1) % last);
      right = comm.exchange({&to, 1}, {&from, 1}, unrelated) && end_of(comm, unrelated) && right;
      right = right && theirs == (rank + last - 1) % last;
    }
    CHECK(on_all(right));
    comm.abort();
    // MPI lets go of what was to be received, but not of what was to be sent.
    if (rank != last) CHECK(comm.has_let_go() == !in_vain_to_send);
    CHECK(on_all(true));
  }
}

TEST_CASE("comm/mpi: what a rank sent before it aborted comes in, what it did not send fails") {
  moe::mpi_communicator comm = all_ranks();
  int const last = comm.size() - 1;
  int value = 5;
  moe::mpi_communicator::ticket t, more;
  bool right = true;
  if (comm.rank() == 0) {
    outgoing const send = bytes_of(std::as_const(value), last);
    right = comm.exchange({&send, 1}, {}, t) && end_of(comm, t);
    comm.abort();
  }
  CHECK(on_all(right));
  if (comm.rank() == last) {
    int received = -1;
    incoming const receive = room_in(received, 0);
    CHECK(static_cast<bool>(comm.exchange({}, {&receive, 1}, t)));
    CHECK(static_cast<bool>(end_of(comm, t)));
    CHECK(received == 5);
    CHECK(static_cast<bool>(comm.exchange({}, {&receive, 1}, more)));
    CHECK(end_of(comm, more) == outcome{exchange_status::peer_failed, 0});
    CHECK(received == 5);
    comm.abort();
  }
  CHECK(on_all(true));
}

TEST_CASE("comm/mpi: a notice that meets a receive of another exchange is heard by all of them") {
  constexpr std::size_t large = 1 << 20;
  moe::mpi_communicator comm = all_ranks();
  std::vector<std::byte> rows(large);
  int value = 0;
  moe::mpi_communicator::ticket sending, receiving;
  if (comm.rank() == 1) {
    outgoing const send{rows.data(), large, 0};
    incoming const receive = room_in(value, 0);
    CHECK(static_cast<bool>(comm.exchange({&send, 1}, {}, sending)));
    CHECK(static_cast<bool>(comm.exchange({}, {&receive, 1}, receiving)));
  }
  CHECK(on_all(true));
  if (comm.rank() == 0) comm.abort();
  if (comm.rank() == 1) {
    CHECK(end_of(comm, sending) == outcome{exchange_status::peer_failed, 0});
    CHECK(comm.poll(receiving) == outcome{exchange_status::peer_failed, 0});
    comm.abort();
  }
  CHECK(on_all(true));
}

TEST_CASE("comm/mpi: a silent rank: a timeout that names it, and memory that MPI gives back") {
  constexpr std::size_t large = 1 << 20;
  moe::mpi_communicator comm = all_ranks();
  int const last = comm.size() - 1;
  std::vector<std::byte> out(large), in(large, std::byte{3});
  if (comm.rank() != last) {
    incoming const receive{in.data(), large, last};
    auto const start = std::chrono::steady_clock::now();
    CHECK(exchange_now(comm, {}, {&receive, 1}, moe::within(100ms)) ==
          outcome{exchange_status::timeout, last});
    CHECK(std::chrono::steady_clock::now() - start < 20s);
    CHECK(comm.has_let_go());
  }
  CHECK(on_all(true));
  if (comm.rank() == last) {  // who sends in spite of that fails, and touches nothing
    std::vector<outgoing> sends;
    for (int r = 0; r < last; ++r) sends.push_back({out.data(), large, r});
    CHECK(exchange_now(comm, sends, {}, late()).status == exchange_status::peer_failed);
  }
  CHECK(on_all(std::count(in.begin(), in.end(), std::byte{3}) == static_cast<long>(large)));
}

TEST_CASE("comm/mpi: a ticket that is destroyed under way aborts; one that has ended does not") {
  moe::mpi_communicator comm = all_ranks();
  int received = 0;
  {
    moe::mpi_communicator::ticket ended;
    CHECK(static_cast<bool>(comm.exchange({}, {}, ended)));
    CHECK(static_cast<bool>(end_of(comm, ended)));
  }
  CHECK(static_cast<bool>(exchange_now(comm, {}, {}, late())));
  if (comm.rank() == 0) {
    moe::mpi_communicator::ticket t;
    incoming const receive = room_in(received, 1);
    CHECK(static_cast<bool>(comm.exchange({}, {&receive, 1}, t)));
  }
  if (comm.rank() == 0) {
    CHECK(exchange_now(comm, {}, {}, late()).status == exchange_status::aborted);
  } else {
    incoming const receive = room_in(received, 0);
    CHECK(exchange_now(comm, {}, {&receive, 1}, late()) ==
          outcome{exchange_status::peer_failed, 0});
  }
  CHECK(on_all(received == 0));
}

TEST_CASE("comm/mpi: messages of the caller's communicator and of the duplicate do not meet") {
  moe::mpi_communicator comm = all_ranks();
  int const R = comm.size(), rank = comm.rank();
  int mine = rank, callers = -1, ours = -1;
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Irecv(&callers, 1, MPI_INT, MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &request);
  outgoing const send = bytes_of(std::as_const(mine), (rank + 1) % R);
  incoming const receive = room_in(ours, (rank + R - 1) % R);
  CHECK(static_cast<bool>(exchange_now(comm, {&send, 1}, {&receive, 1}, late())));
  int const from_caller = 100 + rank;
  MPI_Send(&from_caller, 1, MPI_INT, (rank + 1) % R, 0, MPI_COMM_WORLD);
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  CHECK(on_all(ours == (rank + R - 1) % R && callers == 100 + ours));
}

TEST_CASE("comm/mpi: a communicator without ranks, and ranks that take no part in a split") {
  moe::mpi_communicator none;
  CHECK(none.size() == 0);
  CHECK(none.has_let_go());
  moe::mpi_communicator::ticket t;
  CHECK(none.exchange({}, {}, t).status == exchange_status::aborted);
  none.abort();
  moe::mpi_communicator comm = all_ranks(), child;
  bool const takes_part = comm.rank() != 1;
  CHECK(static_cast<bool>(comm.split(takes_part ? 4 : -1, 0, late(), child)));
  CHECK(on_all(child.size() == (takes_part ? comm.size() - 1 : 0)));
  // A split that not all have come to ends in time, too.
  moe::mpi_communicator late_child;
  if (takes_part) {
    outcome const end = comm.split(0, 0, moe::within(50ms), late_child);
    bool const either =
        end == outcome{exchange_status::timeout, 1} || end.status == exchange_status::peer_failed;
    CHECK(either);
    CHECK(late_child.size() == 0);
  }
  CHECK(on_all(true));
}

TEST_CASE("comm/mpi: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  says(refusal([] { moe::mpi_communicator comm(MPI_COMM_NULL); }),
       "mpi_communicator: comm is an intra-communicator");
  says(refusal([] { moe::mpi_communicator comm(MPI_COMM_SELF, 0); }),
       "mpi_communicator: 1 <= most_bytes <= INT_MAX; got most_bytes = 0");
  says(refusal([] { moe::mpi_communicator comm(MPI_COMM_SELF, std::size_t{1} << 31); }),
       "got most_bytes = 2147483648");
}
