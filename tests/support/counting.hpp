// A communicator that counts what it sends, around another one.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <vector>

#include <moe/comm/communicator.hpp>

namespace moe_test {

/// Messages and bytes to other ranks.
template <moe::communicator C>
class counting {
 public:
  using memory_space = typename C::memory_space;
  using ticket = typename C::ticket;

  counting() = default;
  explicit counting(C& inner) : inner_(&inner) {}

  int rank() const noexcept { return inner_->rank(); }
  int size() const noexcept { return inner_->size(); }
  moe::outcome exchange(moe::vector_view<moe::outgoing const> sends,
                        moe::vector_view<moe::incoming const> receives, ticket& t) {
    for (moe::outgoing const& s : sends)
      if (s.peer != rank()) {
        ++messages;
        bytes += static_cast<std::int64_t>(s.bytes);
      }
    return inner_->exchange(sends, receives, t);
  }
  moe::outcome poll(ticket& t) { return inner_->poll(t); }
  moe::outcome split(int color, int key, moe::deadline until, counting& child) {
    child.owned_.resize(1);
    child.inner_ = child.owned_.data();
    return inner_->split(color, key, until, child.owned_[0]);
  }
  void abort() noexcept { inner_->abort(); }

  std::int64_t messages = 0;
  std::int64_t bytes = 0;

 private:
  C* inner_ = nullptr;
  std::vector<C> owned_;
};

}  // namespace moe_test
