// What an MPI communicator has under way: its requests, and which peers have aborted.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <memory>
#include <mpi.h>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/core/config.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

namespace detail {

/// The tags of messages. Receives take any, in the order of sending, and look: so a message of another
/// number of pieces is noticed, and so is a peer that aborts instead of sending.
enum mpi_tag : int { mpi_last_piece, mpi_more_pieces, mpi_abort_notice };

inline bool mpi_is_running() noexcept {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  if (initialized != 0) MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

/// The requests of one exchange, one for each piece of a message.
struct mpi_messages {
  struct piece {
    int peer, bytes, tag;
    bool is_receive;
    std::size_t number = 0;  // among the receives from this rank itself
  };

  /// Forgets the last exchange, and makes room for n pieces.
  void reserve(std::size_t n) {
    pieces.clear();
    requests.clear();
    pieces.reserve(n);
    requests.reserve(n);
    indices.resize(std::max(indices.size(), n));
    statuses.resize(std::max(statuses.size(), n));
    end = {};
    left = 0;
  }
  bool is_pending(std::size_t i) const { return requests[i] != MPI_REQUEST_NULL; }

  std::vector<piece> pieces;
  std::vector<MPI_Request> requests;  // of each piece
  std::vector<int> indices;
  std::vector<MPI_Status> statuses;
  std::size_t left = 0;  // pieces that have not ended
  outcome end;           // ok, or the first failure
  bool under_way = false;
};

/// This rank's end of an MPI communicator, which it owns.
struct mpi_context {
  /// @param own  Freed with this, if all went well.
  mpi_context(MPI_Comm own, std::size_t most) : comm(own), most_bytes(most) {
    MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &size);
    gone.resize(static_cast<std::size_t>(size));
    notices.resize(static_cast<std::size_t>(size), MPI_REQUEST_NULL);
  }
  mpi_context(mpi_context const&) = delete;
  mpi_context& operator=(mpi_context const&) = delete;
  ~mpi_context() {
    if (!mpi_is_running()) return;
    hear_notices();
    auto const forget = [](std::vector<MPI_Request>& requests) {
      for (MPI_Request& r : requests)
        if (r != MPI_REQUEST_NULL) MPI_Request_free(&r);
    };
    for (auto const& m : under_way) forget(m->requests);
    forget(notices);
    if (!aborted && peers_gone == 0) MPI_Comm_free(&comm);
  }

  /// @pre  All peers exist, and nothing of `m` is under way.
  outcome start(vector_view<outgoing const> sends, vector_view<incoming const> receives,
                std::shared_ptr<mpi_messages> const& m) {
    std::size_t count = 0;
    for (outgoing const& s : sends) each_piece(s, [&](auto&&...) { ++count; });
    for (incoming const& r : receives) each_piece(r, [&](auto&&...) { ++count; });
    m->reserve(count);
    under_way.push_back(m);
    own_sent.reserve(own_sent.size() + count);
    m->under_way = true;
    auto const posted = [&](int error, MPI_Request request, mpi_messages::piece const& piece) {
      m->pieces.push_back(piece);
      m->requests.push_back(error == MPI_SUCCESS ? request : MPI_REQUEST_NULL);
      if (error == MPI_SUCCESS)
        ++m->left;
      else if (m->end)
        m->end = {exchange_status::peer_failed, piece.peer, error};
    };
    for (incoming const& r : receives)
      each_piece(r, [&](std::byte* data, int bytes, int tag) {
        MPI_Request request = MPI_REQUEST_NULL;
        int const error = MPI_Irecv(data, bytes, MPI_BYTE, r.peer, MPI_ANY_TAG, comm, &request);
        posted(error, request, {r.peer, bytes, tag, true, r.peer == rank ? own_expected++ : 0});
      });
    for (outgoing const& s : sends)
      each_piece(s, [&](std::byte const* data, int bytes, int tag) {
        MPI_Request request = MPI_REQUEST_NULL;
        int const error = MPI_Isend(data, bytes, MPI_BYTE, s.peer, tag, comm, &request);
        posted(error, request, {s.peer, bytes, tag, false});
        if (s.peer == rank) own_sent.push_back(bytes);
      });
    return m->end;
  }

  outcome poll(std::shared_ptr<mpi_messages> const& m) {
    look_at(*m);
    if (m->left > 0 && m->end) {
      // A notice may also have met a receive of another exchange.
      int const known = peers_gone;
      hear_notices();
      for (auto const& other : under_way)
        if (other != m) look_at(*other);
      if (peers_gone != known) look_at(*m);  // what was sent before it comes in before it
    }
    if (!m->end) return m->end;
    if (m->left == 0) {
      m->under_way = false;
      std::erase(under_way, m);
      return {};
    }
    // Trouble is told before what is merely not done yet: a rank may wait for several peers.
    outcome result{exchange_status::pending};
    for (std::size_t i = 0; i < m->pieces.size(); ++i) {
      if (!m->is_pending(i)) continue;
      int const peer = m->pieces[i].peer;
      if (gone[static_cast<std::size_t>(peer)] != 0)
        return m->end = {exchange_status::peer_failed, peer};
      if (result.peer < 0) result.peer = peer;
    }
    return result;
  }

  void abort() noexcept {
    if (aborted) return;
    aborted = true;
    if (!mpi_is_running()) return;
    for (auto const& m : under_way)
      for (std::size_t i = 0; i < m->pieces.size(); ++i)
        if (m->pieces[i].is_receive && m->is_pending(i)) MPI_Cancel(&m->requests[i]);
    for (int r = 0; r < size; ++r)
      if (r != rank && gone[static_cast<std::size_t>(r)] == 0)
        MPI_Isend(nullptr, 0, MPI_BYTE, r, mpi_abort_notice, comm,
                  &notices[static_cast<std::size_t>(r)]);
    for (int look = 0; look < 100 && !has_let_go(); ++look) {
    }
  }

  bool has_let_go() noexcept {
    if (!mpi_is_running()) return true;
    for (auto const& m : under_way) look_at(*m);
    int all_sent = 0;
    MPI_Testall(size, notices.data(), &all_sent, MPI_STATUSES_IGNORE);
    return all_sent != 0 && std::all_of(under_way.begin(), under_way.end(),
                                        [](auto const& m) { return m->left == 0; });
  }

  MPI_Comm comm;
  std::size_t most_bytes;
  int rank = 0, size = 0;
  bool aborted = false;
  int peers_gone = 0;
  std::vector<char> gone;  // [R] has aborted, as far as this rank knows
  std::vector<std::shared_ptr<mpi_messages>> under_way;
  std::vector<MPI_Request> notices;  // [R] that this rank has aborted

  // What this rank sent to itself: Open MPI does not tell that a message to oneself is too long.
  std::vector<int> own_sent;  // bytes of pieces, from number own_first on
  std::size_t own_first = 0, own_expected = 0, own_received = 0;

 private:
  /// Calls f(data, bytes, tag) for each piece of a message; an empty one has one piece.
  template <class Message, class F>
  void each_piece(Message const& message, F const& f) const {
    std::size_t at = 0;
    do {
      std::size_t const bytes = std::min(most_bytes, message.bytes - at);
      bool const is_last = at + bytes == message.bytes;
      f(message.data + at, static_cast<int>(bytes), is_last ? mpi_last_piece : mpi_more_pieces);
      at += bytes;
    } while (at < message.bytes);
  }

  /// The bytes that were sent to the receive of that number, which has ended.
  int take_own(std::size_t number) noexcept {
    int const bytes = own_sent[number - own_first];
    if (++own_received == own_first + own_sent.size()) {
      own_first = own_received;
      own_sent.clear();
    }
    return bytes;
  }

  void mark_gone(int peer) noexcept {
    char& is_gone = gone[static_cast<std::size_t>(peer)];
    peers_gone += is_gone == 0 ? 1 : 0;
    is_gone = 1;
  }

  /// Takes the notices that no receive has met.
  void hear_notices() noexcept {
    for (;;) {
      int found = 0;
      MPI_Status status;
      int const error = MPI_Iprobe(MPI_ANY_SOURCE, mpi_abort_notice, comm, &found, &status);
      if (error != MPI_SUCCESS || found == 0) return;
      mark_gone(status.MPI_SOURCE);
      MPI_Recv(nullptr, 0, MPI_BYTE, status.MPI_SOURCE, mpi_abort_notice, comm, MPI_STATUS_IGNORE);
    }
  }

  /// Takes what has ended, without waiting.
  void look_at(mpi_messages& m) noexcept {
    if (m.left == 0) return;
    int done = 0;
    int const error = MPI_Testsome(static_cast<int>(m.requests.size()), m.requests.data(), &done,
                                   m.indices.data(), m.statuses.data());
    // Statuses have errors of their own only if there was one. Some MPIs tell that one, others
    // MPI_ERR_IN_STATUS.
    bool const ended = done != MPI_UNDEFINED && done > 0;
    for (int i = 0; ended && i < done; ++i) {
      --m.left;
      if (aborted) continue;  // maybe cancelled: its status says nothing
      MPI_Status const& status = m.statuses[static_cast<std::size_t>(i)];
      outcome const how =
          end_of(m.pieces[static_cast<std::size_t>(m.indices[static_cast<std::size_t>(i)])], status,
                 error == MPI_SUCCESS ? MPI_SUCCESS : status.MPI_ERROR);
      if (m.end) m.end = how;
    }
    if (error != MPI_SUCCESS && !ended && m.end) m.end = {exchange_status::peer_failed, -1, error};
  }

  outcome end_of(mpi_messages::piece const& piece, MPI_Status const& status, int error) noexcept {
    if (error != MPI_SUCCESS) {
      int kind = MPI_SUCCESS;
      MPI_Error_class(error, &kind);
      return {
          kind == MPI_ERR_TRUNCATE ? exchange_status::wrong_length : exchange_status::peer_failed,
          piece.peer, error};
    }
    if (!piece.is_receive) return {};
    if (status.MPI_TAG == mpi_abort_notice) {
      mark_gone(piece.peer);
      return {exchange_status::peer_failed, piece.peer};
    }
    int bytes = 0;
    MPI_Get_count(&status, MPI_BYTE, &bytes);
    if (piece.peer == rank) bytes = take_own(piece.number);
    if (bytes != piece.bytes || status.MPI_TAG != piece.tag)
      return {exchange_status::wrong_length, piece.peer};
    return {};
  }
};

}  // namespace detail

}  // namespace moe::inline MOE_ABI
