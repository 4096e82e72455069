// Tokens to the ranks of their experts and back, in two phases each: how a layer meets a strategy.
// SPDX-License-Identifier: MIT
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <moe/comm/bound_plan.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/comm/exchange_plan.hpp>
#include <moe/comm/expert_hosts.hpp>
#include <moe/comm/plan_algebra.hpp>
#include <moe/comm/rank_exchange.hpp>
#include <moe/comm/row_parts.hpp>
#include <moe/comm/token_binder.hpp>
#include <moe/comm/token_plan.hpp>
#include <moe/comm/topology.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>

namespace moe {

/// An exchange ended otherwise than well, in a function that has no outcome to give. All communicators
/// that the rank used for it have aborted.
class exchange_error : public error {
 public:
  exchange_error(std::string const& message, int status, int peer, int native)
      : error(message), status_(status), peer_(peer), native_(native) {}

  int status() const noexcept { return status_; }  ///< The outcome's, as a number.
  int peer() const noexcept { return peer_; }      ///< Whom it was about; -1: not known.
  int native() const noexcept { return native_; }

 private:
  int status_, peer_, native_;
};

}  // namespace moe

namespace moe::inline MOE_ABI {

namespace detail {

[[noreturn]] inline void throw_exchange_error(char const* what, outcome const& end) {
  std::string text = std::string(what) + " ended with " + name(end.status);
  if (end.peer >= 0) text += ", rank " + std::to_string(end.peer);
  throw exchange_error(text, static_cast<int>(end.status), end.peer, end.native);
}

}  // namespace detail

/// A strategy in pieces: the tokens of a call are exchanged in as many chunks, so that those of one
/// travel while experts compute another.
template <class Strategy>
struct chunked {
  Strategy strategy;
  int chunks;
};

struct token_exchange_options {
  std::chrono::nanoseconds timeout = std::chrono::seconds(60);  ///< Of each wait.
  /// Rows of each slot of the plan, if they are fixed; 0: exact sizes. See token_binder::bind.
  std::int64_t room = 0;
};

/// One rank's exchange of tokens, by one strategy, for one layer: keeps the plans and, from dispatch to
/// backward, the sizes of each chunk.
///
/// Under way at once are one dispatch and one combine. With more than one chunk they need a
/// communicator each, as messages of two exchanges must not meet: `split` makes the second.
template <class C>
class token_exchange {
 public:
  /// @param comm, combines  Must outlive this; the second one if the strategy has several chunks.
  /// @param ranks     Those that take part. @param hosts  Of this rank.
  /// @param strategy  Whatever has a make_token_plan, or `chunked` of it.
  /// @throws precondition_error if the rank is not in `ranks`, chunks < 1, or there is no second
  ///         communicator for several.
  template <class Strategy>
  token_exchange(C& comm, topology const& ranks, Strategy const& strategy,
                 expert_hosts const& hosts, token_exchange_options const& options = {},
                 C* combines = nullptr, call_site site = call_site::here())
      : comm_(&comm),
        combines_(combines == nullptr ? &comm : combines),
        hosts_(hosts),
        options_(options),
        binder_(comm),
        dispatch_(comm),
        combine_(*combines_) {
    int chunks = 1;
    if constexpr (requires { strategy.chunks; }) {
      chunks = strategy.chunks;
      plan_ = make_token_plan(strategy.strategy, ranks, comm.rank(), site);
    } else {
      plan_ = make_token_plan(strategy, ranks, comm.rank(), site);
    }
    expects(chunks >= 1 && (chunks == 1 || combines != nullptr),
            "token_exchange: chunks >= 1, and a second communicator for several", site,
            {{"chunks", chunks}});
    back_plan_ = transpose(plan_);
    for (int i = 0; i < chunks; ++i) {
      there_.emplace_back(plan_);
      back_.emplace_back(back_plan_);
    }
    for (int p = 0; p < hosts.physical_experts(); ++p)
      for (int const rank : hosts.ranks_of(p)) index_.push_back(ranks.index_of(rank));
    ranks_ = ranks.size();
  }
  token_exchange(token_exchange const&) = delete;
  token_exchange& operator=(token_exchange const&) = delete;

  expert_hosts const& hosts() const noexcept { return hosts_; }
  int chunks() const noexcept { return static_cast<int>(there_.size()); }
  /// Most rows that a chunk can bring, if no rank has more than T tokens in one.
  std::int64_t most_rows(std::int64_t T) const noexcept {
    return (options_.room > 0 ? options_.room : T) * ranks_;
  }

  /// Tells all ranks what a chunk brings them.
  /// @param keys  [T,K]: physical experts, negative ones are none.
  /// @throws precondition_error as token_binder::bind.
  /// @note  Collective; blocks.
  outcome bind(int chunk, matrix_view<std::int32_t const> keys,
               call_site site = call_site::here()) {
    bound_plan& there = there_[static_cast<std::size_t>(chunk)];
    key_hosts const where{index_, hosts_.slices()};
    outcome const told = binder_.bind(there, keys, where, options_.room, until(), site);
    ++times_bound_;
    if (told) back_[static_cast<std::size_t>(chunk)].bind_back(there, site);
    return told;
  }
  /// Rows that a chunk brings.
  std::int64_t rows(int chunk) const noexcept {
    return there_[static_cast<std::size_t>(chunk)].output_rows();
  }
  /// How often this has bound a chunk: who keeps what came with one can tell whether it is the last.
  std::uint64_t times_bound() const noexcept { return times_bound_; }
  /// Of what was bound last: see token_binder.
  matrix_view<std::int32_t const> keys() const noexcept { return binder_.keys(); }
  vector_view<std::uint8_t const> lost() const noexcept { return binder_.lost(); }

  /// Rows of tokens [T,W] to their ranks [rows(chunk) or more, W], and back, where they are added up.
  /// What is begun has to be finished before the next of its kind; all arguments stay as they are
  /// meanwhile.
  template <class V>
  outcome begin_dispatch(int chunk, std::type_identity_t<row_parts<V const>> tokens,
                         std::type_identity_t<matrix_view<V>> rows) {
    return dispatch_.template begin<V>(there_[static_cast<std::size_t>(chunk)], tokens, rows);
  }
  outcome finish_dispatch() { return dispatch_.finish(until()); }
  template <class V>
  outcome begin_combine(int chunk, std::type_identity_t<matrix_view<V const>> rows,
                        std::type_identity_t<row_parts<V>> tokens) {
    return combine_.template begin<V>(back_[static_cast<std::size_t>(chunk)], rows, tokens);
  }
  outcome finish_combine() { return combine_.finish(until()); }
  /// Goes on with both as far as that is possible without waiting.
  outcome poll() {
    for (auto* exchange : {&dispatch_, &combine_})
      if (outcome const now = exchange->poll(); !now && now.status != exchange_status::pending)
        return now;
    return {};
  }

  /// [T] of the last forward of the layer: how many choices of each token were lost.
  vector_view<std::int32_t const> lost_of_token() const noexcept { return lost_of_token_; }
  void forget_lost(std::int64_t T) { lost_of_token_.assign(static_cast<std::size_t>(T), 0); }
  void add_lost(std::int64_t t, int choices) {
    lost_of_token_[static_cast<std::size_t>(t)] += choices;
  }

  /// Ends what is under way; later calls fail at once.
  void abort() noexcept {
    comm_->abort();
    combines_->abort();
    static_cast<void>(dispatch_.poll());
    static_cast<void>(combine_.poll());
  }

 private:
  deadline until() const { return within(options_.timeout); }

  C* comm_;
  C* combines_;
  expert_hosts hosts_;
  token_exchange_options options_;
  exchange_plan plan_, back_plan_;
  std::vector<bound_plan> there_, back_;  // [chunks]
  std::vector<std::int32_t> index_;       // [physical, slices] of the ranks that host them
  int ranks_ = 0;
  std::uint64_t times_bound_ = 0;
  std::vector<std::int32_t> lost_of_token_;
  token_binder<C> binder_;
  rank_exchange<C> dispatch_, combine_;
};

}  // namespace moe::inline MOE_ABI
