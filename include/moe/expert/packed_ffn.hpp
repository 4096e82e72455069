// Feed-forward experts over packed weights: inference, from one token to thousands.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/activation.hpp>
#include <moe/expert/detail/ffn_passes.hpp>
#include <moe/expert/detail/packed_schedule.hpp>
#include <moe/expert/detail/packed_tokens.hpp>
#include <moe/expert/instruction_sets.hpp>
#include <moe/expert/packed_weights.hpp>
#include <moe/expert/segments.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// What rows may be in products with weights W: float; of weights of bf16, bf16 too; or, of weights in
/// blocks of integers, integers.
template <class Rows, class W>
concept packed_rows =
    std::same_as<Rows, float> || (std::same_as<Rows, bf16> && std::same_as<W, bf16>) ||
    (std::same_as<Rows, int8_blocks> && weight_blocks<W>);
template <packable W>
using default_rows = std::conditional_t<weight_blocks<W>, int8_blocks, float>;

/// What `packed_ffn::prepare` gives: views alone.
template <packable W>
class prepared_packed_ffn {
 public:
  packed_weights<W const> const& weights() const noexcept { return weights_; }

 private:
  template <activation Activation, packable V, class Set, class Rows>
    requires packed_rows<Rows, V>
  friend struct packed_ffn;
  explicit prepared_packed_ffn(packed_weights<W const> const& weights) noexcept
      : weights_(weights) {}
  packed_weights<W const> weights_;
};

/// The experts of `ffn`, y = act(x gate + b, x up + b) down + b, over packed weights and without a
/// backward. Products and sums are of float; so are tokens and results, or else bf16 or half, which are widened
/// as they are gathered, and rounded once at the end: `experts.forward<moe::bf16>(...)`.
///
///     moe::ffn_shape const shape{.P = 8, .M = 1024, .H = 2816};
///     moe::buffer bytes(moe::packed_bytes<moe::bf16>(shape, true));
///     moe::packed_weights<moe::bf16> packed(bytes.data(), bytes.size(), shape, true);
///     moe::pack(exec, weights, moe::orientation::out_in, packed);             // once
///     moe::packed_ffn<moe::swiglu, moe::bf16> const experts{};
///     experts.forward(exec, experts.prepare(packed), tokens, table, weight, out, {}, scratch);
///
/// Rows are gathered into the order of tiles; they are multiplied with up and gate, and the activation writes
/// its results in that order, too; these are multiplied with down; each token's rows are added in the order of
/// its choices. Many experts are taken one at a time by a member each, few by all of the team in passes.
/// Deterministic: bitwise the same for any number of threads, and for a row whatever other rows there are.
///
/// With weights of eight or four bits, products are of integers: each row is *quantised*, that is 32
/// numbers that follow one another along the depth become integers of -127 to 127 with a scale of their
/// own, tokens before the first products and act(...) before the last. It costs precision (docs/cpu.md);
/// `Rows` = float leaves rows as they are, and is slower with many of them. A NaN or an infinity in a
/// row makes all of the row's results NaN. Sums of 32 products are exact, so that processors with and
/// without VNNI have the same bits.
///
/// With weights of bf16, `Rows` = bf16 rounds tokens and act(...) to bf16 and takes half the time where the
/// processor has AVX512_BF16, and rows are many; there subnormal numbers are 0 in products.
/// @tparam W     What weights are in memory: float, bf16, half, or blocks that share a scale.
/// @tparam Set   `best_set`; or one set, for the same bits on every processor that has it.
/// @tparam Rows  What tokens and act(...) are in products: float, bf16 or int8_blocks; see `packed_rows`.
template <activation Activation, packable W = float, class Set = best_set,
          class Rows = default_rows<W>>
  requires packed_rows<Rows, W>
struct packed_ffn {
  template <class V>
  using parameters =
      std::conditional_t<std::is_const_v<V>, packed_weights<W const>, packed_weights<W>>;
  static constexpr bool gated = Activation::gated;

  [[no_unique_address]] Activation act{};
  /// Router weights multiply the expert's input instead of its output (Llama 4). Only for tables
  /// without copy, zero or other uncomputed experts.
  bool weights_before = false;

  /// Room for all parameters in elements of float, and views of them in an array of these, which is
  /// aligned to a cache line within: the packed weights, then the biases. pack fills the weights.
  std::int64_t parameter_elements(ffn_shape const& shape, bool bias) const noexcept {
    std::size_t const aligned = packed_bytes<W>(shape, gated) + memory::alignment;
    return static_cast<std::int64_t>(aligned / sizeof(float)) +
           (bias ? shape.P * ((gated ? 2 : 1) * shape.H + shape.M) : 0);
  }
  template <class V>
  parameters<V> carve(V* data, ffn_shape const& shape, bool bias,
                      call_site site = call_site::here()) const {
    static_assert(std::is_same_v<std::remove_const_t<V>, float>, "packed_ffn: arrays are of float");
    std::size_t const bytes = packed_bytes<W>(shape, gated);
    memory from(const_cast<float*>(data), bytes + memory::alignment);
    data = from.take<float>(static_cast<std::int64_t>(bytes / sizeof(float)), "packed_ffn::carve",
                            site);
    using Byte = std::conditional_t<std::is_const_v<V>, std::byte const, std::byte>;
    parameters<V> views(reinterpret_cast<Byte*>(data), bytes, shape, gated, site);
    if (bias) {
      float const* next = data + bytes / sizeof(float);
      auto const take = [&](std::int64_t cols) {
        matrix_view<float const> const part(next, shape.P, cols);
        next += shape.P * cols;
        return part;
      };
      views.up_bias = take(shape.H);
      if (gated) views.gate_bias = take(shape.H);
      views.down_bias = take(shape.M);
    }
    return views;
  }

  /// @throws precondition_error unless the weights were packed for an activation of this kind, and biases
  ///         have their shapes.
  prepared_packed_ffn<W> prepare(packed_weights<W const> const& weights,
                                 call_site site = call_site::here()) const {
    expects(weights.gated() == gated,
            "packed_ffn: weights are packed with a gate or without, as "
            "the activation is",
            site, {{"weights.gated", weights.gated()}, {"gated", gated}});
    auto const bias = [&](matrix_view<float const> b, std::int64_t cols, char const* rule) {
      expects(b.absent() || (b.rows() == weights.shape().P && b.cols() == cols && b.ld() >= cols),
              rule, site, {{"rows", b.rows()}, {"cols", b.cols()}, {"P", weights.shape().P}});
    };
    bias(weights.up_bias, weights.shape().H, "packed_ffn: up_bias is [P,H] or absent");
    bias(weights.gate_bias, weights.shape().H, "packed_ffn: gate_bias is [P,H] or absent");
    bias(weights.down_bias, weights.shape().M, "packed_ffn: down_bias is [P,M] or absent");
    return prepared_packed_ffn<W>(weights);
  }

  /// Nothing is kept for a backward.
  template <class V>
  std::size_t saved_bytes(ffn_shape const&, std::int64_t) const noexcept {
    return 0;
  }
  /// @tparam S        What tokens are.
  /// @param max_rows  routing_table::max_rows, or the rows of the views given to forward_rows.
  template <class S>
  std::size_t forward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                    std::int64_t max_rows) const noexcept {
    return memory_size().add<float>(max_rows * detail::spread(shape.M)).bytes() +
           detail::packed::schedule_bytes<W, Rows, S>(exec, shape, max_rows);
  }
  template <class V>
  std::size_t backward_scratch_bytes(cpu const&, ffn_shape const&, std::int64_t) const noexcept {
    return 0;
  }

  /// out[r] = expert of r applied to rows[r], for each row of the segments. No router weights.
  ///
  /// @tparam S       float, bf16 or half.
  /// @param rows     [N,M]; rows outside the segments are not read.
  /// @param out      [N,M] out, may be `rows` itself; rows outside the segments are not written.
  /// @param scratch  forward_scratch_bytes<S>(exec, shape, N).
  /// @throws precondition_error if shapes disagree or memory is too small.
  /// @note  Allocates nothing.
  template <weight_number S = float>
  void forward_rows(cpu const& exec, prepared_packed_ffn<W> const& handle,
                    matrix_view<std::type_identity_t<S> const> rows, row_segments const& segments,
                    matrix_view<std::type_identity_t<S>> out, memory /*saved*/, memory scratch,
                    call_site site = call_site::here()) const {
    ffn_shape const& shape = handle.weights().shape();
    expects(rows.cols() == shape.M && out.cols() == shape.M && rows.rows() == out.rows() &&
                segments.experts == shape.P,
            "packed_ffn: rows and out are [N,M], segments have P experts", site,
            {{"rows.cols", rows.cols()},
             {"out.cols", out.cols()},
             {"rows.rows", rows.rows()},
             {"out.rows", out.rows()},
             {"segments.experts", segments.experts},
             {"P", shape.P},
             {"M", shape.M}});
    auto const source = [&](std::int64_t r) {
      return detail::packed::source_row<S>{rows.row(r), 1.0f};
    };
    if constexpr (std::same_as<S, float>) {
      run<S>(exec, handle, segments, rows.rows(), out, scratch, site, source);
    } else {
      auto const wide = take_rows(scratch, rows.rows(), shape.M, site);
      run<S>(exec, handle, segments, rows.rows(), wide, scratch, site, source);
      detail::packed::round_rows<S>(exec, segments, wide, out);
    }
  }

  /// out[t] = the sum of weight[i] * expert(tokens[t]) over the pairs i of token t that have a row, plus
  /// weight[i] * tokens[t] for pairs at copy experts; see `combine`.
  ///
  /// @tparam S       float, bf16 or half.
  /// @param tokens   [T,M]
  /// @param table    Filled by build_table, P = the experts of the handle.
  /// @param weight   One value for each pair.
  /// @param out      [T,M] out.
  /// @param scratch  forward_scratch_bytes<S>(exec, shape, table.max_rows).
  /// @throws precondition_error if shapes disagree or memory is too small.
  /// @note  Allocates nothing.
  template <weight_number S = float>
  void forward(cpu const& exec, prepared_packed_ffn<W> const& handle,
               matrix_view<std::type_identity_t<S> const> tokens, routing_table const& table,
               vector_view<float const> weight, matrix_view<std::type_identity_t<S>> out,
               memory /*saved*/, memory scratch, call_site site = call_site::here()) const {
    ffn_shape const& shape = handle.weights().shape();
    expects(shape.P == table.P && tokens.cols() == shape.M && tokens.rows() == table.T,
            "packed_ffn: the table has P experts, tokens are [T,M]", site,
            {{"table.P", table.P},
             {"P", shape.P},
             {"tokens.rows", tokens.rows()},
             {"table.T", table.T},
             {"tokens.cols", tokens.cols()},
             {"M", shape.M}});
    expects(weight.size() >= table.pairs(), "packed_ffn: weight has a value for each pair", site,
            {{"weight", weight.size()}, {"pairs", table.pairs()}});
    expects(!weights_before || table.counts->uncomputed == 0,
            "packed_ffn: weights before the experts need experts that are all computed", site,
            {{"uncomputed", table.counts->uncomputed}});
    auto const rows = take_rows(scratch, table.max_rows, shape.M, site);
    run<S>(exec, handle, table, table.max_rows, rows, scratch, site, [&](std::int64_t r) {
      std::int64_t const pair = table.pair_of[r];
      return detail::packed::source_row<S>{tokens.row(token_of(table, pair)),
                                           weights_before ? weight[pair] : 1.0f};
    });
    if constexpr (!std::same_as<S, float>)
      detail::packed::combine_rounded<S>(exec, rows, table,
                                         weights_before ? vector_view<float const>() : weight,
                                         tokens, out, site);
    else if (weights_before)
      combine<float>(exec, rows, table, out, update::assign, site);
    else
      combine<float>(exec, rows, table, weight, tokens, out, update::assign, site);
  }

  /// There is none: train `ffn`, pack what it has learned.
  template <class Weights = W, class... Arguments>
  void backward(Arguments&&...) const {
    static_assert(!std::is_same_v<Weights, W>,
                  "packed_ffn has no backward: train moe::ffn and pack its weights");
  }
  template <class Weights = W, class... Arguments>
  void backward_rows(Arguments&&...) const {
    static_assert(!std::is_same_v<Weights, W>,
                  "packed_ffn has no backward: train moe::ffn and pack its weights");
  }

 private:
  static std::int64_t token_of(routing_table const& table, std::int64_t pair) noexcept {
    if (table.token_begin == nullptr) return pair / table.K;
    return std::upper_bound(table.token_begin, table.token_begin + table.T + 1, pair) -
           table.token_begin - 1;
  }

  static matrix_view<float> take_rows(memory& scratch, std::int64_t rows, std::int64_t M,
                                      call_site site) {
    return detail::take_rows<float>(scratch, rows, M, detail::packed::scratch_rule, site);
  }

  template <class S, class Source>
  void run(cpu const& exec, prepared_packed_ffn<W> const& handle, row_segments const& segments,
           std::int64_t max_rows, matrix_view<float> out, memory scratch, call_site site,
           Source const& source) const {
    detail::packed::run_experts<W, Rows, S>(exec, Set::template packed<W, Rows, Activation>(), act,
                                            handle.weights(), segments, max_rows, source, out,
                                            scratch, site);
  }
};

static_assert(row_experts<packed_ffn<swiglu, bf16>, float> && row_experts<packed_ffn<relu>, float>);

}  // namespace moe::inline MOE_ABI
