// What ranks that are threads share: a lane for the messages from each to each.
// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <moe/core/config.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// A message that waits in its lane until the receiver has copied it: in the sender's ticket.
struct thread_post {
  std::byte const* data = nullptr;
  std::size_t bytes = 0;
  std::uint64_t number = 0;
  int peer = 0;
  thread_post* next = nullptr;
  std::atomic<bool> taken{false};
};

/// Messages from one rank to another. The receiver copies under the lock, so that a sender who takes
/// its messages back knows that nobody reads them any more.
struct thread_lane {
  std::mutex mutex;
  thread_post* first = nullptr;
  std::uint64_t sent = 0;      // the sender's
  std::uint64_t expected = 0;  // the receiver's
};

/// What the ranks of one communicator share.
struct thread_context {
  thread_context(std::vector<int> ranks, std::shared_ptr<std::vector<std::atomic<bool>>> who_died)
      : members(std::move(ranks)),
        dead(std::move(who_died)),
        lanes(members.size() * members.size()),
        aborted(members.size()) {}

  int size() const noexcept { return static_cast<int>(members.size()); }
  thread_lane& lane(int from, int to) {
    return lanes[static_cast<std::size_t>(from) * members.size() + static_cast<std::size_t>(to)];
  }
  bool is_dead(int rank) const {
    auto const world_rank = static_cast<std::size_t>(members[static_cast<std::size_t>(rank)]);
    return (*dead)[world_rank].load(std::memory_order_acquire);
  }
  bool has_aborted(int rank) const {
    return aborted[static_cast<std::size_t>(rank)].load(std::memory_order_acquire);
  }
  bool is_gone(int rank) const { return is_dead(rank) || has_aborted(rank); }

  struct child {
    int generation, color, left;
    std::shared_ptr<thread_context> context;
  };

  std::vector<int> members;  // ranks of the world
  std::shared_ptr<std::vector<std::atomic<bool>>> dead;
  std::vector<thread_lane> lanes;
  std::vector<std::atomic<bool>> aborted;
  std::mutex children_mutex;
  std::vector<child> children;  // of splits that not all members have left
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
