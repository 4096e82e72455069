// The communicator of ranks that are GPUs: NCCL, over a communicator and a stream of the caller.
// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>
#include <nccl.h>
#include <utility>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/comm/nccl_group.cuh>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// How an nccl_communicator waits and ends.
struct nccl_options {
  /// How long calls that take no deadline wait for NCCL to enqueue what was started before.
  std::chrono::nanoseconds patience = std::chrono::seconds(30);
  /// abort revokes the communicator, if NCCL can (2.28.7): it lives on, for shrink alone.
  bool revokes = false;
};

/// A rank of a communicator of NCCL. Does not own the communicator that it is made of, nor the stream;
/// those that split and shrink make are owned.
///
/// Use one object for each ncclComm_t, from one thread at a time. The device is the one that is current
/// where it is used. The communicator should be made with ncclConfig_t::blocking = 0: only then do
/// deadlines hold, and is abort safe. NCCL 2.18 or later.
///
/// A model of `stream_communicator`. Beyond the concept:
/// * `native` of an outcome is the ncclResult_t, or minus the cudaError_t if it was the runtime's.
/// * Failures name no peer, as NCCL does not know it. A peer that never comes, or is dead, is noticed at
///   the deadline of wait_for_stream, or by NCCL as ncclRemoteError: `peer_failed`.
/// * Messages of another length than their receive are not noticed, but for those to itself.
/// * exchange waits until NCCL has enqueued the one before, as NCCL refuses a call meanwhile: at most
///   `patience`. The first exchange with a peer connects to it, so that both have to come.
///
/// Never run on a GPU yet.
class nccl_communicator {
 public:
  using memory_space = device_memory;
  static constexpr bool stream_ordered = true;

  /// One exchange. Nothing of it has to outlive exchange.
  class ticket {
    friend nccl_communicator;
    std::uint64_t number_ = 0;
  };

  /// Of no ranks, until split or shrink has made it one.
  nccl_communicator() = default;
  /// @param comm  Whose initialisation has ended, see wait_for_nccl. Must outlive this object; dead once
  ///              native() is null, as abort has freed it.
  /// @throws precondition_error if NCCL does not know its rank and size.
  nccl_communicator(ncclComm_t comm, cudaStream_t stream, nccl_options options = {},
                    call_site site = call_site::here())
      : comm_(comm), stream_(stream), options_(options) {
    outcome const known = learn_ranks();
    expects(static_cast<bool>(known), "nccl_communicator: initialised by NCCL", site,
            {{"ncclResult_t", known.native}});
  }
  nccl_communicator(nccl_communicator&& other) noexcept { swap(other); }
  nccl_communicator& operator=(nccl_communicator&& other) noexcept {
    nccl_communicator(std::move(other)).swap(*this);
    return *this;
  }
  /// What is owned is finalized and destroyed, which all of its ranks have to do; it is aborted if that
  /// takes longer than `patience`, or if it was revoked or shrunk.
  ~nccl_communicator() {
    if (!is_owned_) return;
    if (!is_over()) {
      outcome ended = detail::nccl_outcome(ncclCommFinalize(comm_));
      if (ended.status == exchange_status::pending) ended = settle();
      if (!ended)
        kill();
      else
        static_cast<void>(ncclCommDestroy(comm_));
    } else {
      kill();
    }
  }

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  cudaStream_t stream() const noexcept { return stream_; }
  /// Null if there is none, or none any more.
  ncclComm_t native() const noexcept { return comm_; }

  outcome exchange(vector_view<outgoing const> sends, vector_view<incoming const> receives,
                   ticket& t) {
    if (is_over()) return {exchange_status::aborted};
    if (outcome const fits = messages_fit(sends, receives); !fits) return fits;
    if (outcome const ready = settle(); !ready) return ready;
    t.number_ = ++started_;
    if (sends.empty() && receives.empty()) return {};
    nccl_group group;
    for (outgoing const& s : sends) group.send(comm_, stream_, s);
    for (incoming const& r : receives) group.receive(comm_, stream_, r);
    return started(group);
  }

  /// `ok`: the exchange is enqueued.
  outcome poll(ticket const& t) const {
    if (is_over()) return {exchange_status::aborted};
    outcome const now = nccl_state(comm_);
    bool const is_of_a_later = now.status == exchange_status::pending && t.number_ != started_;
    return is_of_a_later ? outcome{} : now;
  }

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 3)
  /// An exchange of equal blocks, those for itself included, by the collective of NCCL.
  outcome exchange_equal(std::byte const* in, std::byte* out, std::size_t bytes, ticket& t) {
    if (is_over()) return {exchange_status::aborted};
    if (outcome const ready = settle(); !ready) return ready;
    t.number_ = ++started_;
    nccl_group group;
    group.all_to_all(comm_, stream_, in, out, bytes);
    return started(group);
  }
#endif

  /// Waits until NCCL has enqueued all that was started, not for the device. Aborts if that fails.
  outcome wait_until_enqueued(deadline until) {
    if (is_over()) return {exchange_status::aborted};
    return aborted_unless(wait_for_nccl(comm_, until));
  }

  outcome wait_for_stream(deadline until) {
    if (is_over()) return {exchange_status::aborted};
    return aborted_unless(wait(
        [this] {
          // While NCCL enqueues, nobody else may touch the stream.
          outcome const state = nccl_state(comm_);
          return state ? detail::cuda_outcome(cudaStreamQuery(stream_)) : state;
        },
        [] {}, until));
  }

  outcome copy(std::byte* to, std::byte const* from, std::size_t bytes) {
    if (is_over()) return {exchange_status::aborted};
    if (outcome const ready = settle(); !ready || bytes == 0) return ready;
    return detail::cuda_outcome(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_));
  }

  /// The child has the same stream and options.
  outcome split(int color, int key, deadline until, nccl_communicator& child) {
    child = {};
    if (outcome const ready = wait_until_enqueued(until); !ready) return ready;
    return make_child(until, child, [&](ncclComm_t* made) {
      return ncclCommSplit(comm_, color < 0 ? NCCL_SPLIT_NOCOLOR : color, key, made, nullptr);
    });
  }

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 27, 3)
  /// A communicator of the ranks that are not excluded, in the same order, called by them alone. Ends
  /// what is under way; this communicator is over, as after abort, but for its owner to abort. It may
  /// have been revoked before.
  /// @param excluded  Ranks that are dead, the same on all ranks: see `membership`.
  /// @throws precondition_error unless they are others, and ranks.
  outcome shrink(vector_view<int const> excluded, deadline until, nccl_communicator& child,
                 call_site site = call_site::here()) {
    std::vector<int> ranks(excluded.begin(), excluded.end());  // NCCL sorts them
    for (int const r : ranks)
      expects(r >= 0 && r < size_ && r != rank_, "nccl_communicator::shrink: excludes other ranks",
              site, {{"excluded", r}, {"rank", rank_}, {"size", size_}});
    child = {};
    if (comm_ == nullptr) return {exchange_status::aborted};
    int const flags = std::exchange(is_over_, true) ? NCCL_SHRINK_DEFAULT : NCCL_SHRINK_ABORT;
    return make_child(until, child, [&](ncclComm_t* made) {
      return ncclCommShrink(comm_, ranks.data(), static_cast<int>(ranks.size()), made, nullptr,
                            flags);
    });
  }
#endif

#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 7)
  /// Ends what is under way and every later exchange, but leaves the communicator for shrink, and its
  /// owner to abort it. Local: every rank has to. If it fails, aborts.
  outcome revoke(deadline until) {
    if (is_over()) return {exchange_status::aborted};
    outcome ended = detail::nccl_outcome(ncclCommRevoke(comm_, NCCL_REVOKE_DEFAULT));
    if (ended.status == exchange_status::pending) ended = wait_for_nccl(comm_, until);
    is_over_ = true;
    if (!ended) kill();
    return ended;
  }
#endif

  /// By ncclCommAbort, which waits for kernels to end and frees the communicator: nobody may use it
  /// afterwards. Or see `nccl_options::revokes`.
  void abort() noexcept {
    if (is_over()) return;
#if NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 7)
    if (options_.revokes) return static_cast<void>(revoke(within(options_.patience)));
#endif
    kill();
  }

 private:
  nccl_communicator(ncclComm_t comm, cudaStream_t stream, nccl_options options, bool is_owned)
      : comm_(comm), stream_(stream), options_(options), is_owned_(is_owned) {}

  void swap(nccl_communicator& other) noexcept {
    std::swap(comm_, other.comm_);
    std::swap(stream_, other.stream_);
    std::swap(options_, other.options_);
    std::swap(rank_, other.rank_);
    std::swap(size_, other.size_);
    std::swap(started_, other.started_);
    std::swap(is_owned_, other.is_owned_);
    std::swap(is_over_, other.is_over_);
  }
  bool is_over() const noexcept { return comm_ == nullptr || is_over_; }
  outcome settle() const { return wait_for_nccl(comm_, within(options_.patience)); }

  outcome learn_ranks() noexcept {
    ncclResult_t code = ncclCommUserRank(comm_, &rank_);
    if (code == ncclSuccess) code = ncclCommCount(comm_, &size_);
    return detail::nccl_outcome(code);
  }

  /// Peers exist, and messages to itself meet receives of their length in the same group.
  outcome messages_fit(vector_view<outgoing const> sends,
                       vector_view<incoming const> receives) const {
    auto const exists = [this](int peer) { return peer >= 0 && peer < size_; };
    for (outgoing const& s : sends)
      if (!exists(s.peer)) return {exchange_status::no_such_peer, s.peer};
    for (incoming const& r : receives)
      if (!exists(r.peer)) return {exchange_status::no_such_peer, r.peer};
    auto const is_own = [this](auto const& m) { return m.peer == rank_; };
    auto const* s = sends.begin();
    auto const* r = receives.begin();
    for (;; ++s, ++r) {
      while (s != sends.end() && !is_own(*s)) ++s;
      while (r != receives.end() && !is_own(*r)) ++r;
      bool const no_more = s == sends.end();
      if (no_more != (r == receives.end())) return {exchange_status::wrong_length, rank_};
      if (no_more) return {};
      if (s->bytes != r->bytes) return {exchange_status::wrong_length, rank_};
    }
  }

  static outcome started(nccl_group& group) {
    outcome const ended = group.end();
    return ended.status == exchange_status::pending ? outcome{} : ended;
  }

  template <class Make>
  outcome make_child(deadline until, nccl_communicator& child, Make const& make) {
    ncclComm_t made = nullptr;
    outcome result = detail::nccl_outcome(make(&made));
    // First this one is done, only then is there a handle of the child, which may need time itself.
    if (result.status == exchange_status::pending) result = wait_for_nccl(comm_, until);
    if (!result) {
      kill();  // also because NCCL would still write to `made`
      return result;
    }
    if (made == nullptr) return {};  // a rank of no colour
    nccl_communicator ready(made, stream_, options_, true);
    result = wait_for_nccl(made, until);
    if (result) result = ready.learn_ranks();
    if (result) {
      child = std::move(ready);
    } else {
      ready.kill();
      kill();
    }
    return result;
  }

  outcome aborted_unless(outcome const& result) {
    if (!result) abort();
    return result;
  }
  void kill() noexcept {
    if (comm_ != nullptr) static_cast<void>(ncclCommAbort(std::exchange(comm_, nullptr)));
  }

  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  nccl_options options_;
  int rank_ = 0;
  int size_ = 0;
  std::uint64_t started_ = 0;  // exchanges
  bool is_owned_ = false;
  bool is_over_ = false;  // revoked or shrunk
};
static_assert(stream_communicator<nccl_communicator>);

}  // namespace moe::inline MOE_ABI
