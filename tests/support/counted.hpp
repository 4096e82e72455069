// A communicator that counts what it sends, by class of links, around another one.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <utility>

#include <moe/comm/communicator.hpp>
#include <moe/comm/topology.hpp>

namespace moe_test {

/// Messages between different ranks: of one node, or of different nodes.
struct link_counts {
  std::int64_t messages = 0;
  std::int64_t bytes = 0;

  friend bool operator==(link_counts const&, link_counts const&) = default;
};

template <moe::communicator C>
class counted {
 public:
  using memory_space = typename C::memory_space;
  using ticket = typename C::ticket;

  counted() = default;
  /// @param ranks  All ranks of `inner`.
  counted(C inner, moe::topology ranks) : inner_(std::move(inner)), ranks_(std::move(ranks)) {}

  int rank() const noexcept { return inner_.rank(); }
  int size() const noexcept { return inner_.size(); }

  moe::outcome exchange(moe::vector_view<moe::outgoing const> sends,
                        moe::vector_view<moe::incoming const> receives, ticket& t) {
    for (moe::outgoing const& s : sends) {
      if (s.peer == inner_.rank()) continue;
      link_counts& link =
          ranks_.node(s.peer) == ranks_.node(inner_.rank()) ? within_nodes : between_nodes;
      ++link.messages;
      link.bytes += static_cast<std::int64_t>(s.bytes);
    }
    return inner_.exchange(sends, receives, t);
  }
  moe::outcome poll(ticket& t) { return inner_.poll(t); }
  moe::outcome split(int color, int key, moe::deadline until, counted& child) {
    return inner_.split(color, key, until, child.inner_);
  }
  void abort() noexcept { inner_.abort(); }

  link_counts within_nodes, between_nodes;

 private:
  C inner_;
  moe::topology ranks_ = moe::topology::even(1, 1);
};

}  // namespace moe_test
