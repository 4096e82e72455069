// The communicator of R ranks that are threads of one process.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/split_members.hpp>
#include <moe/comm/detail/thread_lanes.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// A rank's end of a thread_world. Each belongs to one thread at a time.
///
/// A receiver copies straight from the sender's memory: one copy of each message, and no memory that
/// grows with messages. A ticket keeps its arrays, so exchanges that reuse one allocate nothing once
/// it has seen the largest.
class thread_communicator {
 public:
  using memory_space = host_memory;

  /// One exchange under way. Destroying it takes back what no peer has copied yet.
  class ticket {
   public:
    ticket() = default;
    ticket(ticket const&) = delete;
    ticket& operator=(ticket const&) = delete;
    ~ticket() { clear(); }

   private:
    friend thread_communicator;
    struct awaited {
      incoming to;
      std::uint64_t number;
    };

    void clear() noexcept {
      for (std::size_t i = 0; i < posts_in_use_; ++i) {
        detail::thread_post& post = posts_[i];
        if (post.taken.load(std::memory_order_acquire)) continue;
        detail::thread_lane& lane = context_->lane(rank_, post.peer);
        std::lock_guard const lock(lane.mutex);
        for (detail::thread_post** p = &lane.first; *p != nullptr; p = &(*p)->next)
          if (*p == &post) {
            *p = post.next;
            break;
          }
      }
      posts_in_use_ = 0;
      awaited_.clear();
    }

    std::shared_ptr<detail::thread_context> context_;
    int rank_ = 0;
    std::vector<detail::thread_post> posts_;
    std::size_t posts_in_use_ = 0;
    std::vector<awaited> awaited_;
  };

  /// Of no ranks, until split has made it one.
  thread_communicator() = default;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return context_ == nullptr ? 0 : context_->size(); }

  outcome exchange(vector_view<outgoing const> sends, vector_view<incoming const> receives,
                   ticket& t) {
    if (is_over()) return {exchange_status::aborted};
    if (t.posts_in_use_ > 0 || !t.awaited_.empty()) return {exchange_status::in_use};
    for (outgoing const& s : sends)
      if (s.peer < 0 || s.peer >= size()) return {exchange_status::no_such_peer, s.peer};
    for (incoming const& r : receives)
      if (r.peer < 0 || r.peer >= size()) return {exchange_status::no_such_peer, r.peer};

    t.context_ = context_;
    t.rank_ = rank_;
    auto const count = static_cast<std::size_t>(sends.size());
    if (t.posts_.size() < count) t.posts_ = std::vector<detail::thread_post>(count);
    t.awaited_.reserve(static_cast<std::size_t>(receives.size()));
    for (outgoing const& s : sends) {
      detail::thread_post& post = t.posts_[t.posts_in_use_++];
      detail::thread_lane& lane = context_->lane(rank_, s.peer);
      post.data = s.data;
      post.bytes = s.bytes;
      post.peer = s.peer;
      post.next = nullptr;
      post.taken.store(false, std::memory_order_relaxed);
      std::lock_guard const lock(lane.mutex);
      post.number = lane.sent++;
      detail::thread_post** last = &lane.first;
      while (*last != nullptr) last = &(*last)->next;
      *last = &post;
    }
    for (incoming const& r : receives) {
      detail::thread_lane& lane = context_->lane(r.peer, rank_);
      std::lock_guard const lock(lane.mutex);
      t.awaited_.push_back({r, lane.expected++});
    }
    return {};
  }

  outcome poll(ticket& t) {
    if (is_over()) return {exchange_status::aborted};
    outcome result;
    // Trouble is told before what is merely not done yet: a rank may wait for several peers.
    auto const missing = [&](int peer, bool failed) {
      if (failed)
        result = {exchange_status::peer_failed, peer};
      else if (result)
        result = {exchange_status::pending, peer};
    };
    for (std::size_t i = 0; i < t.awaited_.size();) {
      incoming const& to = t.awaited_[i].to;
      bool const failed =
          context_->is_gone(to.peer);  // before looking: it may have sent, then gone
      switch (take(t.awaited_[i])) {
        case taking::yes:
          t.awaited_.erase(t.awaited_.begin() + static_cast<std::ptrdiff_t>(i));
          break;
        case taking::other_length:
          return {exchange_status::wrong_length, to.peer};
        case taking::no:
          missing(to.peer, failed);
          ++i;
      }
    }
    for (std::size_t i = 0; i < t.posts_in_use_; ++i) {
      bool const failed = context_->is_gone(t.posts_[i].peer);
      if (!t.posts_[i].taken.load(std::memory_order_acquire)) missing(t.posts_[i].peer, failed);
    }
    if (result) t.posts_in_use_ = 0;
    return result;
  }

  outcome split(int color, int key, deadline until, thread_communicator& child) {
    child = {};
    std::vector<int> members;  // as this communicator counts, then as the world does
    outcome const told = detail::members_of_split(*this, color, key, until, members);
    if (!told) return told;
    int const generation = splits_++;
    if (color < 0) return {};
    child.rank_ =
        static_cast<int>(std::find(members.begin(), members.end(), rank_) - members.begin());
    for (int& m : members) m = context_->members[static_cast<std::size_t>(m)];
    // The first member that comes here makes the context, the last one forgets it.
    std::lock_guard const lock(context_->children_mutex);
    auto& children = context_->children;
    auto found = std::find_if(children.begin(), children.end(), [&](auto const& c) {
      return c.generation == generation && c.color == color;
    });
    if (found == children.end()) {
      int const count = static_cast<int>(members.size());
      auto context = std::make_shared<detail::thread_context>(std::move(members), context_->dead);
      found = children.insert(found, {generation, color, count, std::move(context)});
    }
    child.context_ = found->context;
    if (--found->left == 0) children.erase(found);
    return {};
  }

  void abort() noexcept {
    if (context_ == nullptr) return;
    context_->aborted[static_cast<std::size_t>(rank_)].store(true, std::memory_order_release);
    for (int r = 0; r < size(); ++r) {
      detail::thread_lane& lane = context_->lane(rank_, r);
      std::lock_guard const lock(lane.mutex);
      lane.first = nullptr;
    }
  }

 private:
  friend class thread_world;
  enum class taking { yes, no, other_length };

  thread_communicator(std::shared_ptr<detail::thread_context> context, int rank)
      : context_(std::move(context)), rank_(rank) {}

  bool is_over() const { return context_ == nullptr || context_->is_gone(rank_); }

  taking take(ticket::awaited const& a) {
    detail::thread_lane& lane = context_->lane(a.to.peer, rank_);
    std::lock_guard const lock(lane.mutex);
    for (detail::thread_post** p = &lane.first; *p != nullptr; p = &(*p)->next) {
      detail::thread_post& post = **p;
      if (post.number != a.number) continue;
      if (post.bytes != a.to.bytes) return taking::other_length;
      if (post.bytes > 0) std::memcpy(a.to.data, post.data, post.bytes);
      *p = post.next;
      post.taken.store(true, std::memory_order_release);  // the last touch: the ticket may go now
      return taking::yes;
    }
    return taking::no;
  }

  std::shared_ptr<detail::thread_context> context_;
  int rank_ = 0;
  int splits_ = 0;
};
static_assert(communicator<thread_communicator>);

/// R ranks in one process, for tests and for machines with several sockets. Ranks are whatever threads
/// use its communicators; `run` makes some.
class thread_world {
 public:
  /// @throws precondition_error if R < 1.
  explicit thread_world(int R, call_site site = call_site::here()) {
    expects(R >= 1, "thread_world: R >= 1", site, {{"R", R}});
    std::vector<int> members(static_cast<std::size_t>(R));
    std::iota(members.begin(), members.end(), 0);
    dead_ = std::make_shared<std::vector<std::atomic<bool>>>(static_cast<std::size_t>(R));
    context_ = std::make_shared<detail::thread_context>(std::move(members), dead_);
  }

  int size() const noexcept { return context_->size(); }

  /// The end of one rank. All ends of a rank are the same rank: use one.
  thread_communicator communicator(int rank, call_site site = call_site::here()) const {
    expects(rank >= 0 && rank < size(), "thread_world::communicator: 0 <= rank < R", site,
            {{"rank", rank}, {"R", size()}});
    return {context_, rank};
  }

  /// The rank counts as dead from now on, in all communicators of this world: peers that wait for it
  /// end with `peer_failed`, and its own calls with `aborted`.
  void kill(int rank, call_site site = call_site::here()) {
    expects(rank >= 0 && rank < size(), "thread_world::kill: 0 <= rank < R", site,
            {{"rank", rank}, {"R", size()}});
    (*dead_)[static_cast<std::size_t>(rank)].store(true, std::memory_order_release);
  }

  /// Calls f(communicator) for each rank, on a thread of its own, and waits for all. A rank whose f
  /// throws is dead from then on.
  /// @throws what f threw, of the lowest rank that did.
  template <class F>
  void run(F&& f) {
    std::vector<std::exception_ptr> failures(static_cast<std::size_t>(size()));
    std::vector<std::thread> threads;
    auto const start = [&](int r) {
      thread_communicator end(context_, r);
      try {
        f(end);
      } catch (...) {
        failures[static_cast<std::size_t>(r)] = std::current_exception();
        kill(r);
      }
    };
    try {
      for (int r = 0; r < size(); ++r) threads.emplace_back(start, r);
    } catch (...) {  // no more threads: the others must not wait for those that are missing
      for (int r = static_cast<int>(threads.size()); r < size(); ++r) kill(r);
      for (std::thread& t : threads) t.join();
      throw;
    }
    for (std::thread& t : threads) t.join();
    for (std::exception_ptr const& failure : failures)
      if (failure) std::rethrow_exception(failure);
  }

 private:
  std::shared_ptr<std::vector<std::atomic<bool>>> dead_;
  std::shared_ptr<detail::thread_context> context_;
};

}  // namespace moe::inline MOE_ABI
