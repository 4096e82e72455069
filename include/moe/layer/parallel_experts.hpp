// Expert parallelism: experts on other ranks, behind the seam of experts on this one.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <moe/comm/communicator.hpp>
#include <moe/comm/expert_hosts.hpp>
#include <moe/comm/row_parts.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/layer/detail/parallel_state.hpp>
#include <moe/layer/lost_contributions.hpp>
#include <moe/routing/build_table.hpp>
#include <moe/routing/routing.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/routing/table_rules.hpp>

namespace moe::inline MOE_ABI {

/// The bounds of an exchange of tokens with experts.
struct parallel_shape {
  std::int64_t T = 0;  ///< Most tokens of any rank in a call.
  int K = 0;           ///< Choices of each.
  /// Most rows that a chunk of tokens may bring to a rank; 0: as many as can come. More is `no_room`,
  /// and memory is for that many.
  std::int64_t max_rows = 0;
};

/// All experts of a layer, of which this rank holds some: a model of `experts`, so that
///
///     moe::moe_layer layer(preset, moe::parallel_experts(moe::ffn<moe::gelu>{}, exchange, bounds), shape)
///
/// is an expert-parallel layer: shape.E counts the experts of all ranks, and its parameters are the
/// router and the experts, or slices of them, that this rank holds. Tokens travel to each rank that
/// holds an expert of theirs, once, with the weights of their choices. There they are the tokens of the
/// inner experts; the weighted sums that those give come back and are added up.
///
/// Collective: all ranks of the exchange call forward and backward, each with any number of tokens.
/// Gradients of the experts are of all tokens that came; they are summed over ranks by the layer's own
/// call on each rank, but over copies by the caller. Deterministic for a given plan; equal to one rank
/// with all experts up to the order of sums.
/// @tparam Experts  Any model of `experts`. @tparam C  A communicator of host memory.
template <class Experts, class C>
class parallel_experts {
 public:
  template <class V>
  using parameters = typename Experts::template parameters<V>;
  bool weights_before = false;  ///< As that of the inner experts.

  /// @param exchange  Must outlive this: its communicators, plans and, until backward, sizes. One for
  ///                  each layer.
  /// @param lost      What becomes of choices whose expert is on no rank that is alive, or that find no
  ///                  room in a slot of fixed size.
  /// @throws precondition_error unless T >= 0, 1 <= K <= 16, max_rows >= 0.
  parallel_experts(Experts const& inner, token_exchange<C>& exchange, parallel_shape const& bounds,
                   lost_contributions lost = lost_contributions::fail,
                   call_site site = call_site::here())
      : inner_(inner), exchange_(&exchange), bounds_(bounds), lost_(lost) {
    expects(bounds.T >= 0 && bounds.K >= 1 && bounds.K <= max_choices && bounds.max_rows >= 0,
            "parallel_experts: T >= 0, 1 <= K <= 16, max_rows >= 0", site,
            {{"T", bounds.T}, {"K", bounds.K}, {"max_rows", bounds.max_rows}});
    if constexpr (requires { inner.weights_before; }) weights_before = inner.weights_before;
  }

  /// Of the experts, or slices, that this rank holds.
  std::int64_t parameter_elements(ffn_shape const& shape, bool bias) const noexcept {
    return inner_.parameter_elements(local(shape), bias);
  }
  template <class V>
  parameters<V> carve(V* data, ffn_shape const& shape, bool bias) const noexcept {
    parameters<V> held = inner_.carve(data, local(shape), bias);
    // The outputs of slices are added up, so that one of them has the bias.
    if constexpr (requires { held.down_bias = {}; })
      if (exchange_->hosts().slice() > 0) held.down_bias = {};
    return held;
  }
  template <class Parameters>
  auto prepare(Parameters const& values, call_site site = call_site::here()) const {
    return inner_.prepare(values, site);
  }

  template <class V>
  std::size_t saved_bytes(ffn_shape const& shape, std::int64_t) const noexcept {
    std::size_t const inner = inner_.template saved_bytes<V>(local(shape), room().table.max_rows);
    return detail::parallel_state<V>::bytes(room(), shape.M, inner);
  }
  template <class V>
  std::size_t forward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                    std::int64_t) const noexcept {
    memory_size size;
    size.add<std::int32_t>(bounds_.T * bounds_.K);
    for (int i = 0; i < 2; ++i) size.add<V>(most_rows() * shape.M);
    table_shape const table = room().table;
    return size.bytes() +
           std::max(build_table_scratch(exec, table),
                    inner_.template forward_scratch_bytes<V>(exec, local(shape), table.max_rows));
  }
  template <class V>
  std::size_t backward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                     std::int64_t) const noexcept {
    memory_size size;
    for (int i = 0; i < 2; ++i) size.add<V>(most_rows() * shape.M);
    for (int i = 0; i < 2; ++i) size.add<V>(most_rows() * (shape.M + bounds_.K));
    size.add<V>(most_rows() * bounds_.K);
    size.add<V>(bounds_.T * bounds_.K);
    return size.bytes() +
           inner_.template backward_scratch_bytes<V>(exec, local(shape), room().table.max_rows);
  }

  /// As `experts` has it. Choices without a row in `table` go nowhere.
  /// @throws exchange_error if an exchange ends otherwise than well, or experts are lost and lost is
  ///         `fail`; precondition_error if shapes disagree, the table has other experts than computed
  ///         ones, or memory is too small. In either case the exchange has aborted, unless nothing
  ///         was sent yet.
  template <class Handle, class V>
  void forward(cpu const& exec, Handle const& handle,
               matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
               vector_view<std::type_identity_t<V> const> weight, matrix_view<V> out, memory saved,
               memory scratch, call_site site = call_site::here()) const {
    expect_table(table, tokens.rows(), site);
    std::int64_t const T = table.T, M = tokens.cols();
    state<V> const kept = state<V>::carve(saved, room(), M, site);
    std::int32_t* const key = scratch.take<std::int32_t>(T * K(), scratch_rule, site);  // [T,K]
    write_keys(table, key);
    V* const result[2] = {scratch.take<V>(most_rows() * M, scratch_rule, site),
                          scratch.take<V>(most_rows() * M, scratch_rule, site)};
    aborting_unless_done guard(*exchange_);
    exchange_->forget_lost(T);

    auto const begin = [&](int c) {
      chunk_state<V>& chunk = kept.chunk[c];
      auto const [first, n] = tokens_of(c, T);
      expect_done(exchange_->bind(c, {key + first * K(), n, K()}, site), "parallel_experts: bind");
      chunk.N = exchange_->rows(c);
      chunk.bound = exchange_->times_bound();
      if (chunk.N > most_rows()) expect_done({exchange_status::no_room}, "parallel_experts: bind");
      keep_choices(chunk);
      weigh(table, key, weight, first, n, kept);
      expect_done(
          exchange_->template begin_dispatch<V>(
              c,
              {rows_of(tokens, first, n), matrix_view<V const>(kept.weight + first * K(), n, K())},
              {chunk.rows, chunk.N, M + K()}),
          "parallel_experts: dispatch");
    };
    begin(0);
    for (int c = 0; c < exchange_->chunks(); ++c) {
      chunk_state<V>& chunk = kept.chunk[c];
      expect_done(exchange_->finish_dispatch(), "parallel_experts: dispatch");
      if (c + 1 < exchange_->chunks()) begin(c + 1);
      matrix_view<V> const y(result[c % 2], chunk.N, M);
      if (holds_experts()) {
        build_local_table(exec, chunk, M, scratch, site);
        inner_.forward(exec, handle, chunk.tokens(M), chunk.table, chunk.weights(), y,
                       chunk.experts, scratch, site);
      }
      if (c > 0) expect_done(exchange_->finish_combine(), "parallel_experts: combine");
      auto const [first, n] = tokens_of(c, T);
      expect_done(exchange_->template begin_combine<V>(c, y, rows_of(out, first, n)),
                  "parallel_experts: combine");
    }
    expect_done(exchange_->finish_combine(), "parallel_experts: combine");
    guard.done = true;
  }

  /// As `experts` has it. @throws as forward; precondition_error, too, if the exchange has been used by
  /// another forward since.
  template <class Handle, class V>
  void backward(cpu const& exec, Handle const& handle,
                matrix_view<std::type_identity_t<V> const> dout,
                matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
                vector_view<std::type_identity_t<V> const> weight, memory saved,
                matrix_view<V> dtokens, vector_view<V> dweight, parameters<V> const& gradients,
                update how, memory scratch, call_site site = call_site::here()) const {
    expect_table(table, tokens.rows(), site);
    std::int64_t const T = table.T, M = tokens.cols(), W = M + K();
    state<V> const kept = state<V>::at(saved, room(), site);
    expects(kept.chunk[exchange_->chunks() - 1].bound == exchange_->times_bound(),
            "parallel_experts::backward: no other forward has used the exchange since", site);
    V *din[2], *back[2];
    for (V*& d : din) d = scratch.take<V>(most_rows() * M, scratch_rule, site);
    for (V*& d : back) d = scratch.take<V>(most_rows() * W, scratch_rule, site);
    vector_view<V> const dw(scratch.take<V>(most_rows() * K(), scratch_rule, site),
                            most_rows() * K());
    V* const dkept = scratch.take<V>(T * K(), scratch_rule, site);  // [T,K]
    aborting_unless_done guard(*exchange_);

    auto const begin = [&](int c) {
      auto const [first, n] = tokens_of(c, T);
      expect_done(exchange_->template begin_dispatch<V>(c, rows_of(dout, first, n),
                                                        {din[c % 2], kept.chunk[c].N, M}),
                  "parallel_experts: dispatch of gradients");
    };
    begin(0);
    for (int c = 0; c < exchange_->chunks(); ++c) {
      chunk_state<V>& chunk = kept.chunk[c];
      expect_done(exchange_->finish_dispatch(), "parallel_experts: dispatch of gradients");
      if (c + 1 < exchange_->chunks()) begin(c + 1);
      matrix_view<V> const dx(back[c % 2], chunk.N, M, W);
      if (holds_experts())
        inner_.backward(exec, handle, matrix_view<V const>(din[c % 2], chunk.N, M), chunk.tokens(M),
                        chunk.table, chunk.weights(), chunk.experts, dx, dw, gradients,
                        c == 0 ? how : update::add, scratch, site);
      for (std::int64_t r = 0; r < chunk.N; ++r)
        std::copy_n(dw.data() + r * K(), K(), dx.row(r) + M);
      if (c > 0) expect_done(exchange_->finish_combine(), "parallel_experts: combine of gradients");
      auto const [first, n] = tokens_of(c, T);
      expect_done(exchange_->template begin_combine<V>(
                      c, {back[c % 2], chunk.N, W},
                      {rows_of(dtokens, first, n), matrix_view<V>(dkept + first * K(), n, K())}),
                  "parallel_experts: combine of gradients");
    }
    expect_done(exchange_->finish_combine(), "parallel_experts: combine of gradients");
    guard.done = true;
    for (std::int64_t t = 0; t < T; ++t)
      detail::keep_contributions_backward(lost_, choices_of(table, weight, kept, t),
                                          dkept + t * K(), dweight.data() + t * K());
  }

 private:
  static constexpr char const* scratch_rule =
      "parallel_experts: scratch >= forward/backward_scratch_bytes";
  template <class V>
  using chunk_state = detail::parallel_chunk<V>;
  template <class V>
  using state = detail::parallel_state<V>;

  /// Peers must not write to, or read, memory that is gone.
  struct aborting_unless_done {
    explicit aborting_unless_done(token_exchange<C>& exchange) : exchange_(exchange) {}
    aborting_unless_done(aborting_unless_done const&) = delete;
    aborting_unless_done& operator=(aborting_unless_done const&) = delete;
    ~aborting_unless_done() {
      if (!done) exchange_.abort();
    }
    bool done = false;

   private:
    token_exchange<C>& exchange_;
  };

  int K() const noexcept { return bounds_.K; }
  bool holds_experts() const noexcept { return exchange_->hosts().count() > 0; }
  ffn_shape local(ffn_shape const& shape) const noexcept {
    expert_hosts const& hosts = exchange_->hosts();
    std::int64_t const S = hosts.slices(), s = hosts.slice();
    return {hosts.count(), shape.M, shape.H * (s + 1) / S - shape.H * s / S};
  }
  /// Most rows of a chunk.
  std::int64_t most_rows() const noexcept {
    std::int64_t const D = exchange_->chunks();
    return bounds_.max_rows > 0 ? bounds_.max_rows : exchange_->most_rows((bounds_.T + D - 1) / D);
  }
  detail::parallel_room room() const noexcept {
    int const held = std::max(1, exchange_->hosts().count());
    return {
        .chunks = exchange_->chunks(),
        .K = K(),
        .T = bounds_.T,
        .table = {
            .T = most_rows(), .K = K(), .E = held, .max_rows = most_rows() * std::min(K(), held)}};
  }

  void expect_table(routing_table const& table, std::int64_t rows, call_site site) const {
    expects(table.E == exchange_->hosts().experts() && table.P == table.E && table.K == K() &&
                table.token_begin == nullptr && table.T <= bounds_.T && rows == table.T,
            "parallel_experts: a table of E experts, K choices each, of at most T tokens", site,
            {{"table.E", table.E},
             {"E", exchange_->hosts().experts()},
             {"table.P", table.P},
             {"table.K", table.K},
             {"K", K()},
             {"table.T", table.T},
             {"most T", bounds_.T},
             {"tokens", rows}});
    expects(table.computed_only, "parallel_experts: all experts are computed ones", site);
  }
  /// First token and number of tokens of a chunk.
  std::pair<std::int64_t, std::int64_t> tokens_of(int chunk, std::int64_t T) const noexcept {
    std::int64_t const D = exchange_->chunks(), first = T * chunk / D;
    return {first, T * (chunk + 1) / D - first};
  }
  template <class U>
  static matrix_view<U> rows_of(matrix_view<U> const& all, std::int64_t first, std::int64_t n) {
    return {all.data() + first * all.ld(), n, all.cols(), all.ld()};
  }
  static void expect_done(outcome const& done, char const* what) {
    if (!done) detail::throw_exchange_error(what, done);
  }

  /// Pairs that have a row in the table go to the physical expert of their row.
  void write_keys(routing_table const& table, std::int32_t* key) const {
    std::fill_n(key, table.T * K(), -1);
    for (int e = 0; e < table.E; ++e)
      for (int s = e * table.sources; s < (e + 1) * table.sources; ++s)
        for (std::int32_t r = table.begin[s]; r < table.begin[s] + table.used[s]; ++r)
          key[table.pair_of[r]] = exchange_->hosts().physical(e);
  }
  /// Which of what a chunk brings is for experts of this rank.
  template <class V>
  void keep_choices(chunk_state<V>& chunk) const {
    auto const keys = exchange_->keys();
    expert_hosts const& hosts = exchange_->hosts();
    for (std::int64_t i = 0; i < chunk.N * K(); ++i) {
      std::int32_t const e = keys.data()[i] - hosts.first();
      chunk.expert[i] = e >= 0 && e < hosts.count() ? e : std::int32_t{no_candidate};
    }
  }
  template <class V>
  detail::token_choices<V> choices_of(routing_table const& table, vector_view<V const> weight,
                                      state<V> const& kept, std::int64_t t) const {
    return {table.row_of + t * K(), kept.lost + t * K(), weight.data() + t * K(), K()};
  }
  /// The weights of a chunk's choices that are not lost.
  template <class V>
  void weigh(routing_table const& table, std::int32_t const* key, vector_view<V const> weight,
             std::int64_t first, std::int64_t n, state<V> const& kept) const {
    auto const no_room = exchange_->lost();
    int lost = 0;
    for (std::int64_t t = first; t < first + n; ++t) {
      for (std::int64_t i = t * K(); i < (t + 1) * K(); ++i)
        kept.lost[i] = key[i] < 0 || no_room[i - first * K()] != 0 ? 1 : 0;
      int const of_token = detail::keep_contributions(lost_, choices_of(table, weight, kept, t),
                                                      kept.weight + t * K());
      exchange_->add_lost(t, of_token);
      lost += of_token;
    }
    if (lost > 0 && lost_ == lost_contributions::fail)
      expect_done({exchange_status::lost}, "parallel_experts: bind");
  }
  template <class V>
  void build_local_table(cpu const& exec, chunk_state<V>& chunk, std::int64_t M, memory scratch,
                         call_site site) const {
    for (std::int64_t r = 0; r < chunk.N; ++r)
      std::copy_n(chunk.rows + r * (M + K()) + M, K(), chunk.weight + r * K());
    basic_routing<V> routed;
    routed.T = chunk.N;
    routed.K = K();
    routed.E = exchange_->hosts().count();
    routed.expert = chunk.expert;
    routed.weight = chunk.weight;
    chunk.table.max_rows = chunk.N * K() - std::count(chunk.expert, chunk.expert + chunk.N * K(),
                                                      std::int32_t{no_candidate});
    build_table(exec, routed, table_rules{}, scratch, chunk.table, site);
  }

  Experts inner_;
  token_exchange<C>* exchange_;
  parallel_shape bounds_;
  lost_contributions lost_;
};

}  // namespace moe::inline MOE_ABI
