// Messages between GPUs by NCCL: groups of them, and what its codes mean.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <utility>

#include <moe/comm/communicator.hpp>
#include <moe/core/config.hpp>

#if NCCL_VERSION_CODE < NCCL_VERSION(2, 18, 0)
#error "moe: comm/nccl_group.cuh needs NCCL 2.18 or later, which has ncclCommSplit"
#endif

namespace moe::inline MOE_ABI {

namespace detail {

/// What a code of NCCL means for an exchange. NCCL never says which peer it was.
constexpr outcome nccl_outcome(ncclResult_t code) noexcept {
  auto const native = static_cast<int>(code);
  switch (code) {
    case ncclSuccess:
      return {};
    case ncclInProgress:
      return {exchange_status::pending};
    case ncclRemoteError:
      return {exchange_status::peer_failed, -1, native};
    default:
      return {exchange_status::backend, -1, native};
  }
}

/// The same for the runtime, whose codes are told from NCCL's by their sign.
constexpr outcome cuda_outcome(cudaError_t code) noexcept {
  if (code == cudaSuccess) return {};
  if (code == cudaErrorNotReady) return {exchange_status::pending};
  return {exchange_status::backend, -1, -static_cast<int>(code)};
}

}  // namespace detail

/// How the last call to a communicator of NCCL has ended; `pending` if it has not. Never blocks.
inline outcome nccl_state(ncclComm_t comm) noexcept {
  ncclResult_t state = ncclSuccess;
  ncclResult_t const asked = ncclCommGetAsyncError(comm, &state);
  return detail::nccl_outcome(asked != ncclSuccess ? asked : state);
}

/// Waits for that end: after ncclCommInitRankConfig with blocking = 0, say. `timeout` leaves the
/// communicator as it is.
inline outcome wait_for_nccl(ncclComm_t comm, deadline until) {
  return wait([comm] { return nccl_state(comm); }, [] {}, until);
}

/// Messages that start together, from ncclGroupStart to ncclGroupEnd. There is no other way to send or
/// to receive: a message outside of a group does not compile.
///
/// Belongs to the thread that made it. It may have messages of several communicators, of several GPUs
/// that one thread serves. Empty messages are left out, on both sides.
class nccl_group {
 public:
  nccl_group() noexcept : code_(ncclGroupStart()), is_open_(code_ == ncclSuccess) {}
  nccl_group(nccl_group const&) = delete;
  nccl_group& operator=(nccl_group const&) = delete;
  ~nccl_group() { static_cast<void>(end()); }

  void send(ncclComm_t comm, cudaStream_t stream, outgoing const& message) noexcept {
    if (accepts() && message.bytes > 0)
      note(ncclSend(message.data, message.bytes, ncclUint8, message.peer, comm, stream));
  }
  void receive(ncclComm_t comm, cudaStream_t stream, incoming const& message) noexcept {
    if (accepts() && message.bytes > 0)
      note(ncclRecv(message.data, message.bytes, ncclUint8, message.peer, comm, stream));
  }
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 3)
  /// Block d of `in` goes to rank d, and that of rank s comes to block s of `out`; `bytes` each.
  void all_to_all(ncclComm_t comm, cudaStream_t stream, std::byte const* in, std::byte* out,
                  std::size_t bytes) noexcept {
    if (accepts() && bytes > 0) note(ncclAlltoAll(in, out, bytes, ncclUint8, comm, stream));
  }
#endif

  /// Starts the messages. `pending`: NCCL still enqueues them, see wait_for_nccl; until it has, nobody
  /// else may use the streams. What failed first, if anything did. Once more: the same again.
  outcome end() noexcept {
    if (std::exchange(is_open_, false)) note(ncclGroupEnd());
    return detail::nccl_outcome(code_);
  }

 private:
  /// Whether messages can be added; they are refused after the end.
  bool accepts() noexcept {
    if (!is_open_) note(ncclInvalidUsage);
    return is_open_;
  }
  /// The first failure stays.
  void note(ncclResult_t code) noexcept {
    if (code_ == ncclSuccess || code_ == ncclInProgress) code_ = code;
  }

  ncclResult_t code_;
  bool is_open_;
};

}  // namespace moe::inline MOE_ABI
