// The communicator of one rank: what it sends, it receives.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <cstring>

#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Rank 0 of 1: a layer on one rank needs no case of its own. Send i of a group is receive i of the
/// same group.
class self_communicator {
 public:
  using memory_space = host_memory;
  struct ticket {};

  int rank() const noexcept { return 0; }
  int size() const noexcept { return 1; }

  outcome exchange(vector_view<outgoing const> sends, vector_view<incoming const> receives,
                   ticket&) {
    if (aborted_) return {exchange_status::aborted};
    for (outgoing const& s : sends)
      if (s.peer != 0) return {exchange_status::no_such_peer, s.peer};
    for (incoming const& r : receives)
      if (r.peer != 0) return {exchange_status::no_such_peer, r.peer};
    if (sends.size() != receives.size()) return {exchange_status::wrong_length, 0};
    for (std::int64_t i = 0; i < sends.size(); ++i) {
      if (sends[i].bytes != receives[i].bytes) return {exchange_status::wrong_length, 0};
      if (sends[i].bytes > 0) std::memmove(receives[i].data, sends[i].data, sends[i].bytes);
    }
    return {};
  }
  outcome poll(ticket&) { return {aborted_ ? exchange_status::aborted : exchange_status::ok}; }
  outcome split(int, int, deadline, self_communicator& child) {
    child.aborted_ = aborted_;
    return {aborted_ ? exchange_status::aborted : exchange_status::ok};
  }
  void abort() noexcept { aborted_ = true; }

 private:
  bool aborted_ = false;
};
static_assert(communicator<self_communicator>);

}  // namespace moe::inline MOE_ABI
