// A communicator that delays, reorders and dies, around another one.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <random>
#include <thread>
#include <vector>

#include <moe/comm/communicator.hpp>

namespace moe_test {

/// Thrown where a rank dies.
struct rank_died {};

/// Messages to different peers start in any order, and everything takes its time. `calls_to_live`
/// exchanges work; what follows is the death of this rank, before it sends or after.
template <moe::communicator C>
class disturbed {
 public:
  using memory_space = typename C::memory_space;
  using ticket = typename C::ticket;

  disturbed() = default;
  disturbed(C& inner, unsigned seed, int calls_to_live = 1 << 30, bool sends_before_death = false)
      : inner_(&inner),
        random_(seed),
        calls_to_live_(calls_to_live),
        sends_before_death_(sends_before_death) {}

  int rank() const noexcept { return inner_->rank(); }
  int size() const noexcept { return inner_->size(); }

  moe::outcome exchange(moe::vector_view<moe::outgoing const> sends,
                        moe::vector_view<moe::incoming const> receives, ticket& t) {
    bool const dies = calls_to_live_-- <= 0;
    if (dies && !sends_before_death_) throw rank_died{};
    if (random_() % 4 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_() % 300));
    std::vector<moe::outgoing> s(sends.begin(), sends.end());
    std::vector<moe::incoming> r(receives.begin(), receives.end());
    shuffle(s);
    shuffle(r);
    moe::outcome const result = inner_->exchange(s, r, t);
    for (int i = 0; dies && i < 50 && inner_->poll(t).status == moe::exchange_status::pending; ++i)
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    if (dies) throw rank_died{};
    return result;
  }
  moe::outcome poll(ticket& t) {
    if (!aborted_ && random_() % 3 == 0) return {moe::exchange_status::pending};
    return inner_->poll(t);
  }
  moe::outcome split(int color, int key, moe::deadline until, disturbed& child) {
    child.owned_.resize(1);
    child.inner_ = child.owned_.data();
    return inner_->split(color, key, until, child.owned_[0]);
  }
  void abort() noexcept {
    aborted_ = true;
    inner_->abort();
  }

 private:
  /// The order of messages to one peer stays.
  template <class Message>
  void shuffle(std::vector<Message>& messages) {
    std::vector<unsigned> key(static_cast<std::size_t>(size()));
    for (unsigned& k : key) k = random_() % 8;
    std::stable_sort(messages.begin(), messages.end(), [&](Message const& a, Message const& b) {
      return key[static_cast<std::size_t>(a.peer)] < key[static_cast<std::size_t>(b.peer)];
    });
  }

  C* inner_ = nullptr;
  std::vector<C> owned_;
  std::minstd_rand random_;
  int calls_to_live_ = 1 << 30;
  bool sends_before_death_ = false;
  bool aborted_ = false;
};

}  // namespace moe_test
