// Which ranks hold which experts: where a rank's tokens go, for a choice of theirs.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <moe/comm/topology.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/view.hpp>
#include <moe/schedule/expert_parallel.hpp>

namespace moe::inline MOE_ABI {

/// Experts on ranks, as one rank sees it. A *physical* expert is a copy of a logical one; it is held by
/// one rank, or by several that each hold a slice of it. Every rank holds as many physical experts as
/// any other, or none.
class expert_hosts {
 public:
  /// E experts as `spread_experts` spreads them: rank (c * slices + l) * expert_parallel + i holds slice l
  /// of copy c of experts i * experts_per_rank and following. A rank's tokens go to its own copies.
  ///
  /// @param rank  Of R = expert_parallel * data_parallel * slices.
  /// @throws precondition_error unless the degrees hold E experts, and 0 <= rank < R.
  expert_hosts(int E, expert_parallelism const& degrees, int rank,
               call_site site = call_site::here())
      : E_(E), per_rank_(degrees.experts_per_rank), slices_(degrees.slices), rank_(rank) {
    int const parallel = degrees.expert_parallel,
              R = parallel * degrees.data_parallel * degrees.slices;
    expects(E >= 1 && parallel >= 1 && degrees.data_parallel >= 1 && slices_ >= 1 &&
                parallel * per_rank_ == E && rank >= 0 && rank < R,
            "expert_hosts: expert_parallel * experts_per_rank = E, 0 <= rank < R", site,
            {{"E", E},
             {"expert_parallel", parallel},
             {"experts_per_rank", per_rank_},
             {"rank", rank},
             {"R", R}});
    copies_ = degrees.data_parallel;
    for (int copy = 0; copy < copies_; ++copy)
      for (int e = 0; e < E; ++e)
        for (int l = 0; l < slices_; ++l)
          rank_of_.push_back((copy * slices_ + l) * parallel + e / per_rank_);
    slice_ = rank / parallel % slices_;
    int const copy = rank / parallel / slices_;
    first_ = copy * E + rank % parallel * per_rank_;
    for (int e = 0; e < E; ++e) physical_.push_back(copy * E + e);
  }

  /// E experts on the last `expert_ranks` ranks, tokens on the first `token_ranks`, which hold none
  /// (attention and experts apart).
  /// @throws precondition_error unless expert_ranks divides E, and 0 <= rank < their sum.
  static expert_hosts apart(int E, int token_ranks, int expert_ranks, int rank,
                            call_site site = call_site::here()) {
    expects(
        token_ranks >= 0 && expert_ranks >= 1 && E >= 1 && E % expert_ranks == 0 && rank >= 0 &&
            rank < token_ranks + expert_ranks,
        "expert_hosts::apart: expert_ranks divides E, 0 <= rank < their sum", site,
        {{"E", E}, {"token_ranks", token_ranks}, {"expert_ranks", expert_ranks}, {"rank", rank}});
    bool const holds = rank >= token_ranks;
    expert_hosts h(E, {.expert_parallel = expert_ranks, .experts_per_rank = E / expert_ranks},
                   holds ? rank - token_ranks : 0, site);
    h.rank_ = rank;
    for (int& host : h.rank_of_) host += token_ranks;
    if (!holds) h.per_rank_ = 0;
    return h;
  }

  /// Experts that ranks keep as slices, of degrees with no copies, gathered so that each token goes to r
  /// partial experts: to r ranks, each with the slices of a pool of slices / r ranks; or, for r = 0, to
  /// none, as every rank gathers all. Which parameters a rank keeps does not depend on r; for the pools
  /// see `adaptive_pool`.
  ///
  /// @throws precondition_error unless data_parallel = 1 and r is 0 or divides slices.
  static expert_hosts adaptive(int E, expert_parallelism const& degrees, int r, int rank,
                               call_site site = call_site::here()) {
    expert_hosts h(E, degrees, rank, site);
    int const parallel = degrees.expert_parallel, S = degrees.slices;
    expects(degrees.data_parallel == 1 && r >= 0 && (r == 0 || (r <= S && S % r == 0)),
            "expert_hosts::adaptive: no copies, r is 0 or divides slices", site,
            {{"data_parallel", degrees.data_parallel}, {"r", r}, {"slices", S}});
    // Pools are copies: their ranks compute the same for different tokens.
    int const pool = r == 0 ? S : S / r, place = r == 0 ? rank : rank / parallel % pool;
    h.copies_ = r == 0 ? parallel * S : pool;
    h.slices_ = std::max(1, r);
    h.slice_ = r == 0 ? 0 : rank / parallel / pool;
    h.per_rank_ = r == 0 ? E : degrees.experts_per_rank;
    h.first_ = place * E + (r == 0 ? 0 : rank % parallel * h.per_rank_);
    h.rank_of_.clear();
    for (int copy = 0; copy < h.copies_; ++copy)
      for (int e = 0; e < E; ++e)
        for (int l = 0; l < h.slices_; ++l)
          h.rank_of_.push_back(r == 0 ? copy : (l * pool + copy) * parallel + e / h.per_rank_);
    for (int e = 0; e < E; ++e) h.physical_[static_cast<std::size_t>(e)] = place * E + e;
    return h;
  }

  /// The same when some ranks are dead.
  ///
  /// @param replicas_take_over  An expert whose copy is lost goes to the next copy that is whole; else
  ///                            it is lost to this rank, as it is where no copy is whole.
  /// @throws precondition_error unless alive has a value for every rank that holds an expert.
  expert_hosts surviving(membership const& members, bool replicas_take_over,
                         call_site site = call_site::here()) const {
    for (int const host : rank_of_)
      expects(host < static_cast<int>(members.alive.size()),
              "expert_hosts::surviving: alive has a value for each rank", site,
              {{"alive", members.alive.size()}, {"rank", host}});
    auto const whole = [&](int p) {
      for (int const host : ranks_of(p))
        if (members.alive[static_cast<std::size_t>(host)] == 0) return false;
      return true;
    };
    expert_hosts h = *this;
    for (int& p : h.physical_) {
      if (p < 0) continue;
      int const e = p % E_, own = p / E_, most = replicas_take_over ? copies_ : 1;
      int next = 0;
      while (next < most && !whole((own + next) % copies_ * E_ + e)) ++next;
      p = next < most ? (own + next) % copies_ * E_ + e : -1;
    }
    return h;
  }

  int experts() const noexcept { return E_; }  ///< E: logical ones.
  int physical_experts() const noexcept { return copies_ * E_; }
  int rank() const noexcept { return rank_; }
  /// Physical experts that this rank holds, whole or a slice of: [first(), first() + count()).
  int first() const noexcept { return first_; }
  int count() const noexcept { return per_rank_; }
  int slices() const noexcept { return slices_; }
  /// Which slice this rank holds.
  int slice() const noexcept { return slice_; }
  /// The physical expert that computes logical expert e for this rank's tokens; -1: lost.
  int physical(int e) const noexcept { return physical_[static_cast<std::size_t>(e)]; }
  /// [slices] the ranks that hold a physical expert.
  vector_view<int const> ranks_of(int p) const noexcept {
    return {rank_of_.data() + static_cast<std::ptrdiff_t>(p) * slices_, slices_};
  }

 private:
  int E_, per_rank_, slices_, rank_;
  int copies_ = 1, first_ = 0, slice_ = 0;
  std::vector<int> rank_of_;   // [physical, slices]
  std::vector<int> physical_;  // [E]
};

}  // namespace moe::inline MOE_ABI
