// A complete Mixture-of-Experts layer: router, table, experts, combine; forward and backward.
// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <moe/core/concepts.hpp>
#include <moe/core/config.hpp>
#include <moe/core/cpu.hpp>
#include <moe/core/error.hpp>
#include <moe/core/memory.hpp>
#include <moe/core/types.hpp>
#include <moe/core/view.hpp>
#include <moe/dispatch/combine.hpp>
#include <moe/dispatch/dispatch.hpp>
#include <moe/dispatch/update.hpp>
#include <moe/expert/ffn.hpp>
#include <moe/expert/segments.hpp>
#include <moe/gate/preset.hpp>
#include <moe/layer/layer_saved.hpp>
#include <moe/layer/layer_types.hpp>
#include <moe/layer/router.hpp>
#include <moe/loss/load_balance.hpp>
#include <moe/loss/z_loss.hpp>

namespace moe::inline MOE_ABI {

/// tokens -> router -> preset {gate, capacity, overflow, kept weights, loss} -> experts -> out.
///
/// A layer is a small value: it owns no memory and no parameters. The caller allocates, once:
///
///     moe::moe_layer layer(moe::deepspeed_top1({.capacity_factor = 1.25}), moe::ffn<moe::gelu>{},
///                          {.T = 512, .M = 64, .H = 256, .E = 16});
///     std::vector<float> values(layer.parameter_elements()), gradients(values.size());
///     moe::buffer saved_bytes(layer.saved_bytes<float>()), scratch(layer.scratch_bytes<float>(exec));
///     auto saved = layer.carve_saved<float>(saved_bytes);
///
/// and then, each step, without any allocation:
///
///     auto losses = layer.forward(exec, layer.carve(values.data()), x, {.step = s, .training = true},
///                                 out, saved, scratch);
///     layer.backward(exec, layer.carve(values.data()), x, dout, {.balance = 0.01}, saved, dx,
///                    layer.carve(gradients.data()), moe::update::assign, scratch);
///
/// @tparam Preset   A `preset<Gate, Overflow>`.
/// @tparam Experts  Any model of `experts`: `ffn<Activation, Gemm>`, or the user's own.
template <class Preset, class Experts>
class moe_layer {
 public:
  /// Its parameters, or their gradients.
  template <class V>
  using weights = layer_weights<V, typename Experts::template parameters<V>>;

  /// @throws precondition_error unless T >= 0, M, H, E >= 1 and k of the gate <= E; or if the preset
  ///         applies weights before the experts and the experts do not, or the other way round.
  moe_layer(Preset const& router, Experts const& experts, layer_shape const& shape,
            call_site site = call_site::here())
      : preset_(router), experts_(experts), shape_(shape) {
    expects(shape.T >= 0 && shape.M >= 1 && shape.H >= 1 && shape.E >= 1,
            "moe_layer: T >= 0, M >= 1, H >= 1, E >= 1", site,
            {{"T", shape.T}, {"M", shape.M}, {"H", shape.H}, {"E", shape.E}});
    expects(K() >= 1 && K() <= shape.E, "moe_layer: 1 <= K <= E", site,
            {{"K", K()}, {"E", shape.E}});
    bool experts_before = false;
    if constexpr (requires { experts.weights_before; }) experts_before = experts.weights_before;
    expects((router.apply == weights_apply::before_experts) == experts_before,
            "moe_layer: preset and experts agree on where weights apply", site,
            {{"preset before experts", router.apply == weights_apply::before_experts},
             {"experts.weights_before", experts_before}});
  }

  layer_shape const& shape() const noexcept { return shape_; }
  Preset const& router() const noexcept { return preset_; }
  int K() const noexcept { return preset_.gate.k(); }

  /// Elements of all parameters.
  std::int64_t parameter_elements() const noexcept {
    return shape_.M * shape_.E + experts_.parameter_elements(expert_shape(), shape_.bias);
  }
  /// Views of the parameters, or of gradients, in one array of parameter_elements(): router, experts.
  template <class V>
  weights<V> carve(V* data) const noexcept {
    return {matrix_view<V>(data, shape_.M, shape_.E),
            experts_.carve(data + shape_.M * shape_.E, expert_shape(), shape_.bias)};
  }

  /// Bytes from forward to backward.
  template <class V>
  std::size_t saved_bytes() const noexcept {
    memory_size size;
    size.add<V>(shape_.T * shape_.E);
    size.add<V>(shape_.T * K());
    size.add<double>(loss_sums());
    return size.bytes() + routing_bytes<V>(shape_.T, K()) + table_bytes(table_bounds()) +
           experts_.template saved_bytes<V>(expert_shape(), table_bounds().max_rows) +
           memory::alignment;
  }
  // Not inline: where residual_layer::carve_saved was inlined with it into a constructor, g++ 12.2 -O3 lost
  // the columns of `logits` (examples/apps/pr_moe_text/parallel.cpp; no sanitizer and not clang).
  /// @throws precondition_error if `from` has fewer than saved_bytes<V>() bytes.
  template <class V>
  [[gnu::noinline]] layer_saved<V> carve_saved(memory from,
                                               call_site site = call_site::here()) const {
    char const* const enough = "moe_layer::carve_saved: memory holds saved_bytes()";
    layer_saved<V> saved;
    saved.room = shape_.T;
    saved.logits = {from.take<V>(shape_.T * shape_.E, enough, site), shape_.T, shape_.E};
    saved.weights = from.take<V>(shape_.T * K(), enough, site);
    saved.loss_sums = {from.take<double>(loss_sums(), enough, site), loss_sums()};
    saved.routed = carve_routing<V>(from, shape_.T, K(), shape_.E, site);
    saved.table = carve_table(from, table_bounds(), site);
    expects(from.size() >= experts_.template saved_bytes<V>(expert_shape(), saved.table.max_rows),
            enough, site, {{"bytes left", from.size()}});
    saved.experts = from;
    return saved;
  }
  /// Bytes for forward and backward; shared by all layers that run one after another.
  template <class V>
  std::size_t scratch_bytes(cpu const& exec) const noexcept {
    std::int64_t const rows = table_bounds().max_rows;
    std::size_t const experts =
        std::max(experts_.template forward_scratch_bytes<V>(exec, expert_shape(), rows),
                 experts_.template backward_scratch_bytes<V>(exec, expert_shape(), rows));
    std::size_t const steps =
        std::max({experts, compute_logits_scratch<V>(exec, shape_.T, shape_.M),
                  preset_scratch<V>(exec, preset_, shape_.T, shape_.E)});
    memory_size size;
    size.add<V>(shape_.T * shape_.E);
    size.add<V>(shape_.T * K());
    for (int i = 0; i < 2; ++i) size.add<V>(rows * shape_.M);  // rows, when hooks see them
    return size.bytes() + steps;
  }

  /// out = the weighted sum of what each token's experts give.
  ///
  /// @param parameters  As `carve` lays them out, or any views of these shapes.
  /// @param tokens      [T,M], T <= shape().T.
  /// @param ids         Ids, seed, step, mask, and whether this is training.
  /// @param out         [T,M] out; must not overlap tokens.
  /// @param saved       Made by carve_saved of a layer of this shape; filled.
  /// @param scratch     scratch_bytes<V>(exec).
  /// @param hooks       See no_hooks.
  /// @throws precondition_error if shapes disagree, T is beyond the bound, or memory is too small.
  /// @note  Allocates nothing. Bitwise the same for any number of threads. Counts of dropped tokens,
  ///        NaN and so on are in saved.table.counts.
  template <class V, class Hooks = no_hooks>
  layer_losses forward(cpu const& exec, std::type_identity_t<weights<V const>> const& parameters,
                       std::type_identity_t<matrix_view<V const>> tokens, batch const& ids,
                       std::type_identity_t<matrix_view<V>> out, layer_saved<V>& saved,
                       memory scratch, Hooks&& hooks = {},
                       call_site site = call_site::here()) const {
    static_assert(experts<Experts, V>);
    std::int64_t const T = tokens.rows();
    expect_arguments(parameters.router, tokens, out, saved, site);
    saved.filled = false;

    matrix_view<V> const logits(saved.logits.data(), T, shape_.E);
    compute_logits(exec, tokens, parameters.router, preset_.input_jitter, ids, logits, scratch,
                   site);
    if constexpr (requires { hooks.logits(logits); }) hooks.logits(logits);

    saved.routed.T = T;
    vector_view<V> const kept(saved.weights, T * K());
    apply_preset(exec, preset_, logits, ids, {}, scratch, saved.routed, saved.table, kept,
                 saved.balance_sums(), site);
    if (shape_.z_loss) sum_z_loss(exec, logits, ids, scratch, saved.z_sums(), site);
    if constexpr (requires { hooks.loss_sums(saved.loss_sums); }) hooks.loss_sums(saved.loss_sums);
    layer_losses losses;
    losses.balance = load_balance(saved.routed, preset_.loss, saved.balance_sums(), site);
    if (shape_.z_loss) losses.z = z_loss(saved.z_sums(), site);
    vector_view<V const> const pair_weights = kept;
    if constexpr (requires { hooks.routed(saved.routed, saved.table, pair_weights); })
      hooks.routed(saved.routed, saved.table, pair_weights);

    auto const handle = experts_.prepare(parameters.experts, site);
    constexpr bool sees_rows = requires(matrix_view<V const> rows) { hooks.rows_in(rows); } ||
                               requires(matrix_view<V const> rows) { hooks.rows_out(rows); };
    if constexpr (sees_rows)
      run_experts_seen(exec, handle, tokens, saved, pair_weights, out, scratch, hooks, site);
    else
      experts_.forward(exec, handle, tokens, saved.table, pair_weights, out, saved.experts, scratch,
                       site);
    if constexpr (requires { hooks.output(matrix_view<V const>(out)); })
      hooks.output(matrix_view<V const>(out));
    saved.filled = true;
    return losses;
  }

  /// The gradient of total = f(out) + weights.balance * balance + weights.z * z.
  ///
  /// @param parameters, tokens  As forward was given them.
  /// @param dout       [T,M]: d f / d out.
  /// @param losses     Coefficients of the auxiliary losses.
  /// @param saved      As forward left it; not changed, so that it can be called again.
  /// @param dtokens    [T,M] out; must not overlap tokens or dout.
  /// @param gradients  Of the parameters' shapes; assigned, or added to (gradient accumulation).
  /// @param scratch    scratch_bytes<V>(exec).
  /// @throws precondition_error if shapes disagree, no forward has filled `saved` with as many
  ///         tokens, a z coefficient is given without shape().z_loss, or memory is too small.
  /// @note  Which expert, which row and what is dropped are constants. Allocates nothing. Bitwise the
  ///        same for any number of threads.
  template <class V>
  void backward(cpu const& exec, std::type_identity_t<weights<V const>> const& parameters,
                std::type_identity_t<matrix_view<V const>> tokens,
                std::type_identity_t<matrix_view<V const>> dout, loss_weights const& losses,
                layer_saved<V> const& saved, std::type_identity_t<matrix_view<V>> dtokens,
                std::type_identity_t<weights<V>> const& gradients, update how, memory scratch,
                call_site site = call_site::here()) const {
    std::int64_t const T = tokens.rows(), M = shape_.M;
    expect_arguments(parameters.router, tokens, dtokens, saved, site);
    expects(saved.filled && saved.routed.T == T,
            "moe_layer::backward: saved was filled by a forward of the same T", site,
            {{"filled", saved.filled}, {"saved T", saved.routed.T}, {"T", T}});
    expects(dout.rows() == T && dout.cols() == M, "moe_layer::backward: dout is [T,M]", site,
            {{"rows", dout.rows()}, {"cols", dout.cols()}, {"T", T}, {"M", M}});
    expects(gradients.router.rows() == M && gradients.router.cols() == shape_.E,
            "moe_layer::backward: the router's gradient is [M,E]", site,
            {{"rows", gradients.router.rows()}, {"cols", gradients.router.cols()}});
    expects(losses.z == 0 || shape_.z_loss,
            "moe_layer::backward: a z coefficient needs layer_shape::z_loss", site,
            {{"z", losses.z}});

    matrix_view<V> const dlogits(take<V>(scratch, T * shape_.E, site), T, shape_.E);
    vector_view<V> const dweights(take<V>(scratch, T * K(), site), T * K());
    auto const handle = experts_.prepare(parameters.experts, site);
    experts_.backward(exec, handle, dout, tokens, saved.table,
                      vector_view<V const>(saved.weights, T * K()), saved.experts, dtokens,
                      dweights, gradients.experts, how, scratch, site);

    matrix_view<V const> const logits(saved.logits.data(), T, shape_.E);
    apply_preset_backward(exec, preset_, logits, saved.routed, saved.table, dweights,
                          saved.balance_sums(), losses.balance, scratch, dlogits, site);
    batch const& ids = saved.routed.tokens;
    if (losses.z != 0) z_loss_backward(exec, logits, ids, saved.z_sums(), losses.z, dlogits, site);
    compute_logits_backward(exec, tokens, parameters.router, preset_.input_jitter, ids, logits,
                            dlogits, dtokens, gradients.router, how, scratch, site);
  }

 private:
  static constexpr char const* scratch_rule = "moe_layer: scratch holds scratch_bytes<V>(exec)";

  template <class V>
  static V* take(memory& scratch, std::int64_t count, call_site site) {
    return scratch.take<V>(count, scratch_rule, site);
  }

  std::int64_t loss_sums() const noexcept {
    return load_balance_sums(shape_.E) + (shape_.z_loss ? z_loss_sums : 0);
  }

  ffn_shape expert_shape() const noexcept { return {shape_.E, shape_.M, shape_.H}; }
  table_shape table_bounds() const noexcept {
    return preset_table_shape(preset_, shape_.T, shape_.E);
  }

  template <class V>
  void expect_arguments(matrix_view<V const> router, matrix_view<V const> tokens,
                        matrix_view<V> out, layer_saved<V> const& saved, call_site site) const {
    expects(
        tokens.rows() <= shape_.T && saved.room == shape_.T && saved.logits.cols() == shape_.E &&
            saved.routed.K == K() && saved.loss_sums.size() == loss_sums(),
        "moe_layer: T is within the bound of the layer, and saved was made for this layer", site,
        {{"T", tokens.rows()},
         {"most", shape_.T},
         {"saved's most", saved.room},
         {"E", shape_.E},
         {"saved's E", saved.logits.cols()},
         {"K", K()},
         {"saved's K", saved.routed.K},
         {"saved's loss sums", saved.loss_sums.size()}});
    expects(tokens.cols() == shape_.M && out.rows() == tokens.rows() && out.cols() == shape_.M &&
                router.rows() == shape_.M && router.cols() == shape_.E,
            "moe_layer: tokens and the other side are [T,M], the router is [M,E]", site,
            {{"tokens.cols", tokens.cols()},
             {"other rows", out.rows()},
             {"other cols", out.cols()},
             {"router.rows", router.rows()},
             {"router.cols", router.cols()},
             {"M", shape_.M},
             {"E", shape_.E}});
    expects(!overlap(tokens, out), "moe_layer: the output does not overlap tokens", site);
  }

  /// What experts_.forward does, in three steps with the hooks between them.
  template <class V, class Handle, class Hooks>
  void run_experts_seen(cpu const& exec, Handle const& handle, matrix_view<V const> tokens,
                        layer_saved<V>& saved, vector_view<V const> kept, matrix_view<V> out,
                        memory scratch, Hooks&& hooks, call_site site) const {
    static_assert(row_experts<Experts, V>, "moe_layer: hooks see rows of row_experts alone");
    routing_table const& table = saved.table;
    std::int64_t const N = table.max_rows, M = shape_.M;
    bool const before = preset_.apply == weights_apply::before_experts;
    matrix_view<V> const in(take<V>(scratch, N * M, site), N, M);
    matrix_view<V> const done(take<V>(scratch, N * M, site), N, M);
    if (before)
      dispatch<V>(exec, tokens, table, kept, in, site);
    else
      dispatch<V>(exec, tokens, table, in, site);
    auto const seen = [&](matrix_view<V> rows) {
      return matrix_view<V const>(rows.data(), table.counts->rows, M);
    };
    if constexpr (requires { hooks.rows_in(seen(in)); }) hooks.rows_in(seen(in));
    experts_.forward_rows(exec, handle, matrix_view<V const>(in), row_segments(table), done,
                          saved.experts, scratch, site);
    if constexpr (requires { hooks.rows_out(seen(done)); }) hooks.rows_out(seen(done));
    if (before)
      combine<V>(exec, done, table, out, update::assign, site);
    else
      combine<V>(exec, done, table, kept, tokens, out, update::assign, site);
  }

  Preset preset_;
  Experts experts_;
  layer_shape shape_;
};

}  // namespace moe::inline MOE_ABI
