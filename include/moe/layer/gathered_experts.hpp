// Experts whose slices lie on several ranks, gathered for each call: data parallelism of any degree.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <moe/comm/communicator.hpp>
#include <moe/comm/token_exchange.hpp>
#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/slice.hpp>
#include <moe/routing/routing_table.hpp>
#include <moe/schedule/expert_parallel.hpp>

namespace moe::inline MOE_ABI {

/// How the ranks of a pool hold experts: rank l * blocks + i has slice l of block i of the experts.
struct expert_pool {
  int blocks = 1;
  int slices = 1;
  bool has_output_bias = true;  ///< Whether slice 0 of the pool is slice 0 of the experts.

  int ranks() const noexcept { return blocks * slices; }
};

/// A rank's pool for `expert_hosts::adaptive`, and the colour with which `split` makes its communicator,
/// the rank being the key.
struct adaptive_pool {
  expert_pool pool;
  int color = 0;

  /// @pre  As expert_hosts::adaptive.
  static adaptive_pool of(expert_parallelism const& degrees, int r, int rank) {
    int const parallel = degrees.expert_parallel, S = degrees.slices;
    if (r == 0) return {{parallel, S, true}, 0};
    int const slice = rank / parallel / (S / r);
    return {{1, S / r, slice == 0}, slice * parallel + rank % parallel};
  }
};

/// Experts that all ranks of a pool run for tokens of their own. Each rank keeps a slice of a block of
/// them; forward and backward gather the rest, and gradients are summed where their slice is kept.
///
/// With `expert_hosts::adaptive` inside `parallel_experts` the number of partial experts that a token
/// goes to, r, can be another in each call, and no parameter moves for that: more gathering, less
/// exchange of tokens for small r, and the other way round.
/// Collective over the pool. Gradients are of all tokens of the pool.
/// @tparam Experts  A model of `experts` whose parameters are ffn_weights.
/// Source. Hwang et al., "Tutel", 2022: adaptive parallelism; Rajbhandari et al., "ZeRO", 2020.
template <class Experts, class C>
class gathered_experts {
 public:
  template <class V>
  using parameters = ffn_weights<V>;
  bool weights_before = false;  ///< As that of the inner experts.

  /// @param pool_ranks  The communicator of the pool. Must outlive this.
  /// @throws precondition_error unless it has as many ranks as the pool.
  gathered_experts(Experts const& inner, C& pool_ranks, expert_pool const& pool,
                   std::chrono::nanoseconds timeout = std::chrono::seconds(60),
                   call_site site = call_site::here())
      : inner_(inner), comm_(&pool_ranks), pool_(pool), timeout_(timeout) {
    expects(pool.blocks >= 1 && pool.slices >= 1 && pool_ranks.size() == pool.ranks(),
            "gathered_experts: the communicator has the ranks of the pool", site,
            {{"ranks", pool_ranks.size()}, {"blocks", pool.blocks}, {"slices", pool.slices}});
    if constexpr (requires { inner.weights_before; }) weights_before = inner.weights_before;
  }

  /// Of the slice that this rank keeps. @pre P is a multiple of the blocks, H of the slices.
  std::int64_t parameter_elements(ffn_shape const& shape, bool bias) const noexcept {
    return ffn_elements(own(shape), Experts::gated, bias);
  }
  template <class V>
  ffn_weights<V> carve(V* data, ffn_shape const& shape, bool bias) const noexcept {
    ffn_weights<V> held = carve_ffn(data, own(shape), Experts::gated, bias);
    if (!keeps_output_bias(comm_->rank())) held.down_bias = {};
    return held;
  }
  /// @throws precondition_error if a gate is missing or superfluous.
  template <class V>
  ffn_weights<std::remove_const_t<V> const> prepare(ffn_weights<V> const& values,
                                                    call_site site = call_site::here()) const {
    expects(values.gate.absent() != Experts::gated, "gathered_experts: a gate if experts are gated",
            site);
    return values;
  }

  template <class V>
  std::size_t saved_bytes(ffn_shape const& shape, std::int64_t n) const noexcept {
    return inner_.template saved_bytes<V>(shape, n);
  }
  template <class V>
  std::size_t forward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                    std::int64_t n) const noexcept {
    return gathered_bytes<V>(shape, 2) + inner_.template forward_scratch_bytes<V>(exec, shape, n);
  }
  template <class V>
  std::size_t backward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                     std::int64_t n) const noexcept {
    return gathered_bytes<V>(shape, 3) + inner_.template backward_scratch_bytes<V>(exec, shape, n);
  }

  /// As `experts` has it. @throws exchange_error if the gathering fails.
  template <class V>
  void forward(cpu const& exec, ffn_weights<V const> const& kept,
               matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
               vector_view<std::type_identity_t<V> const> weight, matrix_view<V> out, memory saved,
               memory scratch, call_site site = call_site::here()) const {
    V* const area = take_all(kept, scratch, site);
    ffn_weights<V const> const all = gather(kept, area, scratch, site);
    inner_.forward(exec, inner_.prepare(all, site), tokens, table, weight, out, saved, scratch,
                   site);
  }
  template <class V>
  void backward(cpu const& exec, ffn_weights<V const> const& kept,
                matrix_view<std::type_identity_t<V> const> dout,
                matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
                vector_view<std::type_identity_t<V> const> weight, memory saved,
                matrix_view<V> dtokens, vector_view<V> dweight, ffn_weights<V> const& gradients,
                update how, memory scratch, call_site site = call_site::here()) const {
    V *const area = take_all(kept, scratch, site), *const sums = take_all(kept, scratch, site);
    ffn_weights<V const> const all = gather(kept, area, scratch, site);
    ffn_weights<V> const dall = carve_all(sums, all.shape(), !kept.up_bias.absent());
    inner_.backward(exec, inner_.prepare(all, site), dout, tokens, table, weight, saved, dtokens,
                    dweight, dall, update::assign, scratch, site);
    scatter(dall, gradients, how, area, scratch, site);
  }

 private:
  static constexpr char const* scratch_rule =
      "gathered_experts: scratch >= forward/backward_scratch_bytes";

  template <class V>
  static V* take(memory& scratch, std::int64_t count, call_site site) {
    return scratch.take<V>(count, scratch_rule, site);
  }
  /// Room for what all ranks of the pool keep, each with an output bias: more than all experts need.
  template <class V>
  V* take_all(ffn_weights<V const> const& kept, memory& scratch, call_site site) const {
    return take<V>(scratch, ffn_elements(kept.shape(), Experts::gated, true) * pool_.ranks(), site);
  }
  ffn_shape all_of(ffn_shape const& part) const noexcept {
    return {part.P * pool_.blocks, part.M, part.H * pool_.slices};
  }
  ffn_shape own(ffn_shape const& shape) const noexcept {
    return {shape.P / pool_.blocks, shape.M, shape.H / pool_.slices};
  }
  bool keeps_output_bias(int rank) const noexcept {
    return pool_.has_output_bias && rank / pool_.blocks == 0;
  }
  template <class V>
  std::size_t gathered_bytes(ffn_shape const& shape, int copies) const noexcept {
    memory_size size;
    std::int64_t const n = ffn_elements(own(shape), Experts::gated, true);
    for (int i = 0; i < copies; ++i) size.add<V>(n * pool_.ranks());
    size.add<V>(n);
    return size.bytes();
  }
  template <class V>
  ffn_weights<V> carve_all(V* data, ffn_shape const& shape, bool bias) const noexcept {
    ffn_weights<V> all = carve_ffn(data, shape, Experts::gated, bias);
    if (!pool_.has_output_bias) all.down_bias = {};
    return all;
  }
  /// What a rank of the pool keeps, as views on all.
  template <class V>
  ffn_weights<V> part_of(ffn_weights<V> const& all, int rank) const {
    ffn_weights<V> part = slice(all, rank / pool_.blocks, pool_.slices);
    std::int64_t const P = all.up.count() / pool_.blocks, first = rank % pool_.blocks * P;
    for (stacked_view<V>* m : {&part.up, &part.gate, &part.down})
      if (!m->absent())
        *m = {m->data() + first * m->stride(), P, m->rows(), m->cols(), m->ld(), m->stride()};
    for (matrix_view<V>* b : {&part.up_bias, &part.gate_bias, &part.down_bias})
      if (!b->absent()) *b = {b->data() + first * b->ld(), P, b->cols(), b->ld()};
    return part;
  }

  /// Calls f(to, from) for each row of two sets of one shape; a bias that one of them lacks is left out.
  template <class To, class From, class F>
  static void each_row(ffn_weights<To> const& to, ffn_weights<From> const& from, F const& f) {
    auto const matrices = [&](stacked_view<To> const& a, stacked_view<From> const& b) {
      for (std::int64_t e = 0; e < a.count(); ++e)
        for (std::int64_t r = 0; r < a.rows(); ++r) f(a[e].row(r), b[e].row(r), a.cols());
    };
    auto const biases = [&](matrix_view<To> const& a, matrix_view<From> const& b) {
      if (a.absent() || b.absent()) return;
      for (std::int64_t e = 0; e < a.rows(); ++e) f(a.row(e), b.row(e), a.cols());
    };
    matrices(to.up, from.up);
    matrices(to.gate, from.gate);
    matrices(to.down, from.down);
    biases(to.up_bias, from.up_bias);
    biases(to.gate_bias, from.gate_bias);
    biases(to.down_bias, from.down_bias);
  }
  static constexpr auto copy = [](auto* to, auto const* from, std::int64_t n) {
    std::copy_n(from, n, to);
  };

  /// All ranks' blocks of `count` values: block p of `out` goes to rank p, block p of `in` comes from it.
  /// @param same  Whether all get block 0 of `out`.
  template <class V>
  void exchange(V const* out, V* in, std::int64_t count, bool same) const {
    auto const n = static_cast<std::size_t>(count) * sizeof(V);
    std::vector<outgoing> sends;
    std::vector<incoming> receives;
    int const rank = comm_->rank();
    for (int i = 1; i < comm_->size() && count > 0; ++i) {
      int const to = (rank + i) % comm_->size(), from = (rank - i + comm_->size()) % comm_->size();
      sends.push_back({reinterpret_cast<std::byte const*>(out + (same ? 0 : to * count)), n, to});
      receives.push_back({reinterpret_cast<std::byte*>(in + from * count), n, from});
    }
    outcome const done = exchange_now(*comm_, sends, receives, within(timeout_));
    if (!done) detail::throw_exchange_error("gathered_experts: exchange of weights", done);
    std::copy_n(out + (same ? 0 : rank * count), count, in + rank * count);
  }

  /// @param area  Of all experts' elements; what is returned lies there.
  template <class V>
  ffn_weights<V const> gather(ffn_weights<V const> const& kept, V* area, memory scratch,
                              call_site site) const {
    bool const bias = !kept.up_bias.absent();
    ffn_shape const part = kept.shape();
    std::int64_t const n = ffn_elements(part, Experts::gated, bias);
    ffn_weights<V> const whole = carve_all(area, all_of(part), bias);
    V* const mine = take<V>(scratch, n, site);
    V* const parts = take<V>(scratch, n * pool_.ranks(), site);
    std::fill_n(mine, n, V(0));
    each_row(carve_ffn(mine, part, Experts::gated, bias), kept, copy);
    exchange<V>(mine, parts, n, true);
    for (int p = 0; p < pool_.ranks(); ++p)
      each_row(part_of(whole, p), carve_ffn(parts + p * n, part, Experts::gated, bias), copy);
    return whole;
  }
  /// Every rank gets the sums of its part, in the order of ranks.
  template <class V>
  void scatter(ffn_weights<V> const& dall, ffn_weights<V> const& gradients, update how, V* area,
               memory scratch, call_site site) const {
    bool const bias = !gradients.up_bias.absent();
    ffn_shape const part = gradients.shape();
    std::int64_t const n = ffn_elements(part, Experts::gated, bias);
    V* const came = take<V>(scratch, n * pool_.ranks(), site);
    std::fill_n(area, n * pool_.ranks(), V(0));
    for (int p = 0; p < pool_.ranks(); ++p)
      each_row(carve_ffn(area + p * n, part, Experts::gated, bias), part_of(dall, p), copy);
    exchange<V>(area, came, n, false);
    for (int p = 0; p < pool_.ranks(); ++p) {
      bool const assign = p == 0 && how == update::assign;
      each_row(gradients, carve_ffn(came + p * n, part, Experts::gated, bias),
               [&](V* to, V const* from, std::int64_t count) {
                 for (std::int64_t i = 0; i < count; ++i)
                   to[i] = assign ? from[i] : to[i] + from[i];
               });
    }
  }

  Experts inner_;
  C* comm_;
  expert_pool pool_;
  std::chrono::nanoseconds timeout_;
};

}  // namespace moe::inline MOE_ABI
