// Feed-forward experts over grouped products: forward and backward, by tokens or by rows.
// SPDX-License-Identifier: MIT
#pragma once

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
#include <moe/dispatch/dispatch.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/activation.hpp>
#include <moe/expert/detail/ffn_passes.hpp>
#include <moe/expert/ffn_weights.hpp>
#include <moe/expert/grouped_gemm.hpp>
#include <moe/expert/segments.hpp>
#include <moe/routing/routing_table.hpp>

namespace moe::inline MOE_ABI {

/// What `ffn::prepare` gives. It holds views alone, no copy of a value: an optimiser step is seen by the
/// next call without preparing again.
template <class V>
class prepared_ffn {
 public:
  constexpr ffn_weights<V const> const& weights() const noexcept { return weights_; }

 private:
  template <activation Activation, class Gemm>
  friend struct ffn;
  explicit constexpr prepared_ffn(ffn_weights<V const> const& weights) noexcept
      : weights_(weights) {}
  ffn_weights<V const> weights_;
};

/// Experts y = act(x gate + b, x up + b) down + b. Biases are optional; the down bias is part of y, so it
/// is multiplied by the router's weight.
///
/// Row level (`forward_rows`, `backward_rows`): rows in, rows out, for callers who exchange rows between
/// ranks. Token level (`forward`, `backward`): dispatch, rows, combine.
/// Deterministic: bitwise the same for any number of threads.
/// @tparam Gemm  `builtin_gemm`, `cblas_gemm`, or another gemm_provider.
template <activation Activation, class Gemm = builtin_gemm>
struct ffn {
  template <class V>
  using parameters = ffn_weights<V>;
  static constexpr bool gated = Activation::gated;  ///< Whether there is a second input projection.

  [[no_unique_address]] Activation act{};
  /// Router weights multiply the expert's input instead of its output (Llama 4). Only for tables
  /// without copy, zero or other uncomputed experts.
  bool weights_before = false;
  /// Saves nothing: for inference; and for training, where backward computes both input projections
  /// again. Gradients are bitwise the same.
  bool recompute = false;

  /// Elements of all parameters, and views of them or of gradients in one array: see carve_ffn.
  std::int64_t parameter_elements(ffn_shape const& shape, bool bias) const noexcept {
    return ffn_elements(shape, gated, bias);
  }
  template <class V>
  ffn_weights<V> carve(V* data, ffn_shape const& shape, bool bias) const noexcept {
    return carve_ffn(data, shape, gated, bias);
  }

  /// @throws precondition_error if the shapes disagree or a gate is missing or superfluous.
  template <class V>
  prepared_ffn<std::remove_const_t<V>> prepare(ffn_weights<V> const& weights,
                                               call_site site = call_site::here()) const {
    using Value = std::remove_const_t<V>;
    detail::expect_weights<Value const>(weights, Activation::gated, site);
    return prepared_ffn<Value>(weights);
  }

  /// Bytes that forward leaves for backward: the arguments of the activation, [rows,H] each; 0 if
  /// they are recomputed.
  /// @param max_rows  routing_table::max_rows, or the rows of the views given to forward_rows.
  template <class V>
  std::size_t saved_bytes(ffn_shape const& shape, std::int64_t max_rows) const noexcept {
    memory_size size;
    if (!recompute) add_hidden<V>(size, shape, max_rows, inputs);
    return size.bytes();
  }
  template <class V>
  std::size_t forward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                    std::int64_t max_rows) const noexcept {
    memory_size size;
    size.add<V>(max_rows * detail::spread(shape.M));
    add_hidden<V>(size, shape, max_rows, 1 + (recompute ? inputs : 0));
    return size.bytes() + Gemm::template scratch_bytes<V>(exec, static_cast<int>(shape.P));
  }
  template <class V>
  std::size_t backward_scratch_bytes(cpu const& exec, ffn_shape const& shape,
                                     std::int64_t max_rows) const noexcept {
    memory_size size;
    size.add<V>(max_rows * detail::spread(shape.M));
    size.add<V>(max_rows * detail::spread(shape.M));
    size.add<V>(max_rows);
    size.add<V>(max_rows);
    add_hidden<V>(size, shape, max_rows, 1 + (recompute ? 2 * inputs : inputs));
    return size.bytes() + Gemm::template scratch_bytes<V>(exec, static_cast<int>(shape.P));
  }

  /// out[r] = expert of r applied to rows[r], for each row of the segments. No router weights.
  ///
  /// @param rows      [N,M]; rows outside the segments are not read.
  /// @param out       [N,M] out, may be `rows` itself; rows outside the segments are not written.
  /// @param saved     saved_bytes(shape, N), until backward_rows.
  /// @param scratch   forward_scratch_bytes(exec, shape, N).
  /// @throws precondition_error if shapes disagree or memory is too small.
  template <class V>
  void forward_rows(cpu const& exec, prepared_ffn<V> const& handle,
                    matrix_view<std::type_identity_t<V> const> rows, row_segments const& segments,
                    matrix_view<V> out, memory saved, memory scratch,
                    call_site site = call_site::here()) const {
    static_assert(gemm_provider<Gemm, V>);
    ffn_weights<V const> const& w = handle.weights();
    auto const hidden = take_hidden<V>(w.shape(), rows.rows(), saved, scratch, site);
    auto const activated =
        detail::take_rows<V>(scratch, rows.rows(), w.shape().H, scratch_rule, site);
    project(exec, w, rows, segments, hidden, scratch, site);
    detail::activate(exec, act, segments, hidden, activated);
    Gemm::template forward<V>(exec, activated, w.down, w.down_bias, segments, out, scratch, site);
  }

  /// The gradient of forward_rows, of out[r] multiplied by row_weight[r] if weights are given.
  ///
  /// @param dout         [N,M]: the gradient of the weighted rows.
  /// @param row_weight   [N] or empty = all 1. Weights may be multiplied elsewhere (where the tokens
  ///                     are): then dout comes weighted, and row_weight is empty.
  /// @param rows         What forward_rows was given.
  /// @param saved        What forward_rows left; not changed.
  /// @param drows        [N,M] out, or absent; may be `dout` itself.
  /// @param drow_weight  [N] out, or empty: dot(dout[r], unweighted out[r]).
  /// @param gradients    Of the weights' shape and parts; assigned, or added to.
  /// @param scratch      backward_scratch_bytes(exec, shape, N).
  template <class V>
  void backward_rows(cpu const& exec, prepared_ffn<V> const& handle,
                     matrix_view<std::type_identity_t<V> const> dout,
                     vector_view<std::type_identity_t<V> const> row_weight,
                     matrix_view<std::type_identity_t<V> const> rows, row_segments const& segments,
                     memory saved, matrix_view<V> drows, vector_view<V> drow_weight,
                     ffn_weights<V> const& gradients, update how, memory scratch,
                     call_site site = call_site::here()) const {
    static_assert(gemm_provider<Gemm, V>);
    ffn_weights<V const> const& w = handle.weights();
    std::int64_t const N = rows.rows(), M = w.shape().M, H = w.shape().H;
    expects(dout.rows() == N && dout.cols() == M && rows.cols() == M &&
                (drows.absent() || (drows.rows() == N && drows.cols() == M)),
            "ffn::backward_rows: dout, rows and drows are [N,M]", site,
            {{"rows.rows", N},
             {"rows.cols", rows.cols()},
             {"dout.rows", dout.rows()},
             {"dout.cols", dout.cols()},
             {"M", M}});
    expects((row_weight.empty() || row_weight.size() >= N) &&
                (drow_weight.empty() || drow_weight.size() >= N),
            "ffn::backward_rows: row_weight and drow_weight are [N] or empty", site,
            {{"row_weight", row_weight.size()}, {"drow_weight", drow_weight.size()}, {"N", N}});
    detail::expect_same_parts<V>(w, gradients, site);

    auto const hidden = take_hidden<V>(w.shape(), N, saved, scratch, site);
    auto const take = [&] { return detail::take_rows<V>(scratch, N, H, scratch_rule, site); };
    matrix_view<V> const dhidden = take(), weighted = take();                    // [N,H]
    matrix_view<V> const dgate = Activation::gated ? take() : matrix_view<V>();  // [N,H]

    if (recompute) project(exec, w, rows, segments, hidden, scratch, site);
    // d(hidden) before the router weight: with it both the weight's gradient and the rest follow, and
    // the expert's output need not be saved.
    Gemm::template input_gradient<V>(exec, dout, w.down, segments, update::assign, dhidden, scratch,
                                     site);
    detail::activate_backward(exec, act, segments, hidden, dout, w.down_bias, row_weight.data(),
                              dhidden, dgate, weighted, drow_weight.data());
    Gemm::template weight_gradient<V>(exec, weighted, dout, segments, how, gradients.down, scratch,
                                      site);
    if (!gradients.down_bias.absent())
      detail::sum_rows_of_experts<V>(exec, segments, dout, row_weight.data(), how,
                                     gradients.down_bias);
    auto const input = [&](matrix_view<std::type_identity_t<V> const> dprojection,
                           stacked_view<std::type_identity_t<V> const> weights,
                           stacked_view<V> dweights, matrix_view<V> dbias, update mode) {
      Gemm::template weight_gradient<V>(exec, rows, dprojection, segments, how, dweights, scratch,
                                        site);
      if (!dbias.absent())
        detail::sum_rows_of_experts<V>(exec, segments, dprojection, nullptr, how, dbias);
      if (!drows.absent())
        Gemm::template input_gradient<V>(exec, dprojection, weights, segments, mode, drows, scratch,
                                         site);
    };
    input(dhidden, w.up, gradients.up, gradients.up_bias, update::assign);
    if constexpr (Activation::gated)
      input(dgate, w.gate, gradients.gate, gradients.gate_bias, update::add);
  }

  /// out[t] = the sum of weight[i] * expert(tokens[t]) over the pairs i of token t that have a row, plus
  /// weight[i] * tokens[t] for pairs at copy experts; see `combine`.
  ///
  /// @param tokens   [T,M]
  /// @param table    Filled by build_table, P = the experts of the handle.
  /// @param weight   One value for each pair.
  /// @param out      [T,M] out.
  /// @param saved    saved_bytes(shape, table.max_rows), until backward.
  /// @param scratch  forward_scratch_bytes(exec, shape, table.max_rows).
  template <class V>
  void forward(cpu const& exec, prepared_ffn<V> const& handle,
               matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
               vector_view<std::type_identity_t<V> const> weight, matrix_view<V> out, memory saved,
               memory scratch, call_site site = call_site::here()) const {
    auto const rows = send(exec, handle, tokens, table, weight, scratch, site);
    forward_rows<V>(exec, handle, rows, table, rows, saved, scratch, site);
    collect(exec, rows, table, weight, tokens, out, site);
  }

  /// The gradient of forward, with what forward was given and left in `saved`.
  ///
  /// @param dout       [T,M]
  /// @param dtokens    [T,M] out; must not overlap tokens or dout.
  /// @param dweight    Out: one value for each pair, 0 for pairs that added nothing.
  /// @param gradients  Assigned, or added to.
  /// @param scratch    backward_scratch_bytes(exec, shape, table.max_rows).
  template <class V>
  void backward(cpu const& exec, prepared_ffn<V> const& handle,
                matrix_view<std::type_identity_t<V> const> dout,
                matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
                vector_view<std::type_identity_t<V> const> weight, memory saved,
                matrix_view<V> dtokens, vector_view<V> dweight, ffn_weights<V> const& gradients,
                update how, memory scratch, call_site site = call_site::here()) const {
    auto const rows = send(exec, handle, tokens, table, weight, scratch, site);
    std::int64_t const N = rows.rows(), M = rows.cols();
    auto const drows = detail::take_rows<V>(scratch, N, M, scratch_rule, site);
    expects(dweight.size() >= table.pairs(), "ffn::backward: dweight has a value for each pair",
            site, {{"dweight", dweight.size()}, {"pairs", table.pairs()}});
    dispatch<V>(exec, dout, table, drows, site);
    if (weights_before) {
      backward_rows<V>(exec, handle, drows, {}, rows, table, saved, drows, {}, gradients, how,
                       scratch, site);
      return dispatch_backward<V>(exec, drows, tokens, table, weight, dtokens, dweight,
                                  update::assign, site);
    }
    vector_view<V> const row_weight(scratch.take<V>(N, scratch_rule, site), N);
    vector_view<V> const drow_weight(scratch.take<V>(N, scratch_rule, site), N);
    detail::spread_weights<V>(exec, table, weight, row_weight);
    backward_rows<V>(exec, handle, drows, row_weight, rows, table, saved, drows, drow_weight,
                     gradients, how, scratch, site);
    dispatch_backward<V>(exec, drows, table, dtokens, update::assign, site);
    detail::collect_gradients<V>(exec, table, tokens, dout, weight, drow_weight, dtokens, dweight);
  }

 private:
  static constexpr int inputs = Activation::gated ? 2 : 1;
  static constexpr char const* scratch_rule = "ffn: scratch >= forward/backward_scratch_bytes";

  template <class V>
  static void add_hidden(memory_size& size, ffn_shape const& shape, std::int64_t rows, int arrays) {
    for (int i = 0; i < arrays; ++i) size.add<V>(rows * detail::spread(shape.H));
  }

  template <class V>
  detail::hidden_rows<V> take_hidden(ffn_shape const& shape, std::int64_t rows, memory saved,
                                     memory& scratch, call_site site) const {
    memory& from = recompute ? scratch : saved;
    char const* const rule = recompute ? scratch_rule : "ffn: saved >= saved_bytes";
    detail::hidden_rows<V> hidden;
    hidden.up = detail::take_rows<V>(from, rows, shape.H, rule, site);
    if (Activation::gated) hidden.gate = detail::take_rows<V>(from, rows, shape.H, rule, site);
    return hidden;
  }

  template <class V>
  static void project(cpu const& exec, ffn_weights<V const> const& w,
                      matrix_view<std::type_identity_t<V> const> rows, row_segments const& segments,
                      detail::hidden_rows<V> const& hidden, memory scratch, call_site site) {
    Gemm::template forward<V>(exec, rows, w.up, w.up_bias, segments, hidden.up, scratch, site);
    if constexpr (Activation::gated)
      Gemm::template forward<V>(exec, rows, w.gate, w.gate_bias, segments, hidden.gate, scratch,
                                site);
  }

  template <class V>
  matrix_view<V> send(cpu const& exec, prepared_ffn<V> const& handle,
                      matrix_view<std::type_identity_t<V> const> tokens, routing_table const& table,
                      vector_view<std::type_identity_t<V> const> weight, memory& scratch,
                      call_site site) const {
    std::int64_t const P = handle.weights().shape().P, M = handle.weights().shape().M;
    expects(P == table.P && tokens.cols() == M, "ffn: the table has P experts, tokens are [T,M]",
            site, {{"table.P", table.P}, {"P", P}, {"tokens.cols", tokens.cols()}, {"M", M}});
    expects(weight.size() >= table.pairs(), "ffn: weight has a value for each pair", site,
            {{"weight", weight.size()}, {"pairs", table.pairs()}});
    auto const rows = detail::take_rows<V>(scratch, table.max_rows, M, scratch_rule, site);
    if (weights_before)
      dispatch<V>(exec, tokens, table, weight, rows, site);
    else
      dispatch<V>(exec, tokens, table, rows, site);
    return rows;
  }

  template <class V>
  void collect(cpu const& exec, matrix_view<std::type_identity_t<V> const> rows,
               routing_table const& table, vector_view<std::type_identity_t<V> const> weight,
               matrix_view<std::type_identity_t<V> const> tokens, matrix_view<V> out,
               call_site site) const {
    if (weights_before)
      combine<V>(exec, rows, table, out, update::assign, site);
    else
      combine<V>(exec, rows, table, weight, tokens, out, update::assign, site);
  }
};

static_assert(gemm_provider<builtin_gemm, float> && gemm_provider<builtin_gemm, double>);
static_assert(row_experts<ffn<relu>, float> && row_experts<ffn<swiglu>, double>);

}  // namespace moe::inline MOE_ABI
