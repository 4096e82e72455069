// Runs a kernel body on the CPU, block by block, its threads as fibers, and finds where it is wrong.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include <moe/core/error.hpp>
#include <moe/core/thread_block.hpp>

#include "emulator/fiber.hpp"
#include "emulator/launched.hpp"
#include "emulator/sanitizers.hpp"

namespace moe_test {

/// Which thread runs next, at each wait of the one before. A fault may show under one of them only.
enum class schedule {
  in_order,       ///< By rising number.
  shuffled,       ///< At random.
  one_warp_ahead  ///< One warp, drawn at random, until it can go no further; then another one.
};
inline constexpr schedule schedules[] = {schedule::in_order, schedule::shuffled,
                                         schedule::one_warp_ahead};

/// The threads of a block or warp do not meet as they should, or a lane is named that is not there.
class divergence : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class emulated_block;

/// The order of all emulated threads after what precedes a launch and before what follows it.
class launch_order {
 public:
  launch_order() { release_order(&begin_); }
  launch_order(launch_order const&) = delete;
  launch_order& operator=(launch_order const&) = delete;
  ~launch_order() { acquire_order(&end_); }

  void begin_thread() { acquire_order(&begin_); }
  void end_thread() { release_order(&end_); }

 private:
  char begin_ = 0, end_ = 0;
};

/// Runs the threads of one block. Not for use by tests: see `launch`.
///
/// Between two waits a thread runs alone, so that plain runs cannot see every race. Under the thread
/// sanitizer each emulated thread is a thread to it, ordered with others by sync and sync_warp alone,
/// and blocks by nothing: then a missing barrier is a race in any schedule, reported by its lines.
class block_emulator {
 public:
  enum class operation { none, sync, sync_warp, shuffle, ballot, match_any, highest };

  block_emulator(schedule order, unsigned seed, int threads, int block, int blocks,
                 launch_order& outside)
      : order_(order),
        random_(seed),
        block_(block),
        blocks_(blocks),
        outside_(outside),
        states_(static_cast<std::size_t>(threads)),
        meetings_((states_.size() + moe::warp_size - 1) / moe::warp_size) {}

  /// Calls body(b) with an emulated_block& of every thread, once.
  /// @throws divergence; whatever a thread throws.
  template <class Body>
  void run(Body const& body);

  int threads() const { return static_cast<int>(states_.size()); }
  int block() const { return block_; }
  int blocks() const { return blocks_; }

  void sync(int thread, moe::call_site site);

  /// One thread's part in a call of the lanes of its warp; gives its result.
  std::uint64_t meet(int thread, operation what, std::uint32_t lanes, std::uint64_t operand,
                     int from, moe::call_site site);

 private:
  enum class status { ready, at_block, at_warp, ended };

  struct thread_state {
    fiber runs;
    bool started = false;
    status is = status::ready;
    operation what = operation::none;
    moe::call_site site{};
    std::uint64_t operand = 0;
    int from = 0;  ///< The lane whose operand is the result of a shuffle.
    std::uint64_t result = 0;
  };

  /// Some lanes of a warp that are on their way into or out of a call together.
  struct meeting {
    operation what = operation::none;
    moe::call_site site{};
    std::uint32_t lanes = 0;
    std::uint32_t arrived = 0;
    std::uint32_t left = 0;
    char token = 0;  ///< Stands for the order that it makes.
  };

  /// Thrown in the threads that wait when another one has failed.
  struct abandoned {};

  struct block_barrier {
    int arrived = 0;
    moe::call_site site{};
    char token = 0;
  };

  static constexpr std::size_t stack_bytes = 256 << 10;  // only what is used takes memory
  static constexpr std::byte untouched{0xA5};

  thread_state& state_of(int thread) { return states_[static_cast<std::size_t>(thread)]; }

  void wait(thread_state& me);
  meeting& join(int first_thread, operation what, std::uint32_t lanes, moe::call_site site);
  void complete(int first_thread, meeting const& m);
  int next_thread();
  void run_threads();
  [[noreturn]] void fail(std::string const& why) const;
  std::string whereabouts() const;

  template <class Body>
  struct entry;

  schedule order_;
  std::minstd_rand random_;
  int block_, blocks_;
  launch_order& outside_;
  std::vector<thread_state> states_;
  /// [warp][i]: those of the same lowest lane l are at i = l, l + 32, ...
  std::vector<std::array<meeting, 4 * moe::warp_size>> meetings_;
  block_barrier barriers_[2];  ///< In turn, as a thread may reach one while others leave the last.
  int barrier_ = 0;
  int last_ = -1;  ///< The thread that ran last.
  std::exception_ptr failure_;
};

/// A model of thread_block: one emulated thread's view of its block.
class emulated_block {
 public:
  emulated_block(block_emulator& emulator, int thread) : emulator_(&emulator), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const { return emulator_->threads(); }
  int block() const { return emulator_->block(); }
  int blocks() const { return emulator_->blocks(); }

  void sync(moe::call_site site = moe::call_site::here()) { emulator_->sync(thread_, site); }
  void sync_warp(std::uint32_t lanes, moe::call_site site = moe::call_site::here()) {
    emulator_->meet(thread_, operation::sync_warp, lanes, 0, 0, site);
  }
  template <class T>
  T shuffle(std::uint32_t lanes, T value, int lane, moe::call_site site = moe::call_site::here()) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    std::uint64_t operand = 0;
    std::memcpy(&operand, &value, sizeof value);
    auto const result = emulator_->meet(thread_, operation::shuffle, lanes, operand, lane, site);
    std::memcpy(&value, &result, sizeof value);
    return value;
  }
  template <class T>
  T shuffle_xor(std::uint32_t lanes, T value, int bits,
                moe::call_site site = moe::call_site::here()) {
    return shuffle(lanes, value, lane() ^ bits, site);
  }
  template <class T>
  T shuffle_up(std::uint32_t lanes, T value, int distance,
               moe::call_site site = moe::call_site::here()) {
    return shuffle(lanes, value, lane() < distance ? lane() : lane() - distance, site);
  }
  std::uint32_t ballot(std::uint32_t lanes, bool holds,
                       moe::call_site site = moe::call_site::here()) {
    return static_cast<std::uint32_t>(
        emulator_->meet(thread_, operation::ballot, lanes, holds ? 1 : 0, 0, site));
  }
  std::uint32_t match_any(std::uint32_t lanes, std::int32_t key,
                          moe::call_site site = moe::call_site::here()) {
    auto const operand = static_cast<std::uint64_t>(static_cast<std::uint32_t>(key));
    return static_cast<std::uint32_t>(
        emulator_->meet(thread_, operation::match_any, lanes, operand, 0, site));
  }
  std::uint32_t highest(std::uint32_t lanes, std::uint32_t value,
                        moe::call_site site = moe::call_site::here()) {
    return static_cast<std::uint32_t>(
        emulator_->meet(thread_, operation::highest, lanes, value, 0, site));
  }
  std::int32_t atomic_add(std::int32_t* counter, std::int32_t n) {
    return __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
  }
  std::int64_t atomic_add(std::int64_t* counter, std::int64_t n) {
    return __atomic_fetch_add(counter, n, __ATOMIC_RELAXED);
  }
  std::int32_t arrive(std::int32_t* counter) {
    return __atomic_fetch_add(counter, 1, __ATOMIC_ACQ_REL);
  }
  // Launches run one after the other.
  void wait_for_previous() {}
  void let_next_start() {}

 private:
  using operation = block_emulator::operation;

  int lane() const { return thread_ % moe::warp_size; }

  block_emulator* emulator_;
  int thread_;
};

static_assert(moe::thread_block<emulated_block>);

/// Runs a kernel body as run_kernel<<<blocks, Kernel::threads>>>(kernel, args...) would.
///
/// Shared memory is an object of its own for every block: bytes 0xCD at first, and 0 under the
/// thread sanitizer, which then reports a read that comes too early instead of a crash it led to.
/// The thread sanitizer follows at most 255 threads exactly: with more in the blocks of a launch
/// together it may miss a race, but reports none that is not there.
/// Not emulated: the weak order of real memory, and blocks that wait for one another.
/// @throws divergence; whatever the kernel throws, which a GPU could not.
template <class Kernel, class... Args>
void launch(schedule order, unsigned seed, int blocks, Kernel const& kernel, Args const&... args) {
  using shared = typename Kernel::shared;
  static_assert(std::is_trivially_default_constructible_v<shared>);
  unobserved const emulator_only;
  constexpr char const* names[] = {"in_order", "shuffled", "one_warp_ahead"};
  launched::add<Kernel>(has_thread_sanitizer ? "races" : names[static_cast<int>(order)]);
  struct room {
    alignas(shared) std::byte bytes[sizeof(shared)];
  };
  launch_order outside;
  std::vector<std::unique_ptr<block_emulator>> emulators;
  for (int block = 0; block < blocks; ++block) {
    auto const memory = std::make_unique<room>();
    std::memset(memory->bytes, has_thread_sanitizer ? 0 : 0xCD, sizeof(shared));
    auto& s = reinterpret_cast<shared&>(*memory->bytes);
    // Kept until the end: to the thread sanitizer a fiber that takes the place of another goes on
    // where that one ended.
    emulators.push_back(std::make_unique<block_emulator>(order, seed + static_cast<unsigned>(block),
                                                         Kernel::threads, block, blocks, outside));
    emulators.back()->run([&](emulated_block& b) { kernel(b, s, args...); });
  }
}

template <int Threads, class Shared, class Body>
struct body_kernel {
  static constexpr int threads = Threads;
  using shared = Shared;
  Body const* body;

  void operator()(emulated_block& b, shared& s) const { (*body)(b, s); }
};

/// The same for a lambda: body(b, shared), with `Threads` threads to a block.
template <int Threads, class Shared, class Body>
void launch_body(schedule order, unsigned seed, int blocks, Body const& body) {
  launch(order, seed, blocks, body_kernel<Threads, Shared, Body>{&body});
}

// --------------------------------------------------------------------------------------------------

template <class Body>
struct block_emulator::entry {
  block_emulator* emulator;
  Body const* body;
  int thread;

  static void start(void* context) {
    auto& self = *static_cast<entry*>(context);
    self.emulator->outside_.begin_thread();
    try {
      emulated_block b(*self.emulator, self.thread);
      (*self.body)(b);
    } catch (...) {
      unobserved const emulator_only;
      if (!self.emulator->failure_) self.emulator->failure_ = std::current_exception();
    }
    unobserved const emulator_only;
    self.emulator->outside_.end_thread();
    self.emulator->state_of(self.thread).is = status::ended;
  }
};

template <class Body>
void block_emulator::run(Body const& body) {
  std::size_t const n = states_.size();
  std::unique_ptr<std::byte[]> const stacks(new std::byte[n * stack_bytes]);
  std::vector<entry<Body>> entries(n);
  for (std::size_t t = 0; t < n; ++t) {
    entries[t] = {this, &body, static_cast<int>(t)};
    stacks[t * stack_bytes] = untouched;
    states_[t].runs.start(entry<Body>::start, &entries[t], &stacks[t * stack_bytes], stack_bytes);
  }
  run_threads();
  for (std::size_t t = 0; t < n; ++t)
    if (stacks[t * stack_bytes] != untouched) fail("stack overflow of an emulated thread");
}

inline void block_emulator::run_threads() {
  for (int t = next_thread(); t >= 0 && !failure_; t = next_thread()) {
    last_ = t;
    state_of(t).started = true;
    state_of(t).runs.resume();
  }
  try {
    for (thread_state const& s : states_)
      if (s.is != status::ended && !failure_) fail("some threads wait for others that never come");
  } catch (divergence const&) {
    failure_ = std::current_exception();
  }
  if (!failure_) return;
  for (thread_state& s : states_)  // their stacks have to be unwound
    if (s.started && s.is != status::ended) s.runs.resume();
  std::rethrow_exception(failure_);
}

/// Until the thread may go on.
inline void block_emulator::wait(thread_state& me) {
  me.runs.pause();
  if (failure_) throw abandoned{};
}

/// The next thread that can run, or -1.
inline int block_emulator::next_thread() {
  auto const first_ready = [&](int first, int begin, int end) {  // from `first` on, around
    for (int i = 0; i < end - begin; ++i) {
      int const t = begin + (first - begin + i) % (end - begin);
      if (state_of(t).is == status::ready) return t;
    }
    return -1;
  };
  if (order_ == schedule::in_order) return first_ready(last_ + 1, 0, threads());
  if (order_ == schedule::one_warp_ahead && last_ >= 0) {
    int const begin = last_ / moe::warp_size * moe::warp_size;
    int const t = first_ready(last_ + 1, begin, std::min(begin + moe::warp_size, threads()));
    if (t >= 0) return t;
  }
  return first_ready(static_cast<int>(random_() % static_cast<unsigned>(threads())), 0, threads());
}

inline void block_emulator::sync(int thread, moe::call_site site) {
  unobserved const emulator_only;
  thread_state& me = state_of(thread);
  block_barrier& b = barriers_[barrier_];
  me.what = operation::sync;
  me.site = site;
  me.is = status::at_block;
  if (b.arrived == 0) b.site = site;
  if (b.site.line != site.line || std::strcmp(b.site.file, site.file) != 0)
    fail("threads of a block are at different calls of sync");
  release_order(&b.token);
  if (++b.arrived == threads()) {
    b.arrived = 0;
    barrier_ = 1 - barrier_;
    for (thread_state& s : states_) s.is = status::ready;
  }
  wait(me);
  acquire_order(&b.token);
}

inline std::uint64_t block_emulator::meet(int thread, operation what, std::uint32_t lanes,
                                          std::uint64_t operand, int from, moe::call_site site) {
  unobserved const emulator_only;
  int const first_thread = thread / moe::warp_size * moe::warp_size;
  int const warp_threads = std::min(moe::warp_size, threads() - first_thread);
  auto const has = [&](int lane) { return (lanes >> lane & 1u) != 0; };
  thread_state& me = state_of(thread);
  me.what = what;
  me.site = site;
  me.is = status::at_warp;
  me.operand = operand;
  me.from = from;
  if (!has(thread - first_thread)) fail("a thread is not among the lanes that it names");
  if (warp_threads < moe::warp_size && lanes >> warp_threads != 0)
    fail("a thread names lanes that the block does not have");
  if (what == operation::shuffle && (from < 0 || from >= moe::warp_size || !has(from)))
    fail("a shuffle reads a lane that takes no part in it");

  meeting& m = join(first_thread, what, lanes, site);
  std::uint32_t const own = std::uint32_t(1) << (thread - first_thread);
  if (what == operation::sync_warp) release_order(&m.token);
  m.arrived |= own;
  if (m.arrived == lanes) complete(first_thread, m);
  wait(me);
  if (what == operation::sync_warp) acquire_order(&m.token);
  m.left |= own;
  if (m.left == lanes) m.lanes = m.arrived = m.left = 0;
  return me.result;
}

/// The meeting that other lanes opened by the same call and mask, or else a new one.
inline block_emulator::meeting& block_emulator::join(int first_thread, operation what,
                                                     std::uint32_t lanes, moe::call_site site) {
  auto& meetings = meetings_[static_cast<std::size_t>(first_thread / moe::warp_size)];
  auto const lowest = static_cast<std::size_t>(__builtin_ctz(lanes));
  // The sanitizer's orders by a used token hold for its later users, too. That is right here: the
  // lowest lane took part in both.
  meeting* unused = nullptr;
  for (std::size_t i = lowest; i < meetings.size(); i += moe::warp_size) {
    meeting& m = meetings[i];
    if (m.lanes == 0 && unused == nullptr) unused = &m;
    if (m.lanes == lanes && m.arrived != lanes && m.what == what && m.site.line == site.line &&
        std::strcmp(m.site.file, site.file) == 0)
      return m;
  }
  if (unused == nullptr) fail("lanes of a warp are at too many different calls");
  unused->what = what;
  unused->site = site;
  unused->lanes = lanes;
  return *unused;
}

/// All lanes of a meeting are there: each gets its result and can go on.
inline void block_emulator::complete(int first_thread, meeting const& m) {
  auto const each = [&](auto const& f) {
    for (int lane = 0; lane < moe::warp_size; ++lane)
      if ((m.lanes >> lane & 1u) != 0) f(lane, state_of(first_thread + lane));
  };
  auto const lanes_with = [&](std::uint64_t operand) {
    std::uint64_t found = 0;
    each([&](int lane, thread_state const& s) {
      found |= std::uint64_t(s.operand == operand) << lane;
    });
    return found;
  };
  std::uint64_t const holding = m.what == operation::ballot ? lanes_with(1) : 0;
  std::uint64_t greatest = 0;
  each([&](int, thread_state const& s) { greatest = std::max(greatest, s.operand); });
  each([&](int, thread_state& s) {
    s.is = status::ready;
    if (m.what == operation::shuffle) s.result = state_of(first_thread + s.from).operand;
    if (m.what == operation::ballot) s.result = holding;
    if (m.what == operation::match_any) s.result = lanes_with(s.operand);
    if (m.what == operation::highest) s.result = greatest;
  });
}

inline void block_emulator::fail(std::string const& why) const {
  throw divergence("block " + std::to_string(block_) + ": " + why + ":" + whereabouts());
}

/// Where the threads are, those at the same place together.
inline std::string block_emulator::whereabouts() const {
  static constexpr char const* names[] = {"",       "sync",      "sync_warp", "shuffle",
                                          "ballot", "match_any", "highest"};
  auto const place = [](thread_state const& s) -> std::string {
    if (s.is == status::ended) return "at the end";
    if (s.is == status::ready) return "on the way";
    return std::string("at ") + names[static_cast<int>(s.what)] + " (" + s.site.file + ":" +
           std::to_string(s.site.line) + ")";
  };
  std::string text;
  for (std::size_t first = 0; first < states_.size();) {
    std::size_t end = first + 1;
    while (end < states_.size() && place(states_[end]) == place(states_[first])) ++end;
    text += (first == 0 ? " threads " : ", ") + std::to_string(first) + "-" +
            std::to_string(end - 1) + " " + place(states_[first]);
    first = end;
  }
  return text;
}

}  // namespace moe_test
