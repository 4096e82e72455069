// A stand-in for NCCL and the CUDA runtime, to test what calls them without a GPU: how to disturb it.
// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <functional>
#include <nccl.h>

/// Ranks are threads, devices are the host's memory, and a stream is a thread that works off a queue.
///
/// Strict where the real ones are not: what NCCL leaves undefined, or what would hang or crash, counts
/// as wrong use. Non-blocking as NCCL is: calls give ncclInProgress first, and a group reaches its
/// stream only when ncclCommGetAsyncError has been asked often enough.
namespace nccl_standin {

/// Uses of NCCL that are wrong, since the last call: messages outside of a group, calls on a
/// communicator that is busy, dead or revoked, streams used while a group is on its way to them,
/// messages of other lengths.
int wrong_uses();

/// The communicator reports this error from its n-th next call on; 0: from now on.
void fail_after(ncclComm_t comm, int calls, ncclResult_t error);

/// What is started on the communicator stays ncclInProgress, until it is aborted.
void hold(ncclComm_t comm);

/// What the stream reports from now on.
void break_stream(cudaStream_t stream, cudaError_t error);

/// Whether peers are told that a rank has aborted, as ncclRemoteError. On, unless it is turned off.
void tell_of_aborts(bool on);

/// Enqueues a function, as a kernel would be.
void enqueue(cudaStream_t stream, std::function<void()> work);

/// Calls of ncclAlltoAll, since the last call.
int native_all_to_alls();

/// Communicators that are neither destroyed nor aborted.
int alive();

}  // namespace nccl_standin
