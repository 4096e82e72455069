// SPDX-License-Identifier: MIT
#include <atomic>
#include <chrono>
#include <cstddef>
#include <doctest/doctest.h>
#include <string>
#include <support/communicator_laws.hpp>
#include <support/disturbed.hpp>
#include <support/refusal.hpp>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/self.hpp>
#include <moe/comm/threads.hpp>

namespace {

using moe::exchange_status;
using moe::incoming;
using moe::outcome;
using moe::outgoing;
using moe_test::bytes_of;
using moe_test::room_in;
using namespace std::chrono_literals;
using disturbed = moe_test::disturbed<moe::thread_communicator>;

static_assert(moe::communicator<disturbed>);

/// A communicator that has nothing beyond what the concept asks for.
struct archetype {
  struct memory_space {};
  struct ticket {};
  int rank() const noexcept;
  int size() const noexcept;
  outcome exchange(moe::vector_view<outgoing const>, moe::vector_view<incoming const>, ticket&);
  outcome poll(ticket&);
  outcome split(int, int, moe::deadline, archetype&);
  void abort() noexcept;
};
static_assert(moe::communicator<archetype>);

struct without_rank : archetype {
  int rank() const noexcept = delete;
  outcome split(int, int, moe::deadline, without_rank&);
};
struct throwing_size : archetype {
  int size() const;
  outcome split(int, int, moe::deadline, throwing_size&);
};
struct silent_exchange : archetype {
  void exchange(moe::vector_view<outgoing const>, moe::vector_view<incoming const>, ticket&);
  outcome split(int, int, moe::deadline, silent_exchange&);
};
struct without_poll : archetype {
  outcome poll(ticket&) = delete;
  outcome split(int, int, moe::deadline, without_poll&);
};
struct endless_split : archetype {
  outcome split(int, int, endless_split&);
};
struct throwing_abort : archetype {
  void abort();
  outcome split(int, int, moe::deadline, throwing_abort&);
};
struct nowhere : archetype {
  outcome split(int, int, moe::deadline, nowhere&);

 private:
  using archetype::memory_space;
};
static_assert(!moe::communicator<without_rank>);
static_assert(!moe::communicator<throwing_size>);
static_assert(!moe::communicator<silent_exchange>);
static_assert(!moe::communicator<without_poll>);
static_assert(!moe::communicator<endless_split>);
static_assert(!moe::communicator<throwing_abort>);
static_assert(!moe::communicator<nowhere>);

std::size_t at(int i) {
  return static_cast<std::size_t>(i);
}
moe::deadline late() {
  return moe::within(60s);
}

}  // namespace

TEST_CASE("comm/communicator: the laws, on one rank") {
  moe::self_communicator comm;
  char const* const broken = moe_test::broken_communicator_law(comm);
  CAPTURE(std::string(broken == nullptr ? "" : broken));
  CHECK(broken == nullptr);
}

TEST_CASE("comm/communicator: the laws, on threads, undisturbed and disturbed") {
  for (int const R : {1, 2, 3, 7, 16})
    for (bool const disturb : {false, true}) {
      CAPTURE(R);
      std::vector<char const*> broken(at(R));
      moe::thread_world world(R);
      world.run([&](moe::thread_communicator& comm) {
        if (disturb) {
          disturbed other(comm, static_cast<unsigned>(comm.rank()) + 3);
          broken[at(comm.rank())] = moe_test::broken_communicator_law(other);
        } else {
          broken[at(comm.rank())] = moe_test::broken_communicator_law(comm);
        }
      });
      for (char const* const law : broken) {
        CAPTURE(std::string(law == nullptr ? "" : law));
        CHECK(law == nullptr);
      }
    }
}

TEST_CASE("comm/communicator: wait gives up at the deadline, aborts, and says for whom it waited") {
  int polls = 0, aborts = 0;
  auto const start = std::chrono::steady_clock::now();
  outcome const end = moe::wait(
      [&] {
        ++polls;
        return outcome{exchange_status::pending, 7};
      },
      [&] { ++aborts; }, moe::within(5ms));
  CHECK(end == outcome{exchange_status::timeout, 7});
  CHECK(std::chrono::steady_clock::now() - start >= 5ms);
  CHECK(aborts == 1);
  CHECK(polls > 1);
  CHECK(std::string(name(end.status)) == "timeout");
  CHECK(std::string(name(exchange_status::stale)) == "stale");
}

TEST_CASE("comm/self: sends that do not fit receives") {
  moe::self_communicator comm;
  moe::self_communicator::ticket t;
  int a = 1;
  double b = 0;
  outgoing const send = bytes_of(std::as_const(a), 0);
  incoming const receive = room_in(b, 0);
  CHECK(comm.exchange({&send, 1}, {}, t) == outcome{exchange_status::wrong_length, 0});
  CHECK(comm.exchange({&send, 1}, {&receive, 1}, t) == outcome{exchange_status::wrong_length, 0});
}

TEST_CASE("comm/threads: a message of another length names the sender") {
  moe::thread_world world(2);
  auto a = world.communicator(0), b = world.communicator(1);
  int const sent = 1;
  double received = 0;
  outgoing const send = bytes_of(sent, 1);
  incoming const receive = room_in(received, 0);
  moe::thread_communicator::ticket ta, tb;
  CHECK(static_cast<bool>(a.exchange({&send, 1}, {}, ta)));
  CHECK(static_cast<bool>(b.exchange({}, {&receive, 1}, tb)));
  CHECK(b.poll(tb) == outcome{exchange_status::wrong_length, 0});
  CHECK(a.poll(ta) == outcome{exchange_status::pending, 1});
}

TEST_CASE("comm/threads: a ticket that is destroyed takes its messages back") {
  moe::thread_world world(2);
  auto a = world.communicator(0), b = world.communicator(1);
  int received = 0;
  incoming const receive = room_in(received, 0);
  moe::thread_communicator::ticket tb;
  CHECK(static_cast<bool>(b.exchange({}, {&receive, 1}, tb)));
  {
    int const gone = 1;
    outgoing const send = bytes_of(gone, 1);
    moe::thread_communicator::ticket ta;
    CHECK(static_cast<bool>(a.exchange({&send, 1}, {}, ta)));
    CHECK(a.exchange({&send, 1}, {}, ta).status == exchange_status::in_use);
  }
  CHECK(b.poll(tb) == outcome{exchange_status::pending, 0});
  CHECK(received == 0);
}

TEST_CASE("comm/threads: nobody reads the memory of a rank that has aborted or died") {
  for (bool const dies : {false, true}) {
    moe::thread_world world(3);
    auto a = world.communicator(0), b = world.communicator(1);
    int sent = 1, received[2] = {};
    outgoing const send = bytes_of(std::as_const(sent), 1);
    std::vector<incoming> const receive{room_in(received[0], 2), room_in(received[1], 0)};
    moe::thread_communicator::ticket ta, tb;
    CHECK(static_cast<bool>(a.exchange({&send, 1}, {}, ta)));
    dies ? world.kill(0) : a.abort();
    CHECK(a.poll(ta).status == exchange_status::aborted);
    CHECK(static_cast<bool>(b.exchange({}, receive, tb)));
    if (!dies) {  // trouble is told first, although rank 2 comes first
      CHECK(b.poll(tb) == outcome{exchange_status::peer_failed, 0});
      CHECK(received[1] == 0);
    }
    // Sending to it fails, too.
    outgoing const back = bytes_of(std::as_const(received[0]), 0);
    moe::thread_communicator::ticket again;
    CHECK(static_cast<bool>(b.exchange({&back, 1}, {}, again)));
    CHECK(b.poll(again) == outcome{exchange_status::peer_failed, 0});
  }
}

TEST_CASE("comm/threads: a communicator without ranks, and ranks that take no part in a split") {
  moe::thread_communicator none;
  CHECK(none.size() == 0);
  moe::thread_communicator::ticket t;
  CHECK(none.exchange({}, {}, t).status == exchange_status::aborted);
  none.abort();
  moe::thread_world world(3);
  std::vector<int> sizes(3);
  world.run([&](moe::thread_communicator& comm) {
    moe::thread_communicator child;
    outcome const split = comm.split(comm.rank() == 1 ? -1 : 4, 0, late(), child);
    sizes[at(comm.rank())] = split ? child.size() : -1;
  });
  CHECK(sizes == std::vector{2, 0, 2});
}

TEST_CASE("comm/threads: what a rank throws ends the others and comes out") {
  moe::thread_world world(3);
  std::vector<outcome> ends(3);
  int value = 0;
  CHECK_THROWS_WITH_AS(world.run([&](moe::thread_communicator& comm) {
    if (comm.rank() == 1) throw moe::error("rank 1");
    int received = 0;
    incoming const receive = room_in(received, 1);
    outgoing const send = bytes_of(std::as_const(value), 1);
    ends[at(comm.rank())] = exchange_now(comm, {&send, 1}, {&receive, 1}, late());
  }),
                       "rank 1", moe::error);
  CHECK(ends[0] == outcome{exchange_status::peer_failed, 1});
  CHECK(ends[2] == outcome{exchange_status::peer_failed, 1});
}

TEST_CASE("comm/threads: broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  says(refusal([] { moe::thread_world(0); }), "thread_world: R >= 1; got R = 0");
  moe::thread_world world(2);
  says(refusal([&] { world.communicator(2); }),
       "thread_world::communicator: 0 <= rank < R; got rank = 2, R = 2");
  says(refusal([&] { world.kill(-1); }), "thread_world::kill: 0 <= rank < R; got rank = -1");
}

TEST_CASE("comm/all_to_all: equal blocks and any counts, 1 to 9 ranks") {
  for (int R = 1; R <= 9; ++R) {
    std::vector<char> right(at(R));
    moe::thread_world world(R);
    world.run([&](moe::thread_communicator& inner) {
      disturbed comm(inner, static_cast<unsigned>(inner.rank()) + 5);
      int const r = comm.rank();
      std::vector<std::int64_t> sent(at(R)), received(at(R), -1);
      std::vector<short> rows, expected;
      for (int i = 0; i < R; ++i) {
        sent[at(i)] = (r * i + r) % 4;  // some are 0, rank 0 sends nothing
        for (int j = 0; j < 2 * ((r * i + r) % 4); ++j) rows.push_back(short(100 * r + i));
        for (int j = 0; j < 2 * ((i * r + i) % 4); ++j) expected.push_back(short(100 * i + r));
      }
      if (!moe::all_to_all<std::int64_t>(comm, sent, received, late())) return;
      std::vector<short> out(expected.size(), -1);
      right[at(r)] = moe::all_to_all_v<short>(
                         comm, {rows, static_cast<std::int64_t>(rows.size() / 2), 2}, sent,
                         {out, static_cast<std::int64_t>(out.size() / 2), 2}, received, late()) &&
                     out == expected;
      std::vector<int> blocks(at(3 * R)), swapped(at(3 * R));
      for (int i = 0; i < 3 * R; ++i) blocks[at(i)] = 1000 * r + i;
      right[at(r)] = right[at(r)] && moe::all_to_all<int>(comm, blocks, swapped, late());
      for (int i = 0; i < 3 * R; ++i)
        right[at(r)] = right[at(r)] && swapped[at(i)] == 1000 * (i / 3) + 3 * r + i % 3;
    });
    CHECK(right == std::vector<char>(at(R), true));
  }
}

TEST_CASE("comm/all_to_all: a dead rank is named, and broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  moe::thread_world world(3);
  world.kill(2);
  std::vector<outcome> ends(3);
  world.run([&](moe::thread_communicator& comm) {
    std::vector<int> in(3), out(3);
    ends[at(comm.rank())] = moe::all_to_all<int>(comm, in, out, late());
  });
  CHECK(ends[2].status == exchange_status::aborted);
  bool const named = ends[0].peer == 2 || ends[1].peer == 2;
  CHECK(named);
  CHECK(ends[0].status == exchange_status::peer_failed);
  CHECK(ends[1].status == exchange_status::peer_failed);

  moe::self_communicator comm;
  std::vector<int> a(4), b(3);
  std::vector<std::int64_t> const four{4}, three{3}, two{1, 1}, negative{-1};
  says(refusal([&] { (void)moe::all_to_all<int>(comm, a, b, late()); }),
       "all_to_all: in and out of one size, a multiple of R; got in = 4, out = 3, R = 1");
  says(
      refusal([&] { (void)moe::all_to_all_v<int>(comm, {a, 4, 1}, two, {a, 4, 1}, four, late()); }),
      "all_to_all_v: a count for each rank; got send_counts = 2, receive_counts = 1, R = 1");
  says(refusal([&] {
         (void)moe::all_to_all_v<int>(comm, {a, 4, 1}, negative, {a, 4, 1}, four, late());
       }),
       "all_to_all_v: counts >= 0; got count = -1");
  says(refusal(
           [&] { (void)moe::all_to_all_v<int>(comm, {a, 4, 1}, three, {b, 3, 1}, three, late()); }),
       "all_to_all_v: rows is [sum of send_counts, M]");
  says(refusal(
           [&] { (void)moe::all_to_all_v<int>(comm, {a, 4, 1}, four, {b, 3, 1}, three, late()); }),
       "all_to_all_v: a rank receives from itself what it sends to itself; got sent = 4");
}
