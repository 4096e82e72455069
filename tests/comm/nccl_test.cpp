// The communicator over NCCL, against a stand-in of NCCL and of the CUDA runtime.
// SPDX-License-Identifier: MIT
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>
#include <doctest/doctest.h>
#include <string>
#include <support/communicator_laws.hpp>
#include <support/refusal.hpp>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/comm/all_to_all.hpp>
#include <moe/comm/nccl.cuh>

#include "comm/nccl_standin/nccl_standin.hpp"
#include "comm/nccl_standin/ranks.hpp"

namespace {

using moe::exchange_status;
using moe::incoming;
using moe::nccl_communicator;
using moe::nccl_options;
using moe::outcome;
using moe::outgoing;
using moe_test::aborts_untold;
using moe_test::at;
using moe_test::bytes_of;
using moe_test::late;
using moe_test::on_ranks;
using moe_test::owner;
using moe_test::room_in;
using namespace std::chrono_literals;

/// Messages can be written in groups only, and a group is of one scope and one thread.
template <class C>
concept sends_alone = requires(C& c, outgoing const& s) { c.send(s); };
template <class C>
concept receives_alone = requires(C& c, incoming const& r) { c.receive(r); };
template <class... Args>
concept free_send = requires(Args... args) { send(args...); };
static_assert(!sends_alone<nccl_communicator> && !receives_alone<nccl_communicator>);
static_assert(!free_send<nccl_communicator&, outgoing> &&
              !free_send<ncclComm_t, cudaStream_t, outgoing>);
static_assert(!std::copy_constructible<moe::nccl_group> && !std::movable<moe::nccl_group>);
static_assert(requires(moe::nccl_group& g, ncclComm_t c, cudaStream_t s, outgoing m) {
  g.send(c, s, m);
});
// Two objects of one handle could not both know that it is dead.
static_assert(!std::copy_constructible<nccl_communicator> && std::movable<nccl_communicator>);

template <class T>
moe::vector_view<T const> one(T const& value) {
  return {&value, 1};
}

/// Numbers to all and from all, by messages.
bool exchange_numbers(nccl_communicator& comm) {
  int const R = comm.size(), rank = comm.rank();
  std::vector<int> out(at(R)), in(at(R), -1);
  std::vector<outgoing> sends;
  std::vector<incoming> receives;
  for (int i = 0; i < R; ++i) {
    out[at(i)] = 100 * rank + i;
    sends.push_back(bytes_of(out[at(i)], i));
    receives.push_back(room_in(in[at(i)], i));
  }
  if (!exchange_now(comm, sends, receives, late()) || !comm.wait_for_stream(late())) return false;
  for (int i = 0; i < R; ++i)
    if (in[at(i)] != 100 * i + rank) return false;
  return true;
}

}  // namespace

TEST_CASE("comm/nccl: it is a communicator, non-blocking or not") {
  aborts_untold const untold;  // a rank that is through with the laws must not disturb the others
  for (bool const is_blocking : {false, true})
    for (int R = 1; R <= 5; ++R) {
      CAPTURE(R);
      std::vector<std::string> broken(at(R));
      on_ranks(
          R,
          [&](nccl_communicator& comm, owner const&) {
            char const* const law = moe_test::broken_communicator_law(comm);
            broken[at(comm.rank())] = law == nullptr ? "" : law;
          },
          {}, is_blocking);
      CHECK(broken == std::vector<std::string>(at(R)));
    }
}

TEST_CASE("comm/nccl: poll says that an exchange is enqueued, the stream that it is done") {
  std::vector<char> right(2);
  on_ranks(2, [&](nccl_communicator& comm, owner const& mine) {
    int const other = 1 - comm.rank();
    int const out[2] = {10 + comm.rank(), 20 + comm.rank()};
    int in[2] = {-1, -1}, copied = -1;
    outgoing const sends[2] = {bytes_of(out[0], other), bytes_of(out[1], other)};
    incoming const receives[2] = {room_in(in[0], other), room_in(in[1], other)};
    nccl_communicator::ticket first, second;
    bool good = comm.exchange(one(sends[0]), one(receives[0]), first) &&
                comm.poll(first) == outcome{exchange_status::pending};
    // Waits until NCCL has enqueued the first, which is why that needs no more polls.
    good = good && comm.exchange(one(sends[1]), one(receives[1]), second) && comm.poll(first) &&
           comm.poll(second) == outcome{exchange_status::pending};
    // A copy comes after what was started, and the host has not waited for anything.
    good = good && comm.copy(reinterpret_cast<std::byte*>(&copied),
                             reinterpret_cast<std::byte const*>(&in[1]), sizeof copied);
    good = good && comm.poll(second) && comm.wait_for_stream(late());
    right[at(comm.rank())] = good && in[0] == 10 + other && in[1] == 20 + other && copied == in[1];
    mine.end(comm);
  });
  CHECK(right == std::vector<char>(2, true));
}

TEST_CASE("comm/nccl: equal blocks by the collective, any counts by messages, 1 to 6 ranks") {
  for (int R = 1; R <= 6; ++R) {
    std::vector<char> right(at(R));
    static_cast<void>(nccl_standin::native_all_to_alls());
    on_ranks(R, [&](nccl_communicator& comm, owner const& mine) {
      int const r = comm.rank();
      std::vector<std::int64_t> sent(at(R)), received(at(R), -1);
      std::vector<short> rows, expected;
      for (int i = 0; i < R; ++i) {
        sent[at(i)] = (r * i + r) % 4;  // some are 0, rank 0 sends nothing
        for (int j = 0; j < 2 * ((r * i + r) % 4); ++j) rows.push_back(short(100 * r + i));
        for (int j = 0; j < 2 * ((i * r + i) % 4); ++j) expected.push_back(short(100 * i + r));
      }
      bool good = moe::all_to_all<std::int64_t>(comm, sent, received, late()) &&
                  comm.wait_for_stream(late());  // the next call reads the counts
      std::vector<short> out(expected.size(), -1);
      good = good && moe::all_to_all_v<short>(
                         comm, {rows, static_cast<std::int64_t>(rows.size() / 2), 2}, sent,
                         {out, static_cast<std::int64_t>(out.size() / 2), 2}, received, late());
      good = good && moe::all_to_all<int>(comm, {}, {}, late());  // blocks of nothing
      right[at(r)] = good && comm.wait_for_stream(late()) && out == expected;
      mine.end(comm);
    });
    CHECK(right == std::vector<char>(at(R), true));
    CHECK(nccl_standin::native_all_to_alls() == R);  // those of nothing are left out
  }
}

TEST_CASE("comm/nccl: what NCCL reports later is an outcome with its code, and ends the rank") {
  for (ncclResult_t const error : {ncclRemoteError, ncclSystemError, ncclUnhandledCudaError})
    for (int const calls : {0, 1, 2}) {
      CAPTURE(calls);
      aborts_untold const untold;
      outcome const expected{
          error == ncclRemoteError ? exchange_status::peer_failed : exchange_status::backend, -1,
          static_cast<int>(error)};
      std::vector<outcome> ends(3);
      std::vector<char> over(3);
      on_ranks(3, [&](nccl_communicator& comm, owner const& mine) {
        if (comm.rank() == 1) nccl_standin::fail_after(mine.handle(), calls, error);
        std::vector<int> in(3), out(3);
        outcome& end = ends[at(comm.rank())];
        for (int i = 0; i < 2 && end; ++i) {
          end = moe::all_to_all<int>(comm, in, out, late());
          // Those that it leaves alone learn that from nobody but their clock.
          if (end) end = comm.wait_for_stream(comm.rank() == 1 ? late() : moe::within(50ms));
        }
        over[at(comm.rank())] =
            comm.native() == nullptr &&
            exchange_now(comm, {}, {}, late()) == outcome{exchange_status::aborted} &&
            comm.wait_for_stream(late()) == outcome{exchange_status::aborted};
        mine.end(comm);
      });
      CHECK(ends[1] == expected);
      CHECK(ends[0].status == exchange_status::timeout);
      CHECK(ends[2].status == exchange_status::timeout);
      CHECK(over == std::vector<char>(3, true));
    }
}

TEST_CASE("comm/nccl: ranks that are told of an abort end with peer_failed") {
  std::vector<outcome> ends(3);
  on_ranks(3, [&](nccl_communicator& comm, owner const& mine) {
    std::vector<int> in(3), out(3);
    outcome& end = ends[at(comm.rank())];
    for (int i = 0; end; ++i) {
      if (comm.rank() == 2 && i == 1) {
        comm.abort();
        comm.abort();
      }
      end = moe::all_to_all<int>(comm, in, out, late());
      if (end) end = comm.wait_for_stream(late());
    }
    mine.end(comm);
  });
  CHECK(ends[2] == outcome{exchange_status::aborted});
  outcome const told{exchange_status::peer_failed, -1, static_cast<int>(ncclRemoteError)};
  CHECK(ends[0] == told);
  CHECK(ends[1] == told);
}

TEST_CASE("comm/nccl: a peer that never comes is a timeout, wherever it is missing") {
  aborts_untold const untold;
  auto const short_time = [] { return moe::within(30ms); };
  std::vector<outcome> ends;
  std::vector<char> dead;
  on_ranks(2, [&](nccl_communicator& comm, owner const& mine) {  // to receive its message
    if (comm.rank() == 1) return mine.end(comm, true);
    int in = 7;
    incoming const receive = room_in(in, 1);
    ends.push_back(exchange_now(comm, {}, one(receive), late()));
    ends.push_back(comm.wait_for_stream(short_time()));
    dead.push_back(comm.native() == nullptr && in == 7);
  });
  on_ranks(2, [&](nccl_communicator& comm, owner const& mine) {  // to split
    if (comm.rank() == 1) return mine.end(comm, true);
    nccl_communicator child;
    ends.push_back(comm.split(0, 0, short_time(), child));
    dead.push_back(comm.native() == nullptr && child.size() == 0);
  });
  auto const numbers = std::vector<int>(2);
  auto const stuck = [&](auto const& then) {  // to connect: NCCL never enqueues
    on_ranks(2,
             [&](nccl_communicator& comm, owner const& mine) {
               if (comm.rank() == 1) return mine.end(comm, true);
               outgoing const send = bytes_of(numbers[0], 1);
               nccl_communicator::ticket first;
               CHECK(static_cast<bool>(comm.exchange(one(send), {}, first)));
               nccl_standin::hold(mine.handle());
               ends.push_back(then(comm, send, first));
               comm.abort();
               dead.push_back(comm.native() == nullptr);
             },
             {.patience = 20ms});
  };
  stuck([&](auto& comm, auto const&, auto& first) { return wait(comm, first, short_time()); });
  stuck([&](auto& comm, auto const&, auto&) { return comm.wait_until_enqueued(short_time()); });
  stuck([&](auto& comm, outgoing const& send, auto&) {
    nccl_communicator::ticket second;
    return comm.exchange(one(send), {}, second);
  });
  stuck([&](auto& comm, auto const&, auto&) { return comm.copy(nullptr, nullptr, 4); });
  outcome const timeout{exchange_status::timeout};
  CHECK(ends == std::vector<outcome>{{}, timeout, timeout, timeout, timeout, timeout, timeout});
  CHECK(dead == std::vector<char>(6, true));
}

TEST_CASE("comm/nccl: a stream that breaks is told from NCCL's errors") {
  std::vector<outcome> ends(1);
  on_ranks(1, [&](nccl_communicator& comm, owner const& mine) {
    nccl_standin::break_stream(mine.stream(), cudaErrorIllegalAddress);
    int x = 0;
    auto* const bytes = reinterpret_cast<std::byte*>(&x);
    ends[0] = comm.copy(bytes, bytes, sizeof x);
    ends.push_back(comm.wait_for_stream(late()));
    ends.push_back(comm.wait_for_stream(late()));
    mine.end(comm);
  });
  outcome const broken{exchange_status::backend, -1, -static_cast<int>(cudaErrorIllegalAddress)};
  CHECK(ends == std::vector{broken, broken, outcome{exchange_status::aborted}});
}

TEST_CASE("comm/nccl: children are owned, and ranks may take no part in a split") {
  std::vector<int> sizes(5), ranks(5);
  std::vector<char> right(5);
  on_ranks(5, [&](nccl_communicator& comm, owner const& mine) {
    int const r = comm.rank();
    {
      nccl_communicator child;
      bool const split = static_cast<bool>(comm.split(r == 3 ? -1 : r % 2, -r, late(), child));
      sizes[at(r)] = child.size();
      ranks[at(r)] = child.rank();
      bool const none = child.native() == nullptr && child.stream() == nullptr;
      right[at(r)] =
          split && (r == 3 ? none : child.stream() == comm.stream() && exchange_numbers(child));
      nccl_communicator moved;
      moved = std::move(child);
      right[at(r)] = right[at(r)] && (r == 3 || exchange_numbers(moved));
    }
    right[at(r)] = right[at(r)] && exchange_numbers(comm);  // the parent lives
    mine.end(comm);
  });
  CHECK(sizes == std::vector{3, 1, 3, 0, 3});
  CHECK(ranks == std::vector{2, 0, 1, 0, 0});
  CHECK(right == std::vector<char>(5, true));
}

TEST_CASE("comm/nccl: the survivors go on in a smaller communicator, revoked before or not") {
  aborts_untold const untold;
  for (bool const revokes : {false, true}) {
    CAPTURE(revokes);
    std::vector<char> right(4, true);
    on_ranks(4,
             [&](nccl_communicator& comm, owner const& mine) {
               int const r = comm.rank();
               if (r == 1) return mine.end(comm, true);  // dies
               std::vector<int> in(4), out(4);
               bool good = static_cast<bool>(moe::all_to_all<int>(comm, in, out, late()));
               // With revokes the failure leaves a communicator; without, whoever wants to go on may not
               // wait by what aborts.
               if (revokes)
                 good =
                     good &&
                     comm.wait_for_stream(moe::within(30ms)).status == exchange_status::timeout &&
                     exchange_now(comm, {}, {}, late()).status == exchange_status::aborted;
               nccl_communicator smaller;
               good = good && comm.shrink(std::vector{1}, late(), smaller) && smaller.size() == 3 &&
                      smaller.rank() == (r == 0 ? 0 : r - 1) && exchange_numbers(smaller);
               nccl_communicator none;
               right[at(r)] = good && comm.native() != nullptr &&
                              comm.split(0, 0, late(), none).status == exchange_status::aborted;
               mine.end(comm, true);
             },
             {.revokes = revokes});
    CHECK(right == std::vector<char>(4, true));
  }
}

TEST_CASE("comm/nccl: a child that is revoked or aborted is freed") {
  aborts_untold const untold;
  std::vector<char> right(2);
  on_ranks(2, [&](nccl_communicator& comm, owner const& mine) {
    nccl_communicator a, b;
    right[at(comm.rank())] = comm.split(0, 0, late(), a) && comm.split(0, 0, late(), b) &&
                             a.revoke(late()) && a.native() != nullptr &&
                             a.revoke(late()).status == exchange_status::aborted;
    b.abort();
    mine.end(comm);
  });
  CHECK(right == std::vector<char>(2, true));
}

TEST_CASE("comm/nccl: groups by hand, of two communicators of one thread") {
  ncclUniqueId id;
  static_cast<void>(ncclGetUniqueId(&id));
  int const out[2] = {3, 4};
  int in[2] = {};
  {
    cudaStream_t streams[2];
    ncclComm_t comms[2];
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    for (int r = 0; r < 2; ++r) {
      static_cast<void>(cudaStreamCreate(&streams[r]));
      static_cast<void>(ncclCommInitRankConfig(&comms[r], 2, id, r, &config));
    }
    for (ncclComm_t const c : comms) CHECK(static_cast<bool>(wait_for_nccl(c, late())));
    {
      moe::nccl_group group;
      for (int r = 0; r < 2; ++r) {
        group.send(comms[r], streams[r], bytes_of(out[r], 1 - r));
        group.receive(comms[r], streams[r], room_in(in[r], 1 - r));
        group.send(comms[r], streams[r], {nullptr, 0, 1 - r});  // nothing: no message
      }
      CHECK(group.end() == outcome{exchange_status::pending});
      CHECK(group.end() == outcome{exchange_status::pending});
    }
    // The one waits for the other's message, so both have to be on their streams first.
    for (ncclComm_t const c : comms) CHECK(static_cast<bool>(wait_for_nccl(c, late())));
    nccl_communicator a(comms[0], streams[0]), b(comms[1], streams[1]);
    CHECK(static_cast<bool>(a.wait_for_stream(late())));
    CHECK(static_cast<bool>(b.wait_for_stream(late())));
    a.abort();
    b.abort();
    CHECK(a.native() == nullptr);
    for (cudaStream_t const s : streams) static_cast<void>(cudaStreamDestroy(s));
  }
  CHECK(in[0] == 4);
  CHECK(in[1] == 3);
  CHECK(nccl_standin::wrong_uses() == 0);
  CHECK(nccl_standin::alive() == 0);
}

TEST_CASE("comm/nccl: a group that fails starts nothing, and takes nothing after its end") {
  aborts_untold const untold;
  outcome const invalid{exchange_status::backend, -1, static_cast<int>(ncclInvalidArgument)};
  outcome const misused{exchange_status::backend, -1, static_cast<int>(ncclInvalidUsage)};
  std::vector<outcome> ends;
  int const out = 5;
  int in = 6;
  ncclUniqueId id;
  static_cast<void>(ncclGetUniqueId(&id));
  owner const mine(id, 1, 0);
  {
    moe::nccl_group group;
    group.send(mine.handle(), mine.stream(), bytes_of(out, 1));  // no such rank
    group.receive(mine.handle(), mine.stream(), room_in(in, 0));
    CHECK(group.end() == invalid);
  }
  CHECK(nccl_standin::wrong_uses() == 1);
  {
    moe::nccl_group group;
    CHECK(static_cast<bool>(group.end()));
    group.send(mine.handle(), mine.stream(), bytes_of(out, 0));
    CHECK(group.end() == misused);
  }
  CHECK(nccl_standin::wrong_uses() == 0);  // it was not NCCL that refused
  nccl_communicator comm = mine.communicator();
  CHECK(static_cast<bool>(comm.wait_for_stream(late())));
  CHECK(in == 6);
  mine.end(comm);
  CHECK(nccl_standin::alive() == 0);
}

TEST_CASE("comm/nccl: messages to itself are receives of the same group and length") {
  std::vector<outcome> ends;
  on_ranks(2, [&](nccl_communicator& comm, owner const& mine) {
    if (comm.rank() == 1) return mine.end(comm);
    int a = 1;
    double b = 0;
    outgoing const send = bytes_of(std::as_const(a), 0);
    incoming const receive = room_in(b, 0);
    nccl_communicator::ticket t;
    ends.push_back(comm.exchange(one(send), {}, t));
    ends.push_back(comm.exchange({}, one(receive), t));
    ends.push_back(comm.exchange(one(send), one(receive), t));
    mine.end(comm);
  });
  CHECK(ends == std::vector<outcome>(3, {exchange_status::wrong_length, 0}));
}

TEST_CASE("comm/nccl: a communicator without ranks, and broken preconditions") {
  using moe_test::refusal;
  using moe_test::says;
  nccl_communicator none, child;
  nccl_communicator::ticket t;
  outcome const aborted{exchange_status::aborted};
  CHECK(none.size() == 0);
  CHECK(none.exchange({}, {}, t) == aborted);
  CHECK(none.exchange_equal(nullptr, nullptr, 0, t) == aborted);
  CHECK(none.poll(t) == aborted);
  CHECK(none.copy(nullptr, nullptr, 0) == aborted);
  CHECK(none.wait_until_enqueued(late()) == aborted);
  CHECK(none.wait_for_stream(late()) == aborted);
  CHECK(none.split(0, 0, late(), child) == aborted);
  CHECK(none.shrink({}, late(), child) == aborted);
  CHECK(none.revoke(late()) == aborted);
  none.abort();
  says(refusal([] { nccl_communicator(nullptr, nullptr); }),
       "nccl_communicator: initialised by NCCL; got ncclResult_t = 4");
  std::vector<std::string> refused;
  on_ranks(1, [&](nccl_communicator& comm, owner const& mine) {
    for (int const r : {0, 1, -1})
      refused.push_back(
          refusal([&] { static_cast<void>(comm.shrink(std::vector{r}, late(), child)); }));
    mine.end(comm);
  });
  for (std::string const& text : refused)
    says(text, "nccl_communicator::shrink: excludes other ranks; got excluded = ");
}
