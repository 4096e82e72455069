// Ranks over the stand-in of NCCL: threads, each with a stream and a communicator.
// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>
#include <nccl.h>
#include <support/nccl_owner.hpp>
#include <vector>

#include "comm/nccl_standin/nccl_standin.hpp"

namespace moe_test {

/// f(communicator, owner) on a thread for each rank; afterwards nothing was wrong, and all is freed.
template <class F>
void on_ranks(int R, F const& f, nccl_options options = {}, bool is_blocking = false) {
  ncclUniqueId id;
  static_cast<void>(ncclGetUniqueId(&id));
  std::vector<char> ready(at(R));
  on_threads(R, [&](int r) {
    owner const mine(id, R, r, is_blocking);
    ready[at(r)] = mine.is_ready();
    nccl_communicator comm = mine.communicator(options);
    f(comm, mine);
  });
  CHECK(ready == std::vector<char>(at(R), true));
  CHECK(nccl_standin::wrong_uses() == 0);
  CHECK(nccl_standin::alive() == 0);
}

/// Turns off for its scope that ranks hear of those that have aborted.
struct aborts_untold {
  aborts_untold() { nccl_standin::tell_of_aborts(false); }
  ~aborts_untold() { nccl_standin::tell_of_aborts(true); }
};

}  // namespace moe_test
