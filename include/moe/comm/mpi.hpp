// The communicator over MPI: each rank is a process.
// SPDX-License-Identifier: MIT
#pragma once

#include <climits>
#include <cstddef>
#include <memory>
#include <mpi.h>
#include <utility>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/comm/detail/mpi_messages.hpp>
#include <moe/comm/detail/split_members.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// This process among those of an MPI communicator of the caller, which it duplicates: no message of one
/// meets one of the other.
///
/// A message is one MPI_Isend and one MPI_Irecv; longer ones than `most_bytes` are sent in pieces. A
/// ticket keeps its arrays, so exchanges that reuse one allocate nothing (MPI aside) once it has seen the
/// largest. Copies of an object are the same end of the same communicator; so are tickets of it.
/// MPI has to allow calls from the thread that uses it. In an outcome, `native` is MPI's error code.
/// Its own errors are returned; but some MPIs (MPICH) also ask the error handler of MPI_COMM_WORLD, which
/// ends the program on a message that is too long unless the caller sets MPI_ERRORS_RETURN there.
///
/// abort cancels what this rank has yet to receive, and tells every peer by an empty message, which
/// those find that wait for this rank. What MPI cannot promise:
///   - Sends cannot be cancelled, nor can a long message that is halfway in. MPI may hold on to their
///     memory after an abort, until the peer goes on or MPI_Finalize: see has_let_go.
///   - The empty messages leave when this process calls MPI next, if they cannot leave at once.
///   - A process that is killed takes the others with it, unless MPI was started otherwise; then its
///     peers end at their deadlines.
///   - The constructor, and split once all ranks have told their colours, wait for the others without
///     a deadline.
/// The duplicate is freed with the last copy, or never if this rank or a peer has aborted: a
/// message may still come.
class mpi_communicator {
 public:
  using memory_space = host_memory;

  /// One exchange under way. Destroying it meanwhile aborts the communicator, because MPI takes no
  /// message back.
  class ticket {
   public:
    ticket() = default;
    ticket(ticket const&) = delete;
    ticket& operator=(ticket const&) = delete;
    ~ticket() {
      if (messages_ != nullptr && messages_->under_way) context_->abort();
    }

   private:
    friend mpi_communicator;
    std::shared_ptr<detail::mpi_context> context_;
    std::shared_ptr<detail::mpi_messages> messages_;
  };

  /// Of no ranks, until split has made it one.
  mpi_communicator() = default;

  /// Collective over `comm`, which stays the caller's. Blocks until all its ranks have come.
  /// @param most_bytes  Of one MPI message, the same on all ranks: longer ones are sent in pieces.
  /// @throws precondition_error unless MPI is initialised, `comm` is an intra-communicator and
  ///         1 <= most_bytes <= INT_MAX; error if MPI cannot duplicate it.
  explicit mpi_communicator(MPI_Comm comm, std::size_t most_bytes = INT_MAX,
                            call_site site = call_site::here()) {
    expects(detail::mpi_is_running(), "mpi_communicator: between MPI_Init and MPI_Finalize", site);
    int between_groups = 0;
    if (comm != MPI_COMM_NULL) MPI_Comm_test_inter(comm, &between_groups);
    expects(comm != MPI_COMM_NULL && between_groups == 0,
            "mpi_communicator: comm is an intra-communicator", site);
    expects(most_bytes >= 1 && most_bytes <= INT_MAX,
            "mpi_communicator: 1 <= most_bytes <= INT_MAX", site, {{"most_bytes", most_bytes}});
    MPI_Comm own = MPI_COMM_NULL;
    if (MPI_Comm_dup(comm, &own) != MPI_SUCCESS)
      throw error("mpi_communicator: MPI_Comm_dup failed");
    context_ = std::make_shared<detail::mpi_context>(own, most_bytes);
  }

  int rank() const noexcept { return context_ == nullptr ? 0 : context_->rank; }
  int size() const noexcept { return context_ == nullptr ? 0 : context_->size; }

  outcome exchange(vector_view<outgoing const> sends, vector_view<incoming const> receives,
                   ticket& t) {
    if (is_over()) return {exchange_status::aborted};
    if (t.messages_ != nullptr && t.messages_->under_way) return {exchange_status::in_use};
    for (outgoing const& s : sends)
      if (s.peer < 0 || s.peer >= size()) return {exchange_status::no_such_peer, s.peer};
    for (incoming const& r : receives)
      if (r.peer < 0 || r.peer >= size()) return {exchange_status::no_such_peer, r.peer};
    if (t.messages_ == nullptr) t.messages_ = std::make_shared<detail::mpi_messages>();
    t.context_ = context_;
    return context_->start(sends, receives, t.messages_);
  }

  outcome poll(ticket& t) {
    if (is_over()) return {exchange_status::aborted};
    if (t.messages_ == nullptr || !t.messages_->under_way) return {};
    return context_->poll(t.messages_);
  }

  outcome split(int color, int key, deadline until, mpi_communicator& child) {
    child = {};
    std::vector<int> members;
    outcome const told = detail::members_of_split(*this, color, key, until, members);
    if (!told || color < 0) return told;
    // Of the members alone: the other ranks have nothing more to do with it.
    MPI_Group all = MPI_GROUP_NULL, some = MPI_GROUP_NULL;
    MPI_Comm own = MPI_COMM_NULL;
    int failure = MPI_Comm_group(context_->comm, &all);
    if (failure == MPI_SUCCESS)
      failure = MPI_Group_incl(all, static_cast<int>(members.size()), members.data(), &some);
    if (failure == MPI_SUCCESS) failure = MPI_Comm_create_group(context_->comm, some, 0, &own);
    if (some != MPI_GROUP_NULL) MPI_Group_free(&some);
    if (all != MPI_GROUP_NULL) MPI_Group_free(&all);
    if (failure != MPI_SUCCESS) {
      abort();
      return {exchange_status::peer_failed, -1, failure};
    }
    child.context_ = std::make_shared<detail::mpi_context>(own, context_->most_bytes);
    return {};
  }

  void abort() noexcept {
    if (context_ != nullptr) context_->abort();
  }

  /// Whether MPI has no use any more for the memory of any exchange. After an abort that may take
  /// until peers go on, or for ever; nothing that was sent or received into may be freed or written to
  /// before. Never blocks.
  bool has_let_go() noexcept { return context_ == nullptr || context_->has_let_go(); }

 private:
  bool is_over() const noexcept { return context_ == nullptr || context_->aborted; }

  std::shared_ptr<detail::mpi_context> context_;
};
static_assert(communicator<mpi_communicator>);

}  // namespace moe::inline MOE_ABI
