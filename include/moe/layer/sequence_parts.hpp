// Ranks that hold the same tokens take a part of them each through a layer, and gather what it gives.
// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <cstdint>

#include <moe/comm/collectives.hpp>
#include <moe/comm/communicator.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/part.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>

namespace moe::inline MOE_ABI {

/// Which of T tokens are whose, of L ranks that all hold them (tensor parallelism): consecutive ones, as
/// many for each but for one.
///
///     moe::sequence_parts const parts(T, group.rank(), group.size());
///     layer.forward(exec, parameters, parts.own(x), parts.own(ids), parts.own(out), saved, scratch);
///     parts.restore(group, out, room, until);                       // now out is whole
///     ...
///     layer.backward(exec, parameters, parts.own(x), parts.own(dout), losses, saved, parts.own(dx), ...);
///     parts.restore(group, dx, room, until);
///
/// Each is the other's gradient: what enters by its own part leaves backward by a gather, and what
/// leaves by a gather enters backward by its own part, as all ranks hold the same dout of one loss. So a
/// layer routes each token once, not L times: exchanges of tokens, and what is saved, are an L-th.
/// Gradients of parameters are of the own part: they are summed over the L ranks as over any others, see
/// `reduce_gradients`. A layer has shape().T >= most(T, L).
/// Source. Singh et al., "DeepSpeed-TED", 2023 (dropping of duplicate tokens); Yuan et al., "X-MoE", 2025
/// (sequence-sharded MoE blocks).
class sequence_parts {
 public:
  /// @throws precondition_error unless T >= 0 and 0 <= rank < L.
  sequence_parts(std::int64_t T, int rank, int L, call_site site = call_site::here())
      : T_(T), rank_(rank), L_(L) {
    expects(T >= 0 && rank >= 0 && rank < L, "sequence_parts: T >= 0, 0 <= rank < L", site,
            {{"T", T}, {"rank", rank}, {"L", L}});
  }

  /// Tokens of the greatest part.
  static constexpr std::int64_t most(std::int64_t T, int L) noexcept { return (T + L - 1) / L; }
  /// Bytes of scratch for restore.
  static constexpr std::size_t restore_scratch(int L) noexcept {
    memory_size size;
    return size.add<std::int64_t>(L).bytes() + all_gather_scratch(L);
  }

  /// Tokens of this rank.
  part_range range() const noexcept { return part_of(T_, rank_, L_); }

  /// Their rows of [T,M]: a view.
  /// @throws precondition_error unless there are T rows.
  template <class V>
  matrix_view<V> own(matrix_view<V> all, call_site site = call_site::here()) const {
    expects(all.rows() == T_, "sequence_parts: matrices are [T,M]", site,
            {{"rows", all.rows()}, {"T", T_}});
    return {all.row(range().first), range().size(), all.cols(), all.ld()};
  }
  /// What is known of them, of a batch of T.
  batch own(batch const& all) const noexcept {
    std::int64_t const first = range().first;
    auto const from = [first](auto* data) { return data == nullptr ? data : data + first; };
    batch part = all;
    part.first_id += first;
    part.ids = from(all.ids);
    part.live = from(all.live);
    part.source = from(all.source);
    return part;
  }

  /// Fills the other rows with those of the ranks whose they are.
  ///
  /// @param comm     Of the L ranks. @param all  [T,M] in and out, contiguous: this rank's rows are there.
  /// @param scratch  restore_scratch(L) bytes.
  /// @throws precondition_error if comm is of other ranks, shapes do not fit, or scratch is short.
  /// @note  Collective. If it fails, comm has aborted.
  /// @cost  An all-gather: each rank receives (L - 1) / L of the rows.
  template <class V, communicator C>
  outcome restore(C& comm, matrix_view<V> all, memory scratch, deadline until,
                  call_site site = call_site::here()) const {
    expects(
        comm.rank() == rank_ && comm.size() == L_,
        "sequence_parts::restore: comm is of the L ranks", site,
        {{"comm.rank()", comm.rank()}, {"rank", rank_}, {"comm.size()", comm.size()}, {"L", L_}});
    vector_view const counts(
        scratch.take<std::int64_t>(L_, "sequence_parts::restore: scratch >= restore_scratch(L)",
                                   site),
        L_);
    for (int l = 0; l < L_; ++l) counts[l] = part_of(T_, l, L_).size();
    return all_gather_rows<V>(comm, own(all, site), counts, all, scratch, until, site);
  }

 private:
  std::int64_t T_;
  int rank_, L_;
};

}  // namespace moe::inline MOE_ABI
